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
    """Training work of K clients at every step."""

    clients: int
    sequences: int  # of each client
    length: int  # tokens of a sequence
    labels: int  # labels among all tokens of a client
    rank: int  # of the adapters
    steps: int

    def together(self, rows: int) -> int:
        """Return how many clients go through the model at once if each has ``rows`` rows."""
        return max(1, min(self.clients, GROUP_TOKENS // rows))


def needed_products(model: Any, targets: Sequence[str], work: Work) -> list[tuple[Shape, float]]:
    """List the matrix products that training the adapters of a Llama cannot avoid, and how often each is computed.

    Take a linear module (p, q) with n rows per client and step: the client's tokens, or only its labels from the last
    o_proj on. With adapter rank rho the multiply-adds for every client and step are as follows; those for the gradient
    of a module's input count if that depends on an adapter.

    * Each module from the first adapted one on: n q p forward, and n p q for the gradient of its input.
    * Each adapted module in addition: n rho (q + p) forward, n rho p for the inner gradient, n rho (p + q) for the
      gradients of B and A, and n rho q for the gradient of its input.
    * Attention behind an adapter: T T d for each sequence and head, twice forward and four times back.

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
            n, rho = rows, work.rank
            forward, backward = [(n, q, rho), (n, rho, p)], [(n, p, rho), (p, n, rho), (rho, n, q)]
            found += [((G, *shape), often) for shape in forward + backward + [(n, rho, q)] * back]
        if name.endswith("v_proj"):
            found += _attention(model.config, work, trained)
    return found


def _attention(config: Any, work: Work, trained: bool) -> list[tuple[Shape, float]]:
    """List the attention products: scores and values forward; if trained, also back to these, queries and keys."""
    G, T = work.together(work.sequences * work.length), work.length
    heads, d = G * work.sequences * config.num_attention_heads, config.hidden_size // config.num_attention_heads
    often = (work.steps if trained else 1) * work.clients / G
    return [((heads, T, d, T), (2 if trained else 1) * often), ((heads, T, T, d), (4 if trained else 1) * often)]


def _input_of(name: str) -> str:
    """Return a name of the module's input; q, k and v of a layer get the same, and gate and up."""
    parent, _, child = name.rpartition(".")
    return f"{parent}.{'in' if child in ('q_proj', 'k_proj', 'v_proj', 'gate_proj', 'up_proj') else child}"


def flops(products: Sequence[tuple[Shape, float]]) -> float:
    """Count floating-point operations, two for every multiply-add."""
    return sum(2 * count * math.prod(shape) for shape, count in products)


def seconds(products: Sequence[tuple[Shape, float]], device: str, *, bfloat16: bool = False) -> float:
    """Return the time of the products in float32 (of bfloat16 values), with each shape measured on this machine."""
    with bfloat16_products(torch.device(device), bfloat16):
        return sum(count * seconds_of(shape, device, bfloat16) for shape, count in products)


@cache
def seconds_of(shape: Shape, device: str, bfloat16: bool) -> float:
    """Return the time of b products (m, k) @ (k, n), the best of five."""
    b, m, k, n = shape
    batch = () if b == 1 else (b,)
    left, right = torch.ones(*batch, m, k, device=device), torch.ones(*batch, k, n, device=device)
    many = max(1, min(1000, int(2e7 / math.prod(shape))))  # one small product is too short for the clock
    best = math.inf
    for _ in range(5):
        began = now(device)
        for _ in range(many):
            torch.matmul(left, right)
        best = min(best, (now(device) - began) / many)
    return best


def now(device: str) -> float:
    """Return a time in seconds: of this process alone, or on CUDA wall time, after all work on the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()
