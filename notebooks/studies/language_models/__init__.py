"""Notebook 10: pretrained language models whose clients learn labels or responses."""
