"""Effective dimensions and degrees of freedom of the noise in residuals.

Of residuals (n, p, q) the first ``common`` rows and columns are coordinates of all clients, the rest each client's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

Common = tuple[int, int]  # rows, columns


def effective_dimensions(
    R: Tensor, common: Common | None = None, clients: float | None = None
) -> tuple[float, float]:
    """Effective rows and columns of residuals (n, p, q) of all clients together.

    A covariance C has (tr C)^2 / tr C^2 effective dimensions. Seen through N samples, tr C^2 is too large by
    (tr C)^2 / N; the rows are seen through n times the effective columns, the columns through n times the effective
    rows, and both are corrected for it. ``clients`` takes the place of n where a fit to these clients has used some up.
    """
    common = common or (R.shape[1], R.shape[2])
    p, q = _dimensions(R, common)
    n = float(len(R) if clients is None else clients)
    across_rows, across_columns = _concentration(R, common[0]), _concentration(R.mT, common[1])
    rows, columns = float(p), float(q)
    for _ in range(20):
        columns = min(q, 1 / max(across_columns - 1 / (n * rows), 1 / q))
        rows = min(p, 1 / max(across_rows - 1 / (n * columns), 1 / p))
    return rows, columns


def _dimensions(R: Tensor, common: Common) -> Common:
    """Rows and columns of all clients together: what is common, and each client's own."""
    rows, columns = common
    size = R.abs()
    own_rows, own_columns = size[:, rows:].amax(dim=2) > 0, size[:, :, columns:].amax(dim=1) > 0
    return rows + int(own_rows.sum()), columns + int(own_columns.sum())


def degrees_of_freedom(R: Tensor, common: Common) -> float:
    """Satterthwaite's degrees of freedom of one client's residual energy: effective rows times effective columns.

    One side is taken over all clients together, the other within each client, whichever way gives fewer: the noise of a
    low-rank adapter is confined to few directions, other ones than its neighbours'. Corrected for sampling as in
    ``effective_dimensions``; (p - r) q for isotropic noise.
    """
    within = R.mT @ R if R.shape[2] <= R.shape[1] else R @ R.mT
    trace = within.diagonal(dim1=1, dim2=2).sum(dim=1).clamp(min=torch.finfo(R.dtype).tiny)
    inside = float((within.square().sum(dim=(1, 2)) / trace.square()).mean())
    return min(_freedom(R, inside, common), _freedom(R.mT, inside, common[::-1]))


def _freedom(R: Tensor, inside: float, common: Common) -> float:
    """Effective rows over all clients times effective columns within a client, tr C^2 / (tr C)^2 ``inside`` it."""
    n, (p, q) = len(R), _dimensions(R, common)
    q = min(q, R.shape[2])
    across = _concentration(R, common[0])
    rows, columns = float(p), float(q)
    for _ in range(20):
        columns = min(q, 1 / max(inside - 1 / rows, 1 / q))
        rows = min(p, 1 / max(across - 1 / (n * columns), 1 / p))
    return rows * columns


def _concentration(R: Tensor, rows: int) -> float:
    """tr C^2 / (tr C)^2 of the row covariance C of residuals (n, p, q), of which ``rows`` rows are in common."""
    shared, own = R[:, :rows], R[:, rows:]
    C = torch.einsum("kpq,krq->pr", shared, shared)
    square, trace = C.square().sum(), C.trace()
    if own.shape[1]:  # a block for every client
        square = square + 2 * (shared @ own.mT).square().sum() + (own @ own.mT).square().sum()
        trace = trace + own.square().sum()
    return float(square / trace.square().clamp(min=torch.finfo(R.dtype).tiny))
