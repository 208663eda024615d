"""Notebook 01: what the clients' updates determine."""
