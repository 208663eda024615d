"""Notebook 06: published regression designs and real data."""
