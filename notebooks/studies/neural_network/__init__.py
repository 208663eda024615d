"""Notebook 07: a small network on images of digits."""
