"""Notebook 00: CLAIR on planted clients and on adapter folders."""
