"""Clients by name, and which of them are contaminated."""

from __future__ import annotations

import torch

from clairlib.core.seeds import derive


def draw_names(clients: int, contaminated: int, *, seed: int) -> tuple[list[str], set[str]]:
    """Names of the clients, and of those that are contaminated: the ones that drew the smallest lots.

    Each client draws its lot by its own name, so one more client changes nobody's.

    Raises
    ------
    ValueError
        ``contaminated`` is not between 0 and ``clients``.
    """
    if not 0 <= contaminated <= clients:
        raise ValueError(f"contaminated must lie between 0 and the {clients} clients, got {contaminated}")
    names = [f"client-{k:02d}" for k in range(clients)]
    lots = {name: torch.rand((), generator=derive(seed, name, "lot")).item() for name in names}
    return names, set(sorted(names, key=lots.__getitem__)[:contaminated])
