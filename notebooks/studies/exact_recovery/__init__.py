"""Notebook 02: recovery of the subspace without noise."""
