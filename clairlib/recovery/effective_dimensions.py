"""Effective dimensions and degrees of freedom of the estimation noise in residuals."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

SharedBlock = tuple[int, int]  # rows, columns


@dataclass(frozen=True)
class EffectiveDimensions:
    """Distribution of the noise in residuals ``R`` (n, p, q) over rows and columns.

    The first ``shared_block`` rows and columns are coordinates of all n clients; the rest are each client's own. None
    means that all rows and columns are coordinates of all clients. A covariance C has (tr C)^2 / tr C^2 effective
    dimensions. If C is estimated from N samples, tr C^2 is too large by (tr C)^2 / N; both effective dimensions are
    corrected for this.
    """

    R: Tensor
    shared_block: SharedBlock | None = None

    @cached_property
    def dimensions(self) -> SharedBlock:
        """Number of rows and columns of all clients together: those in the shared block, and each client's own."""
        rows, columns = self._shared_block
        size = self.R.abs()
        own_rows, own_columns = size[:, rows:].amax(dim=2) > 0, size[:, :, columns:].amax(dim=1) > 0
        return rows + int(own_rows.sum()), columns + int(own_columns.sum())

    @cached_property
    def concentrations(self) -> tuple[float, float]:
        """tr C^2 / (tr C)^2 of the row covariance and of the column covariance, over all clients."""
        return _concentration(self.R, self._shared_block[0]), _concentration(self.R.mT, self._shared_block[1])

    def effective_dimensions(self, clients: float | None = None) -> tuple[float, float]:
        """Return the effective rows and columns of all clients together.

        The row covariance is estimated from n times (effective columns) samples, the column covariance from n times
        (effective rows) samples. ``clients`` replaces n if a fit to these clients has used up some of them.
        """
        (p, q), (across_rows, across_columns) = self.dimensions, self.concentrations
        n = float(len(self.R) if clients is None else clients)
        rows, columns = float(p), float(q)
        for _ in range(20):
            columns = min(q, 1 / max(across_columns - 1 / (n * rows), 1 / q))
            rows = min(p, 1 / max(across_rows - 1 / (n * columns), 1 / p))
        return rows, columns

    def degrees_of_freedom(self, squares: Tensor) -> float:
        """Return Satterthwaite's degrees of freedom of one client's residual energy: effective rows times columns.

        One side is estimated over all clients together and the other within each client; the smaller of the two
        products is returned. The reason is that the noise of a low-rank adapter is confined to few directions, which
        differ between clients. For isotropic noise the result is (p - r) q. ``squares`` (n, min(p, q)) are the squared
        singular values of the residuals.
        """
        trace = squares.sum(dim=1).clamp(min=torch.finfo(squares.dtype).tiny)
        within = float((squares.square().sum(dim=1) / trace.square()).mean())
        n, (p, q) = len(self.R), self.dimensions
        rows, columns = self.concentrations
        return min(
            _freedom(n, p, min(q, self.R.shape[2]), rows, within),
            _freedom(n, q, min(p, self.R.shape[1]), columns, within),
        )

    @property
    def _shared_block(self) -> SharedBlock:
        return self.shared_block or (self.R.shape[1], self.R.shape[2])


def _freedom(n: int, p: int, q: int, across: float, within: float) -> float:
    """Return effective rows over all n clients times effective columns within a client.

    ``across`` and ``within`` are tr C^2 / (tr C)^2 of the two covariances.
    """
    rows, columns = float(p), float(q)
    for _ in range(20):
        columns = min(q, 1 / max(within - 1 / rows, 1 / q))
        rows = min(p, 1 / max(across - 1 / (n * columns), 1 / p))
    return rows * columns


def _concentration(R: Tensor, rows: int) -> float:
    """Return tr C^2 / (tr C)^2 of the row covariance C of residuals (n, p, q), whose first ``rows`` rows are shared."""
    shared, own = R[:, :rows], R[:, rows:]
    C = torch.einsum("kpq,krq->pr", shared, shared)
    square, trace = C.square().sum(), C.trace()
    if own.shape[1]:  # own rows: one further diagonal block of C per client
        square = square + 2 * (shared @ own.mT).square().sum() + (own @ own.mT).square().sum()
        trace = trace + own.square().sum()
    return float(square / trace.square().clamp(min=torch.finfo(R.dtype).tiny))
