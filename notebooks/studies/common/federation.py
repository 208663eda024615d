"""Random client names and the random choice of contaminated clients."""

from __future__ import annotations

import torch

from clairlib.core.seeds import derive


def draw_names(clients: int, contaminated: int, *, seed: int) -> tuple[list[str], set[str]]:
    """Draw the clients' names and the names of the contaminated clients.

    Each client draws a random number, its lot, from a generator that is seeded by its own name. The clients with the
    smallest lots are contaminated. Adding a client changes no other client's lot.

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
