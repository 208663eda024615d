"""Refined adapters from Gram matrices: shared subspace and common part of a set of clients, and what each client gets.

Everything is a combination of the clients' factors: a direction of the output side is B v with v (N,).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from clairlib.factors import LowRank
from clairlib.grams import Stacked

GUARD = 8  # directions iterated on beyond those wanted
MOST_ROUNDS = 60
CONVERGED = 1e-11  # residual over the gap, which bounds the angle to the exact subspace
ROUNDING = 1e-13
OFF_ROUNDS = 8


@dataclass(frozen=True)
class Shared:
    """Shared subspace and off-subspace common part of a set of clients, as combinations of all clients' factors.

    Orthonormal basis U = B ``basis`` (N, r). P_perp M = (B - U U' B) diag(``shares``) A, ``shares`` (N,) the weights of
    the members' columns in their mean, times their scales.
    """

    stacked: Stacked
    basis: Tensor
    shares: Tensor

    def off(self, coefficients: Tensor) -> Tensor:
        """Combinations (N, m) less their part in the subspace."""
        return coefficients - self.basis @ (self.basis.T @ (self.stacked.G_B @ coefficients))

    def lifted_basis(self) -> Tensor:
        """U (p, r)."""
        return self.stacked.B @ self.basis.to(self.stacked.B.dtype)

    def common_part(self) -> LowRank:
        """P_perp M, factored; its inner dimension is the sum of the members' ranks."""
        used, s = self.shares != 0, self.stacked
        U = self.lifted_basis()
        B = s.B[:, used]
        return LowRank((B - U @ (U.T @ B)) * self.shares[used].to(B.dtype), s.A[used])


def shared_part(stacked: Stacked, members: Tensor, weights: Tensor, start: Tensor, rank: int) -> Shared:
    """The leading ``rank`` directions of sum_k w_k (Theta_k - M)(Theta_k - M)' over the members (K,) bool, and M.

    Subspace iteration with Rayleigh-Ritz steps from the combinations ``start`` (N, m), m >= rank, until the subspace
    stays: the scatter is B Omega B' with Omega = blockdiag(w_k c_k^2 G_A[k, k]) - (s_i s_j / W) G_A[i, j], s = w c.
    """
    w = torch.where(members, weights, 0.0)
    W = w.sum()
    by_column = (w * stacked.scales)[stacked.owner]
    shares = by_column / W
    blocks = (w * stacked.scales.square())[:, None, None] * stacked.blocks(stacked.G_A)

    def scatter(rows: Tensor) -> Tensor:
        y = stacked.G_B @ rows
        return stacked.times_blocks(blocks, y) - by_column[:, None] * (stacked.G_A @ (shares[:, None] * y))

    V = orthonormal(stacked.G_B, start)
    for _ in range(MOST_ROUNDS if rank else 0):
        image = scatter(V)
        values, E = torch.linalg.eigh(V.T @ (stacked.G_B @ image))
        values, E = values.flip(0), E.flip(1)
        V, image = V @ E, image @ E
        if _angle(stacked.G_B, image[:, :rank] - V[:, :rank] * values[:rank], values, rank) <= CONVERGED:
            break
        V = orthonormal(stacked.G_B, image)
    return Shared(stacked, V[:, :rank], shares)


def orthonormal(G: Tensor, V: Tensor) -> Tensor:
    """Combinations (N, m') of the columns of V with V' G V = I; directions that hold rounding only are dropped."""
    values, E = torch.linalg.eigh(V.T @ (G @ V))
    kept = values > ROUNDING * values[-1:]
    return V @ (E[:, kept] * values[kept].rsqrt()).flip(1)


def _angle(G: Tensor, residual: Tensor, values: Tensor, rank: int) -> float:
    """Bound on the sine of the angle to the exact subspace: residual over the gap that ends it."""
    beyond = values[rank] if len(values) > rank else values.new_zeros(())
    size = (residual * (G @ residual)).sum().clamp(min=0.0).sqrt()
    return float(size / (values[rank - 1] - beyond).clamp(min=torch.finfo(G.dtype).tiny))


def leading_off_part(shared: Shared, count: int, generator: Generator) -> Tensor:
    """At most ``count`` leading left singular directions of P_perp M, as orthonormal combinations (N, t)."""
    s, w = shared.stacked, shared.shares[:, None]
    N = len(s.G_B)
    V = torch.randn(N, min(count + GUARD, N), generator=generator, dtype=torch.float64).to(s.G_B.device)
    V = orthonormal(s.G_B, shared.off(w * V))
    for _ in range(OFF_ROUNDS):
        V = orthonormal(s.G_B, shared.off(w * (s.G_A @ (w * (s.G_B @ V)))))
    y = w * (s.G_B @ V)  # A' y = M' Q
    values, E = torch.linalg.eigh(y.T @ (s.G_A @ y))
    return V @ E.flip(1)[:, :count]


@dataclass(frozen=True)
class Assembly:
    """What all refined adapters of a module are put together from.

    ``left`` (p, r + t): the shared subspace and the leading directions of the common part. ``outside`` (t, q): the
    common part in those. ``gram`` (t, t) and ``cross`` (t, N): inner products of its rows with one another and with
    A's rows. ``energy``: ||P_perp M||_F^2.
    """

    shared: Shared
    left: Tensor
    outside: Tensor
    gram: Tensor
    cross: Tensor
    energy: float


def assemble(shared: Shared, count: int, generator: Generator) -> Assembly:
    """Prepare the refined adapters of a module, with ``count`` directions of the common part."""
    s, dtype = shared.stacked, shared.stacked.B.dtype
    Q = leading_off_part(shared, count, generator)
    rows = (s.G_B @ Q * shared.shares[:, None]).T  # (t, N) in A
    cross = rows @ s.G_A
    y = shared.shares[:, None] * s.G_A * shared.shares
    inside = shared.basis.T @ s.G_B  # (r, N)
    energy = float((s.G_B * y).sum() - ((inside @ y) * inside).sum())
    left = s.B @ torch.cat([shared.basis, Q], dim=1).to(dtype)
    return Assembly(shared, left, rows.to(dtype) @ s.A, cross @ rows.T, cross, energy)


def refined_adapter(assembly: Assembly, client: int, rank: int) -> tuple[LowRank, float]:
    """P Theta_k + P_perp M of one client at adapter rank ``rank``, and the relative error of the truncation.

    Balanced factors, scale 1, of inner dimension exactly ``rank``, padded with zeros. Best in Frobenius norm among the
    updates that use the directions of ``assembly``.
    """
    s, r = assembly.shared.stacked, assembly.shared.basis.shape[1]
    own = assembly.shared.stacked.owner == client
    inside = s.scales[client] * (assembly.shared.basis.T @ s.G_B[:, own])  # U' Theta_k = inside @ A_k
    corner = inside @ assembly.cross[:, own].T
    upper = torch.cat([inside @ s.G_A[own][:, own] @ inside.T, corner], dim=1)
    gram = torch.cat([upper, torch.cat([corner.T, assembly.gram], dim=1)])  # of the rows of [U' Theta_k; Q' M]
    values, E = torch.linalg.eigh(gram)
    keep = min(rank, len(values))
    values, E = values.flip(0)[:keep].clamp(min=0.0), E.flip(1)[:, :keep]
    root = values.sqrt()
    up = torch.where(root > 0, root.rsqrt(), 0.0)
    dtype = s.B.dtype
    B, A = s.B.new_zeros(s.B.shape[0], rank), s.A.new_zeros(rank, s.A.shape[1])
    B[:, :keep] = assembly.left @ (E * root.sqrt()).to(dtype)
    weights = (E * up).T  # rows of A: up' [U' Theta_k; Q' M]
    A[:keep] = (weights[:, :r] @ inside).to(dtype) @ s.A[own] + weights[:, r:].to(dtype) @ assembly.outside
    total = float(gram[:r, :r].trace()) + assembly.energy
    error = max(total - float(values.sum()), 0.0) / total if total > 0 else 0.0
    return LowRank(B, A), error**0.5
