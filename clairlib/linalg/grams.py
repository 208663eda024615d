"""All clients' factors of one module side by side, and the two Gram matrices on which everything is computed.

Nothing of size p x q is formed: with B (p, N) and A (N, q) the factors of all clients, N the sum of their ranks, every
inner product of updates, means and projections follows from B' B and A A'.
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

PANELS = 4  # of a Gram matrix: ten sixteenths of the operations of the whole product
_SETTING = Lock()


@dataclass(frozen=True)
class StackedFactors:
    """Theta_k = scales[k] * B[:, k] @ A[k], the k-th blocks having ranks[k] columns and rows.

    ``B`` (p, N), ``A`` (N, q): single precision, or double where a client's factors are. ``G_B`` = B' B and ``G_A`` =
    A A' (N, N): products in that precision, kept as float64.
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
        """Client (N,) of every column of B."""
        return torch.repeat_interleave(torch.arange(len(self.ranks)), torch.tensor(self.ranks)).to(self.B.device)

    @cached_property
    def starts(self) -> Tensor:
        """Place (K,) of each client's first column."""
        ranks = torch.tensor(self.ranks)
        return ranks.cumsum(0) - ranks

    @cached_property
    def places(self) -> Tensor:
        """Places (K, w) of each client's columns among the N; N where a client has fewer than w."""
        ranks = torch.tensor(self.ranks)
        slot = torch.arange(self.width)
        places = self.starts[:, None] + slot
        return torch.where(slot < ranks[:, None], places, int(ranks.sum())).to(self.B.device)

    def blocks(self, G: Tensor) -> Tensor:
        """Diagonal blocks (K, w, w) of an (N, N) matrix, padded with zeros."""
        own, places = self.places < len(G), self.places.clamp(max=len(G) - 1)
        blocks = G[places[:, :, None], places[:, None, :]]
        return torch.where(own[:, :, None] & own[:, None, :], blocks, 0.0)

    def by_client(self, columns: Tensor) -> Tensor:
        """Columns (m, N) as (K, m, w), padded with zeros."""
        return torch.nn.functional.pad(columns, (0, 1))[:, self.places].permute(1, 0, 2)

    def times_blocks(self, blocks: Tensor, rows: Tensor) -> Tensor:
        """blockdiag(blocks) @ rows for blocks (K, w, w) and rows (N, m)."""
        own = torch.nn.functional.pad(rows, (0, 0, 0, 1))[self.places]  # (K, w, m)
        return (blocks @ own).flatten(0, 1)[self.places.flatten() < len(rows)]

    def transposed(self) -> StackedFactors:
        """The same for the transposed updates."""
        return StackedFactors(self.A.T, self.B.T, self.scales, self.ranks, self.G_A, self.G_B)


def stack(updates: Sequence[LowRank]) -> StackedFactors:
    """Factors side by side and their Gram matrices, some (p + q) N^2 operations, the only large products there are."""
    dtypes = {factor.dtype for update in updates for factor in (update.B, update.A)}
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    B = torch.cat([u.B for u in updates], dim=1).to(dtype)
    A = torch.cat([u.A for u in updates], dim=0).to(dtype)
    scales = torch.tensor([u.scale for u in updates], dtype=torch.float64, device=B.device)
    with bfloat16_products(B.device, dtypes == {torch.bfloat16}):
        return StackedFactors(B, A, scales, [u.rank for u in updates], gram(B), gram(A.T))


def gram(B: Tensor) -> Tensor:
    """B' B (N, N) of B (p, N), in float64: products in B's precision, of one triangle of its blocks."""
    N = B.shape[1]
    G = B.new_empty(N, N)
    edges = [N * i // PANELS for i in range(PANELS + 1)]
    for first, last in zip(edges[:-1], edges[1:], strict=True):
        torch.mm(B[:, first:last].T, B[:, first:], out=G[first:last, first:])
        G[last:, first:last] = G[first:last, last:].T
    return G.double()


@contextmanager
def bfloat16_products(device: torch.device, exact: bool) -> Iterator[None]:
    """Let float32 products multiply in bfloat16 (TF32 on a GPU) and add in float32, where the processor can.

    ``exact`` says that the factors hold bfloat16 values: the product of two of them has 16 significant bits, so nothing
    is rounded that single precision would not round. Without that, or before PyTorch 2.9, nothing changes. The setting
    is the whole process's: one thread has it at a time, but products of others are affected meanwhile.
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
