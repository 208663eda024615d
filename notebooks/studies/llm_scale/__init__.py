"""Notebook 11: time and memory of an alignment at the size of a 7B model."""
