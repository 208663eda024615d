"""Planted clients of the shared-subspace model, some of them contaminated, with their ground truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from clairlib.linalg.subspace import project_out
from clairlib.simulate.attacks import ATTACKS, Model, check_kind, coefficients, random_common_part, random_frame


@dataclass(frozen=True)
class Planted:
    """Planted clients and their ground truth.

    ``updates`` (K, p, q) are ``targets`` plus estimation noise, whose standard deviation per entry is ``noise_std`` for
    a client of weight 1. ``benign`` is (K,) bool, ``basis`` U (p, r) and ``common_part`` M (p, q).
    """

    updates: Tensor
    targets: Tensor
    benign: Tensor
    basis: Tensor
    common_part: Tensor
    noise_std: float

    @property
    def rank(self) -> int:
        """Dimension r of the shared subspace."""
        return self.basis.shape[1]


def _heterogeneity(basis: Tensor, K: int, q: int, size: float, rank: int | None, generator: Generator) -> Tensor:
    """Draw client differences H_k (K, p, q) off the subspace, of Frobenius norm ``size`` and this or full rank."""
    p = len(basis)
    H = torch.randn(K, p, q, generator=generator, dtype=torch.float64)
    if rank is not None:
        H = H[:, :, :rank] @ torch.randn(K, rank, q, generator=generator, dtype=torch.float64)
    H = project_out(basis, H)
    return H * (size / torch.linalg.matrix_norm(H)[:, None, None]) if size > 0 else torch.zeros_like(H)


def planted(
    contamination: str = "unstructured", *, share: float = 0.3, K: int = 24, p: int = 50, q: int = 10, r: int = 3,
    noise_std: float = 0.1 / 10**0.5, common_norm: float = 1.0, heterogeneity: float = 0.0,
    heterogeneity_rank: int | None = None, strength: float = 1.0, row_correlation: float = 0.0,
    weights: Tensor | None = None, generator: Generator,
) -> Planted:  # fmt: skip
    """Draw K clients that follow the shared-subspace model, and contaminate a fraction of them.

    A benign client has the target Theta_k = M + U A_k + H_k. Each row of A_k has unit expected squared norm, ||M||_F is
    ``common_norm``, and ||P_perp H_k||_F is ``heterogeneity``. The estimation noise is Gaussian with standard deviation
    ``noise_std`` per entry. round(share * K) clients at random places are contaminated.

    Parameters
    ----------
    contamination : str
        A key of `clairlib.simulate.attacks.ATTACKS`.
    share : float
        Contaminated fraction of the clients, in [0, 1).
    K, p, q, r : int
        Number of clients, rows (output side), columns, and dimension of the shared subspace.
    heterogeneity_rank : int, optional
        Rank of every H_k; full rank if not given.
    strength : float
        Position of a contaminated client between its honest update (0) and the attack (1).
    row_correlation : float in (-1, 1)
        Two entries i, j of a column have estimation noise of correlation ``row_correlation ** |i - j|``.
    weights : Tensor (K,), optional
        The estimation noise of client k has the standard deviation ``noise_std / sqrt(weights[k])``.

    Raises
    ------
    ValueError
        The kind is unknown, r > p, or ``share``, ``heterogeneity_rank`` or ``row_correlation`` is out of range.
    """
    check_kind(contamination)
    if not 0 <= share < 1:
        raise ValueError(f"share must lie in [0, 1); got {share}")
    if heterogeneity_rank is not None and not 1 <= heterogeneity_rank <= q:
        raise ValueError(f"heterogeneity_rank must lie in 1 .. q = {q}; got {heterogeneity_rank}")
    if not -1 < row_correlation < 1:
        raise ValueError(f"row_correlation must lie in (-1, 1); got {row_correlation}")
    if r > p or (r == p and heterogeneity > 0):
        raise ValueError(f"a subspace of dimension r = {r} leaves no room in p = {p} rows")
    basis = random_frame(p, r, generator=generator)
    M = random_common_part(p, q, common_norm, generator=generator)
    targets = M + basis @ coefficients(K, r, q, generator=generator)
    targets = targets + _heterogeneity(basis, K, q, heterogeneity, heterogeneity_rank, generator)
    bad = torch.randperm(K, generator=generator)[: round(share * K)]
    if len(bad):
        sent = ATTACKS[contamination](targets, bad, Model(r, common_norm), generator)
        targets[bad] = torch.lerp(targets[bad], sent, strength)
    errors = torch.randn(K, p, q, generator=generator, dtype=torch.float64)
    if row_correlation:
        steps = torch.arange(p, dtype=torch.float64)
        errors = torch.linalg.cholesky(row_correlation ** (steps[:, None] - steps).abs()) @ errors
    if weights is not None:
        errors = errors * weights.double().rsqrt()[:, None, None]
    updates = targets + noise_std * errors
    benign = torch.ones(K, dtype=torch.bool)
    benign[bad] = False
    return Planted(updates, targets, benign, basis, M, noise_std)
