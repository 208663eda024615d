"""Subspaces: projections, angles between subspaces, and singular values."""

import torch
from torch import Tensor


def project_out(basis: Tensor, matrix: Tensor) -> Tensor:
    """Return P_perp X = X - U U' X for an orthonormal basis U (..., p, r) and X (..., p, q)."""
    return matrix - basis @ (basis.mT @ matrix)


def sin_theta(first: Tensor, second: Tensor) -> float:
    """Return the sine of the largest principal angle between two subspaces, ||P_perp(second) first||_2, in [0, 1].

    ``first`` (p, r) and ``second`` (p, r') are orthonormal bases, which are unique up to rotation only. The result is 1
    if the dimensions differ. It comes from the residual, not the arc cosine, so it is accurate for small angles.
    """
    if first.shape[1] != second.shape[1]:
        return 1.0
    if first.shape[1] == 0:
        return 0.0
    return min(1.0, float(torch.linalg.matrix_norm(project_out(second, first), ord=2)))


def squared_singular_values(X: Tensor) -> Tensor:
    """Return the squared singular values (n, min(p, q)) of matrices (n, p, q), descending."""
    gram = X.mT @ X if X.shape[2] <= X.shape[1] else X @ X.mT
    return torch.linalg.eigvalsh(gram).flip(1).clamp(min=0.0)
