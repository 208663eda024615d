"""Notebook 03: recovery of the subspace under noise."""
