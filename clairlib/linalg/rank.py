"""Rank estimates: how many directions stand above the noise, by gap, ratio, held-out energy or rounding."""

import numpy as np
from torch import Tensor

EDGE_SPAN = 8  # number of eigenvalues below the candidate rank to which the edge of the noise spectrum is fitted
ROUNDING = 1e-13  # eigenvalues of a scatter below this fraction of the largest are rounding
FLOAT32_ROUNDING = 1e-6  # singular values below this fraction of the largest may be rounding of a product of factors
HELD_OUT_WINDOW = 16  # number of following directions with which a direction is compared
HELD_OUT_SNR = 2.0
EDGE_FACTOR = 2.5  # a gap counts if it exceeds this many fitted slopes; Onatski uses span 5 and factor 2


def numerical_ranks(squares: Tensor) -> Tensor:
    """Return the numerical ranks (n,) of products of factors, from their squared singular values (n, m), descending."""
    return (squares > squares[:, :1] * FLOAT32_ROUNDING**2).sum(dim=1)


def gap_rank(eigenvalues: Tensor, limit: int) -> int:
    """Return the number of directions that a gap in a scatter's spectrum separates from the noise; 0 without a gap.

    ``eigenvalues`` are squared singular values, descending, without those that are zero. ``limit`` is the largest rank
    to return. The method is Onatski's edge distribution estimator (Review of Economics and Statistics 92, 2010). Near
    its edge, the spectrum of noise falls like j^(2/3), whatever the noise's level and covariance. The slope of this
    fall is fitted below the candidate rank, and the rank is the last position where consecutive eigenvalues differ by
    more than ``EDGE_FACTOR`` slopes. This is repeated until the candidate stays.
    """
    values = eigenvalues.clamp(min=0.0).cpu().numpy()
    limit = min(limit, len(values) - 1)
    gaps = values[:limit] - values[1 : limit + 1]
    rank, candidate = 0, limit
    for _ in range(10):
        start = min(candidate, len(values) - EDGE_SPAN)
        if start < 0 or limit < 1:
            return 0
        places = (np.arange(start, start + EDGE_SPAN) + 1.0) ** (2 / 3)
        places -= places.mean()
        slope = abs(places @ values[start : start + EDGE_SPAN]) / (places @ places)  # slope of ordinary least squares
        apart = np.flatnonzero(gaps > EDGE_FACTOR * slope + ROUNDING * values[0])
        rank = int(apart[-1]) + 1 if len(apart) else 0
        if rank == candidate:
            break
        candidate = rank
    return rank


def estimate_rank(eigenvalues: Tensor, limit: int) -> int:
    """Return the rank of the shared subspace: the gap of `gap_rank`, else the largest ratio of consecutive eigenvalues.

    The ratio (Ahn and Horenstein, Econometrica 81, 2013) is taken in the first quarter of the spectrum. It prefers a
    low rank, because every superfluous direction lets an unrelated client pass for a member. The result is at least 1
    unless all eigenvalues or ``limit`` are zero.
    """
    limit = min(limit, len(eigenvalues))
    rank = gap_rank(eigenvalues, limit)
    values = np.append(eigenvalues.clamp(min=0.0).cpu().numpy(), 0.0)
    if rank or limit < 1 or values[0] == 0:
        return rank
    head = max(1, min(limit, len(values) // 4))
    return int(np.argmax(values[:head] / np.maximum(values[1 : head + 1], ROUNDING * values[0]))) + 1


def held_out_rank(energies: Tensor, limit: int) -> int:
    """Return the number of leading directions in which held-out clients vary as the other clients predict; may be 0.

    ``energies`` (p,) is the mean energy of a held-out client in each principal direction of the other clients,
    descending. A direction fitted to noise holds no more of another client than the following directions do. Directions
    count as long as their energy exceeds ``HELD_OUT_SNR`` times the median of the next ``HELD_OUT_WINDOW``. Beyond this
    point the noise in a direction exceeds its signal, and a client loses less by averaging the direction out. More than
    ``HELD_OUT_WINDOW`` / 2 directions raise the median and hide themselves.
    """
    values, rank = energies.cpu(), 0
    while rank < min(limit, len(values) - 1):
        if values[rank] <= HELD_OUT_SNR * values[rank + 1 : rank + 1 + HELD_OUT_WINDOW].median():
            break
        rank += 1
    return rank


def resolved_rank(eigenvalues: Tensor) -> int:
    """Return the number of eigenvalues of a scatter, descending, above rounding: its numerical rank."""
    return int((eigenvalues > ROUNDING * eigenvalues[:1]).sum())
