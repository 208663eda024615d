"""Stacked factors B (p, N) and A (N, q) of all clients for one module; N is the sum of their ranks.

No p x q matrix is formed: every inner product of updates, means and projections follows from B' B and A A'.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from clairlib.linalg.low_rank import LowRank

PANELS = 4  # column panels of a Gram matrix; with four, ten sixteenths of the operations of the whole product remain
_SETTING = Lock()


@dataclass(frozen=True)
class StackedFactors:
    """Factors of all clients: Theta_k = scales[k] * B[:, k] @ A[k], where block k has ranks[k] columns and rows.

    ``B`` (p, N) and ``A`` (N, q) are in single precision, or in double precision if any factor of a client is. ``G_B``
    = B' B and ``G_A`` = A A', both (N, N), are products in that precision, stored as float64.
    """

    B: Tensor
    A: Tensor
    scales: Tensor
    ranks: list[int]
    G_B: Tensor
    G_A: Tensor

    @property
    def width(self) -> int:
        """Largest rank w of a client."""
        return max(self.ranks)

    @cached_property
    def owner(self) -> Tensor:
        """Index (N,) of the client of every column of B."""
        return torch.repeat_interleave(torch.arange(len(self.ranks)), torch.tensor(self.ranks)).to(self.B.device)

    @cached_property
    def starts(self) -> Tensor:
        """Index (K,) of each client's first column."""
        ranks = torch.tensor(self.ranks)
        return ranks.cumsum(0) - ranks

    @cached_property
    def places(self) -> Tensor:
        """Indices (K, w) of each client's columns among the N; N fills the places of a client with fewer than w."""
        ranks = torch.tensor(self.ranks)
        slot = torch.arange(self.width)
        places = self.starts[:, None] + slot
        return torch.where(slot < ranks[:, None], places, int(ranks.sum())).to(self.B.device)

    def blocks(self, G: Tensor) -> Tensor:
        """Return the diagonal blocks (K, w, w) of an (N, N) matrix, padded with zeros."""
        own, places = self.places < len(G), self.places.clamp(max=len(G) - 1)
        blocks = G[places[:, :, None], places[:, None, :]]
        return torch.where(own[:, :, None] & own[:, None, :], blocks, 0.0)

    def by_client(self, columns: Tensor) -> Tensor:
        """Return columns (m, N) as (K, m, w), padded with zeros."""
        return torch.nn.functional.pad(columns, (0, 1))[:, self.places].permute(1, 0, 2)

    def times_blocks(self, blocks: Tensor, rows: Tensor) -> Tensor:
        """Return blockdiag(blocks) @ rows for blocks (K, w, w) and rows (N, m)."""
        own = torch.nn.functional.pad(rows, (0, 0, 0, 1))[self.places]  # (K, w, m)
        return (blocks @ own).flatten(0, 1)[self.places.flatten() < len(rows)]

    def transposed(self) -> StackedFactors:
        """Return the stacked factors of the transposed updates."""
        return StackedFactors(self.A.T, self.B.T, self.scales, self.ranks, self.G_A, self.G_B)


def stack(updates: Sequence[LowRank]) -> StackedFactors:
    """Stack the clients' factors and compute their Gram matrices, the only large products: (p + q) N^2 operations."""
    dtypes = {factor.dtype for update in updates for factor in (update.B, update.A)}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    B = torch.cat([u.B for u in updates], dim=1).to(dtype)
    A = torch.cat([u.A for u in updates], dim=0).to(dtype)
    scales = torch.tensor([u.scale for u in updates], dtype=torch.float64, device=B.device)
    with bfloat16_products(B.device, dtypes == {torch.bfloat16}):
        return StackedFactors(B, A, scales, [u.rank for u in updates], gram(B), gram(A.T))


def gram(B: Tensor) -> Tensor:
    """Return B' B (N, N) of B (p, N), in float64, from products in B's precision of one triangle of the blocks."""
    N = B.shape[1]
    G = B.new_empty(N, N)
    edges = [N * i // PANELS for i in range(PANELS + 1)]
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        torch.mm(B[:, first:last].T, B[:, first:], out=G[first:last, first:])
        G[last:, first:last] = G[first:last, last:].T
    return G.double()


@contextmanager
def bfloat16_products(device: torch.device, exact: bool) -> Iterator[None]:
    """Let float32 products multiply in bfloat16 (TF32 on a GPU) and add in float32, if the processor supports it.

    ``exact`` says that the factors hold bfloat16 values. Products of two such values have 16 significant bits, so no
    rounding is added to that of single precision. If ``exact`` is False, or before PyTorch 2.9, nothing changes. The
    setting is the whole process's: a lock gives it to one thread at a time, but products in other threads change too.
    """
    backend: Any = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    matmul: Any = getattr(backend, "matmul", None)
    if not exact or not hasattr(matmul, "fp32_precision"):
        yield
        return
    with _SETTING:
        before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if device.type == "cuda" else "bf16"
        try:
            yield
        finally:
            matmul.fp32_precision = before
