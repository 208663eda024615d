"""Notebook 12: clients that differ in size, noise and tails, and attackers that hide in a module."""
