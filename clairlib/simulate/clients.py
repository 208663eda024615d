"""Planted clients: updates that follow the shared-subspace model, contaminated ones among them, and the truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from clairlib.linalg.subspace import project_out
from clairlib.simulate.attacks import ATTACKS, Model, check_kind, coefficients, random_common_part, random_frame


@dataclass(frozen=True)
class Planted:
    """Planted clients and what they were made of.

    ``updates`` (K, p, q) = ``targets`` + noise; ``benign`` (K,) bool; ``basis`` U (p, r); ``common_part`` M (p, q);
    ``noise_std`` the standard deviation of each entry's noise.
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
    """H_k (K, p, q), off the subspace, each of Frobenius norm ``size`` and of full rank or the one given."""
    p = len(basis)
    H = torch.randn(K, p, q, generator=generator, dtype=torch.float64)
    if rank is not None:
        H = H[:, :, :rank] @ torch.randn(K, rank, q, generator=generator, dtype=torch.float64)
    H = project_out(basis, H)
    return H * (size / torch.linalg.matrix_norm(H)[:, None, None]) if size > 0 else torch.zeros_like(H)


def _colouring(p: int, correlation: float) -> Tensor:
    """Cholesky factor (p, p) of the covariance correlation^|i - j|."""
    steps = torch.arange(p, dtype=torch.float64)
    return torch.linalg.cholesky(correlation ** (steps[:, None] - steps).abs())


def planted(
    contamination: str = "unstructured",
    *,
    share: float = 0.3,
    K: int = 24,
    p: int = 50,
    q: int = 10,
    r: int = 3,
    noise_std: float = 0.1 / 10**0.5,
    common_norm: float = 1.0,
    heterogeneity: float = 0.0,
    heterogeneity_rank: int | None = None,
    strength: float = 1.0,
    row_correlation: float = 0.0,
    weights: Tensor | None = None,
    generator: Generator,
) -> Planted:
    """K clients that follow the shared-subspace model, a share of them contaminated.

    Benign: Theta_k = M + U A_k + H_k. Each row of A_k has unit expected squared norm, ||M||_F = ``common_norm`` and
    ||P_perp H_k||_F = ``heterogeneity``; noise is Gaussian with standard deviation ``noise_std`` per entry.
    The contaminated clients, round(share * K) of them, stand at random places.

    Parameters
    ----------
    contamination : str
        A key of `clairlib.simulate.attacks.ATTACKS`.
    share : float
        Contaminated share of the clients, in [0, 1).
    K, p, q, r : int
        Clients, rows (output side), columns, rank of the shared subspace.
    heterogeneity_rank : int, optional
        Rank of every H_k; full where None.
    strength : float
        Part of the way that a contaminated client goes from its honest update to the contaminated one.
    row_correlation : float
        Coloured noise: entries of a column have correlation ``row_correlation ** |i - j|``, in (-1, 1).
    weights : Tensor (K,), optional
        Client k's noise has standard deviation ``noise_std / sqrt(weights[k])``.

    Raises
    ------
    ValueError
        For an unknown kind, r > p, or a share, heterogeneity_rank or row_correlation out of range.
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
        errors = _colouring(p, row_correlation) @ errors
    if weights is not None:
        errors = errors * weights.double().rsqrt()[:, None, None]
    updates = targets + noise_std * errors
    benign = torch.ones(K, dtype=torch.bool)
    benign[bad] = False
    return Planted(updates, targets, benign, basis, M, noise_std)
