"""The floor under training time: the matrix products that cannot be done without, and how long they take here."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from clairlib.linalg.grams import bfloat16_products
from clairlib.training.preparation import GROUP_TOKENS

Shape = tuple[int, int, int, int]  # (b, m, k, n): b products (m, k) @ (k, n)


@dataclass(frozen=True)
class Work:
    """What K clients train at every step: each ``sequences`` of ``length`` tokens, ``labels`` of them labelled."""

    clients: int
    sequences: int
    length: int
    labels: int
    rank: int
    steps: int

    def together(self, rows: int) -> int:
        """Clients that go through the model at once, with so many rows each."""
        return max(1, min(self.clients, GROUP_TOKENS // rows))


def needed_products(model: Any, targets: Sequence[str], work: Work) -> list[tuple[Shape, float]]:
    """The matrix products that training the adapters of a Llama cannot do without, and how often each is taken.

    For every client and step, with n rows through a linear module (p, q) - its tokens, or from the last o_proj on its
    labels - and rank rho, multiply-adds:

    * each module from the first adapted one on: n q p forward, and n p q back to its input where that depends on an
      adapter;
    * each adapted one: n rho (q + p) forward, n rho p for the inner gradient, n rho (p + q) for those of B and A, and
      n rho q back to its input where that depends on an adapter;
    * attention behind an adapter: T T d for each sequence and head, twice forward and four times back.

    What lies before the first adapted module is counted once, forward; where that is a q, k or v, all three are taken
    to be adapted. Low-rank and attention products are batched.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    names = list(linear)  # in the order in which a Llama runs them
    first, last = names.index(targets[0]), max(place for place, name in enumerate(names) if name.endswith("o_proj"))
    found: list[tuple[Shape, float]] = []
    for place, name in enumerate(names):
        rows, (p, q) = (work.sequences * work.length if place < last else work.labels), linear[name].weight.shape
        G = work.together(rows)
        trained, back = place >= first, place > first and _input_of(name) != _input_of(names[first])
        often = (work.steps if trained else 1) * work.clients / G
        found += [((1, G * rows, q, p), often)] + [((1, G * rows, p, q), often)] * back
        if name in targets:
            found += [((G, *shape), often) for shape in _low_rank(rows, p, q, work.rank, back)]
        if name.endswith("v_proj"):
            found += _attention(model.config, work, trained)
    return found


def _low_rank(n: int, p: int, q: int, rho: int, back: bool) -> list[tuple[int, int, int]]:
    forward = [(n, q, rho), (n, rho, p)]
    return forward + [(n, p, rho), (p, n, rho), (rho, n, q)] + [(n, rho, q)] * back


def _attention(config: Any, work: Work, trained: bool) -> list[tuple[Shape, float]]:
    """Scores and values forward; back to values, scores, queries and keys where they depend on an adapter."""
    G, T = work.together(work.sequences * work.length), work.length
    heads, d = G * work.sequences * config.num_attention_heads, config.hidden_size // config.num_attention_heads
    scores, values = (heads, T, d, T), (heads, T, T, d)
    if not trained:
        return [(scores, work.clients / G), (values, work.clients / G)]
    often = work.steps * work.clients / G
    return [(scores, 2 * often), (values, 4 * often)]


def _input_of(name: str) -> str:
    """The same for modules that read the same input: q, k and v, and gate and up, of a layer."""
    parent, _, child = name.rpartition(".")
    return f"{parent}.{'in' if child in ('q_proj', 'k_proj', 'v_proj', 'gate_proj', 'up_proj') else child}"


def flops(products: Sequence[tuple[Shape, float]]) -> float:
    """Two for every multiply-add."""
    return sum(2 * count * math.prod(shape) for shape, count in products)


def seconds(products: Sequence[tuple[Shape, float]], device: str, *, bfloat16: bool = False) -> float:
    """Time of the products in float32, each shape measured here; ``bfloat16``: of factors that hold such values."""
    with bfloat16_products(torch.device(device), bfloat16):
        return sum(count * _seconds_of(shape, device, bfloat16) for shape, count in products)


@cache
def _seconds_of(shape: Shape, device: str, bfloat16: bool, repeats: int = 5) -> float:
    """Time of b products (m, k) @ (k, n), the best of several."""
    b, m, k, n = shape
    left, right = torch.ones(b, m, k, device=device), torch.ones(b, k, n, device=device)
    if b == 1:
        left, right = left[0], right[0]
    many = max(1, min(1000, int(2e7 / math.prod(shape))))  # a small product is shorter than the clock can tell
    best = math.inf
    for _ in range(repeats):
        began = now(device)
        for _ in range(many):
            torch.matmul(left, right)
        best = min(best, (now(device) - began) / many)
    return best


def now(device: str) -> float:
    """Seconds of this process's own on the CPU, whatever else runs there; on CUDA of the clock, its work being done."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()
