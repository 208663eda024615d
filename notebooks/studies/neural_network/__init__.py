"""Notebook 07: a small neural network on images of digits."""
