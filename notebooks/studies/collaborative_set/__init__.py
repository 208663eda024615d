"""Notebook 04: how often the benign clients are found exactly."""
