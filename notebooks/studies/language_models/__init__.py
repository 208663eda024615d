"""Notebook 10: language models, labels and responses."""
