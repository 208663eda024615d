"""Notebook 00: planted clients, and adapter folders."""
