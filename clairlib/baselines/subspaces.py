"""Robust subspace estimators of the statistical literature, which CLAIR is compared with.

Each takes client updates (K, p, q) and the rank r, and returns an orthonormal basis (p, r), unique up to rotation. None
estimates the rank or identifies contaminated clients. `outlier_pursuit` and `tyler` treat each column as a point and
have no common part M: give them updates without M, `pair_differences`, or updates after `centre`.
"""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor

from clairlib.baselines.weights import geometric_median
from clairlib.linalg.subspace import project_out
from clairlib.recovery.convex import decompose
from clairlib.recovery.frame import fit_frame, floor_energy

ITERATIONS = 300
TYLER_ITERATIONS = 150
STILL = 1e-10  # relative change at which a fixed-point iteration stops
SMALLEST = 1e-14  # least eigenvalue of Tyler's matrix relative to its largest; exact inliers drive it to zero


def pair_differences(updates: Tensor) -> Tensor:
    """Return the differences X_j - X_k of all pairs, (K (K-1) / 2, p, q), in which the common part M cancels.

    With a fraction c of contaminated clients, about (1 - c)^2 of the differences are between benign clients.
    """
    first, second = torch.tensor(list(combinations(range(len(updates)), 2))).T
    return updates[first] - updates[second]


def leading_basis(blocks: Tensor, rank: int) -> Tensor:
    """Return the ``rank`` leading left singular vectors (p, rank) of the blocks side by side."""
    wide = blocks.permute(1, 0, 2).flatten(1)  # (p, K*q)
    return torch.linalg.svd(wide, full_matrices=False).U[:, :rank]


def pca(updates: Tensor, rank: int) -> Tensor:
    """Return the principal components of all clients about their mean, which is not robust at all."""
    return leading_basis(updates - updates.mean(dim=0), rank)


def outlier_pursuit(updates: Tensor, rank: int) -> Tensor:
    """Column Outlier Pursuit (Xu, Caramanis, Sanghavi, arXiv:1010.4237): each column of each client is a point.

    It minimises ||L||_* + lam sum_j ||c_j||_2 over X = L + C with n = K q columns. The lam is 1 / sqrt(log n) (Zhang,
    Lin, Zhang, AAAI 2015). Xu et al. use 3 / (7 sqrt(c n)) for a contaminated fraction c. For c above (3/7)^2 that is
    below 1 / sqrt(n), where L = 0 is optimal.
    """
    columns = updates.permute(0, 2, 1).flatten(0, 1)[:, :, None]  # (K*q, p, 1)
    lam = 1 / math.sqrt(math.log(len(columns)))
    return leading_basis(decompose(columns, lam=lam, with_common=False).low_rank, rank)


def block_fms(updates: Tensor, rank: int) -> Tensor:
    """Affine fast median subspace with one point per client: iteratively reweighted PCA with weights 1 / distance.

    It descends sum_k ||P_perp (X_k - m)||_F (Lerman and Maunu, arXiv:1706.03896; affine with the weighted mean m,
    arXiv:2506.20533). The problem is not convex, and the result depends on the start, the PCA of all clients.
    """
    everyone = torch.ones(len(updates), dtype=torch.bool)
    X, weights, last = updates.double(), torch.ones(len(updates), dtype=torch.float64), math.inf
    for _ in range(ITERATIONS):
        frame = fit_frame(X, weights, everyone, rank)
        squares = project_out(frame.basis, X - frame.mean).square().sum(dim=(1, 2))
        weights = squares.clamp(min=floor_energy(X)).rsqrt()
        weights, value = weights / weights.mean(), float(squares.sqrt().sum())
        if last - value <= STILL * value:
            break
        last = value
    return frame.basis


def tyler(updates: Tensor, rank: int) -> Tensor:
    """Return the leading eigenvectors of Tyler's M-estimator of scatter over the columns (Zhang, arXiv:1206.1386).

    They are exact if over r / p of the columns lie in the subspace and the others are in general position.
    """
    return torch.linalg.eigh(tyler_scatter(updates.double().permute(1, 0, 2).flatten(1))).eigenvectors.flip(1)[:, :rank]


def tyler_scatter(points: Tensor, iterations: int = TYLER_ITERATIONS) -> Tensor:
    """Compute Tyler's scatter (p, p) of n points (p, n): Sigma = (p / n) sum_j x_j x_j' / (x_j' Sigma^-1 x_j), trace p.

    The fixed-point iteration starts from the identity. If too many points lie in a subspace, no solution exists. The
    iteration then tends to a matrix supported on that subspace, and its other eigenvalues are held at ``SMALLEST``.
    """
    p, points = len(points), points[:, points.norm(dim=0) > 0]
    scatter = torch.eye(p, dtype=points.dtype)
    for _ in range(iterations):
        values, vectors = torch.linalg.eigh(scatter)
        whitened = (vectors.T @ points) / values.clamp(min=SMALLEST * float(values[-1])).sqrt()[:, None]
        scaled = points / whitened.norm(dim=0)
        updated = scaled @ scaled.T
        updated = updated * (p / updated.trace())
        moved = float((updated - scatter).norm() / scatter.norm())
        scatter = updated
        if moved < STILL:
            break
    return scatter


def centre(updates: Tensor) -> Tensor:
    """Subtract the geometric median from the updates, which removes the common part up to the median's error."""
    return updates.double() - geometric_median(updates)


def median_pca(updates: Tensor, rank: int) -> Tensor:
    """PCA of all clients about their geometric median, each scaled to norm one (spherical PCA on blocks)."""
    D = centre(updates)
    sizes = torch.linalg.matrix_norm(D)[:, None, None]
    return leading_basis(D / sizes.clamp(min=floor_energy(D) ** 0.5), rank)
