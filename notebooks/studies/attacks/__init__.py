"""Notebook 09: every attack against every aggregation rule."""
