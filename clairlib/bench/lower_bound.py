"""Lower bound of training time: the matrix products that training cannot avoid, and their time on this machine."""

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
    """Training work of K clients at every step.

    Each client has ``sequences`` sequences of ``length`` tokens, and ``labels`` labels among all its tokens. ``rank``
    is the rank of the adapters.
    """

    clients: int
    sequences: int
    length: int
    labels: int
    rank: int
    steps: int

    def together(self, rows: int) -> int:
        """Return how many clients go through the model at once if each has ``rows`` rows."""
        return max(1, min(self.clients, GROUP_TOKENS // rows))


def needed_products(model: Any, targets: Sequence[str], work: Work) -> list[tuple[Shape, float]]:
    """List the matrix products that training the adapters of a Llama cannot avoid, and how often each is computed.

    Take a linear module (p, q) with n rows per client and step: the client's tokens, or only its labels from the last
    o_proj on. With adapter rank rho the multiply-adds for every client and step are:

    * each module from the first adapted one on: n q p forward, and n p q for the gradient of its input if that depends
      on an adapter;
    * each adapted module in addition: n rho (q + p) forward, n rho p for the inner gradient, n rho (p + q) for the
      gradients of B and A, and n rho q for the gradient of its input if that depends on an adapter;
    * attention behind an adapter: T T d for each sequence and head, twice forward and four times back.

    Modules before the first adapted one count once, forward only. If the first adapted module is a q, k or v
    projection, all three are taken to be adapted. Low-rank and attention products are batched.
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
    """List the attention products: scores and values forward, and those back to values, scores, queries and keys.

    Attention that does not depend on an adapter has forward products only.
    """
    G, T = work.together(work.sequences * work.length), work.length
    heads, d = G * work.sequences * config.num_attention_heads, config.hidden_size // config.num_attention_heads
    scores, values = (heads, T, d, T), (heads, T, T, d)
    if not trained:
        return [(scores, work.clients / G), (values, work.clients / G)]
    often = work.steps * work.clients / G
    return [(scores, 2 * often), (values, 4 * often)]


def _input_of(name: str) -> str:
    """Return a name of the module's input.

    Modules of a layer that read the same input get the same name: q, k and v, and gate and up.
    """
    parent, _, child = name.rpartition(".")
    return f"{parent}.{'in' if child in ('q_proj', 'k_proj', 'v_proj', 'gate_proj', 'up_proj') else child}"


def flops(products: Sequence[tuple[Shape, float]]) -> float:
    """Count floating-point operations, two for every multiply-add."""
    return sum(2 * count * math.prod(shape) for shape, count in products)


def seconds(products: Sequence[tuple[Shape, float]], device: str, *, bfloat16: bool = False) -> float:
    """Return the time of the products in float32, with each shape measured on this machine.

    With ``bfloat16`` the factors hold bfloat16 values and are multiplied as such.
    """
    with bfloat16_products(torch.device(device), bfloat16):
        return sum(count * seconds_of(shape, device, bfloat16) for shape, count in products)


@cache
def seconds_of(shape: Shape, device: str, bfloat16: bool, repeats: int = 5) -> float:
    """Return the time of b products (m, k) @ (k, n), the best of ``repeats``."""
    b, m, k, n = shape
    left, right = torch.ones(b, m, k, device=device), torch.ones(b, k, n, device=device)
    if b == 1:
        left, right = left[0], right[0]
    many = max(1, min(1000, int(2e7 / math.prod(shape))))  # one small product is too short for the clock
    best = math.inf
    for _ in range(repeats):
        began = now(device)
        for _ in range(many):
            torch.matmul(left, right)
        best = min(best, (now(device) - began) / many)
    return best


def now(device: str) -> float:
    """Return a time in seconds.

    On the CPU it is the time of this process alone. On CUDA it is wall time, after all work on the device is done.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()
