"""Limits that several floors check."""

MINIMUM_CLIENTS = 3  # with only two clients, no method can say which of them differs
