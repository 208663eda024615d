"""Forecast of the cost of an alignment before it starts, from the headers of the files and one timed module."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from clairlib.alignment.module import AlignmentJob, fit_module, read_module
from clairlib.linalg.compress import FILLED, LEAD
from clairlib.recovery.clair import AGREED, pilots

PROCESS = 450e6  # bytes of a process that has loaded PyTorch
COPIES = 4  # of a module's factors: as read, stacked in single precision (twice the size), and the module read next
SQUARES = 6  # N x N arrays in double precision that exist at the same time
STACKS = 16  # arrays of the size of the cores that exist at the same time


@dataclass(frozen=True)
class Forecast:
    """Clients, modules, bytes to read, expected peak memory of all processes in bytes, and expected seconds."""

    clients: int
    modules: int
    bytes: int
    memory: float
    seconds: float

    def __str__(self) -> str:
        size = f"{self.clients} clients, {self.modules} modules, {self.bytes / 1e9:.2f} GB to read"
        return f"{size}; about {self.memory / 1e9:.1f} GB of memory and {self.seconds:.0f} s"


def forecast(job: AlignmentJob, jobs: int = 1) -> Forecast:
    """Return the expected cost of an alignment by ``jobs`` processes.

    The module of median size is read, compressed, searched and judged once. The others are assumed to take the same
    time per byte, without the search, and writing as long as reading. The forecast should be right within a factor of
    two; this is not guaranteed.
    """
    sizes = job.adapters.module_bytes
    middle = sorted(sizes, key=sizes.__getitem__)[len(sizes) // 2]
    start = time.perf_counter()
    job.adapters.read(middle)
    reading = time.perf_counter() - start
    start = time.perf_counter()
    fit, _ = fit_module(job, middle, True)
    searching = time.perf_counter() - start
    start = time.perf_counter()
    job.clair.prepare(read_module(job, middle), job.weights)
    fit.outcome(torch.ones_like(job.weights, dtype=torch.bool))
    working = 2 * (time.perf_counter() - start) + reading
    few = len(pilots(list(sizes), job.clair.solver))
    found = few if job.clair.solver == "convex" else min(AGREED, few)  # more are searched if these do not agree
    searched = found * searching + (few - found) * working
    seconds = (working * job.adapters.bytes / sizes[middle] + searched) / min(jobs, len(sizes))
    return Forecast(len(job.adapters.names), len(sizes), job.adapters.bytes, jobs * memory_of_a_process(job), seconds)


def memory_of_a_process(job: AlignmentJob) -> float:
    """Return the expected peak memory of a process in bytes, from the largest module."""
    K, most = len(job.adapters.names), 0.0
    for clients in job.adapters.modules.values():
        N, w = sum(own.rank for own in clients), max(own.rank for own in clients)
        (p, q), read = clients[0].shape, sum(own.bytes for own in clients)
        side = LEAD + w if max(p, q) > FILLED else FILLED
        most = max(most, COPIES * max(read, 2 * N * (p + q)) + 8.0 * (SQUARES * N * N + STACKS * K * side * side))
    return PROCESS + most
