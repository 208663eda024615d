"""Entrywise robust PCA (principal component pursuit): a matrix as a low-rank plus a sparse matrix."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_ITERATIONS = 1000
TOLERANCE = 1e-6


def robust_pca(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Split ``matrix`` X (m, n) into L + S, minimising ||L||_* + lam sum_ij |S_ij| with lam = 1 / sqrt(max(m, n)).

    The weight lam and the algorithm are those of Candes, Li, Ma, Wright (J. ACM 2011): alternating directions with the
    penalty mu = m n / (4 sum_ij |X_ij|). The iteration stops at a residual of ``TOLERANCE`` relative to X, or after
    ``MAX_ITERATIONS``. S then takes the residual, so the sum is exact. The minimiser need not be unique.
    """
    X = matrix.double()
    m, n = X.shape
    total = float(X.abs().sum())
    if total == 0:
        return X, X.clone()
    lam, mu = max(m, n) ** -0.5, m * n / (4 * total)
    S, scaled_dual = torch.zeros_like(X), torch.zeros_like(X)  # the multiplier over mu
    for _ in range(MAX_ITERATIONS):
        L = _shrink_singular_values(X - S + scaled_dual, 1 / mu)
        S = torch.nn.functional.softshrink(X - L + scaled_dual, lam / mu)
        residual = X - L - S
        scaled_dual = scaled_dual + residual
        if residual.norm() <= TOLERANCE * X.norm():
            break
    return L, X - L


def _shrink_singular_values(matrix: Tensor, amount: float) -> Tensor:
    """Reduce all singular values by ``amount``, but not below zero, by the Gram matrix of the shorter side."""
    if matrix.shape[0] < matrix.shape[1]:
        return _shrink_singular_values(matrix.T, amount).T
    squares, V = torch.linalg.eigh(matrix.T @ matrix)
    values = squares.clamp(min=0.0).sqrt()
    factors = torch.where(values > amount, 1 - amount / values.clamp(min=amount), 0.0)
    return matrix @ (V * factors) @ V.T
