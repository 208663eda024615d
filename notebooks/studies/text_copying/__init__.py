"""Notebook 08: text copying on a small Transformer."""
