"""Notebook 05: what refinement gains."""
