"""Notebook 05: the gain of refinement."""
