"""Effective dimensions and degrees of freedom of the estimation noise in residuals."""

from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

SharedBlock = tuple[int, int]  # rows, columns


@dataclass(frozen=True)
class EffectiveDimensions:
    """Distribution of the noise in residuals ``R`` (n, p, q) over rows and columns.

    The first ``shared_block`` rows and columns are coordinates of all n clients (None: all); the rest are each client's
    own. A covariance C has (tr C)^2 / tr C^2 effective dimensions. Of N samples, tr C^2 is corrected by (tr C)^2 / N.
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
        """Return effective rows and columns of all clients together; ``clients`` replaces n if a fit used up some."""
        n = float(len(self.R) if clients is None else clients)
        return _corrected(*self.dimensions, *self.concentrations, n, n)

    def degrees_of_freedom(self, squares: Tensor) -> float:
        """Return Satterthwaite's degrees of freedom of one client's residual energy: effective rows times columns.

        One side is estimated over all clients together and the other within each client, because the noise of a
        low-rank adapter is confined to few directions, which differ between clients; the smaller product is returned.
        For isotropic noise it is (p - r) q. ``squares`` (n, min(p, q)) are squared singular values of R.
        """
        trace = squares.sum(dim=1).clamp(min=torch.finfo(squares.dtype).tiny)
        within = float((squares.square().sum(dim=1) / trace.square()).mean())
        n, (p, q) = len(self.R), self.dimensions
        rows, columns = self.concentrations
        by_rows = _corrected(p, min(q, self.R.shape[2]), rows, within, n, 1)
        by_columns = _corrected(q, min(p, self.R.shape[1]), columns, within, n, 1)
        return min(prod(by_rows), prod(by_columns))

    @property
    def _shared_block(self) -> SharedBlock:
        return self.shared_block or (self.R.shape[1], self.R.shape[2])


def _corrected(p: int, q: int, of_rows: float, of_columns: float, n: float, m: float) -> tuple[float, float]:
    """Return effective rows and columns from tr C^2 / (tr C)^2 of n times columns and m times rows samples."""
    rows, columns = float(p), float(q)
    for _ in range(20):
        columns = min(q, 1 / max(of_columns - 1 / (m * rows), 1 / q))
        rows = min(p, 1 / max(of_rows - 1 / (n * columns), 1 / p))
    return rows, columns


def _concentration(R: Tensor, rows: int) -> float:
    """Return tr C^2 / (tr C)^2 of the row covariance C of residuals (n, p, q), whose first ``rows`` rows are shared."""
    shared, own = R[:, :rows], R[:, rows:]
    C = torch.einsum("kpq,krq->pr", shared, shared)
    square, trace = C.square().sum(), C.trace()
    if own.shape[1]:  # own rows: one further diagonal block of C per client
        square = square + 2 * (shared @ own.mT).square().sum() + (own @ own.mT).square().sum()
        trace = trace + own.square().sum()
    return float(square / trace.square().clamp(min=torch.finfo(R.dtype).tiny))
