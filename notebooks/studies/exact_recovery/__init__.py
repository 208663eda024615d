"""Notebook 02: the subspace without noise."""
