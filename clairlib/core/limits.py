"""Limits that several floors check."""

from __future__ import annotations

MINIMUM_CLIENTS = 3  # with only two clients, no method can say which of them differs
