"""Notebook 11: time and memory at the size of a 7B model."""
