"""Notebook 01: what the updates determine."""
