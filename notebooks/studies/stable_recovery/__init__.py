"""Notebook 03: the subspace under noise."""
