"""How many directions of a spectrum stand above the noise: gap, ratio, held-out energy, rounding."""

from __future__ import annotations

import numpy as np
from torch import Tensor

EDGE_SPAN = 8  # eigenvalues below the candidate rank from which the edge of the noise is fitted
ROUNDING = 1e-13  # eigenvalues of a scatter below this part of the largest are rounding
FLOAT32_ROUNDING = 1e-6  # singular values below this part of the largest may be rounding of a product of factors
HELD_OUT_WINDOW = 16  # directions that a held-out direction is compared with
HELD_OUT_SNR = 2.0
EDGE_FACTOR = 2.5  # a gap counts when it exceeds this many fitted slopes; Onatski has span 5, factor 2


def numerical_ranks(squares: Tensor) -> Tensor:
    """Numerical ranks (n,) of products of factors with these squared singular values (n, m), descending."""
    return (squares > squares[:, :1] * FLOAT32_ROUNDING**2).sum(dim=1)

def gap_rank(eigenvalues: Tensor, limit: int) -> int:
    """Number of directions that stand apart from the noise, from the gap in a scatter's spectrum; 0 where none does.

    Onatski's edge distribution estimator (Review of Economics and Statistics 92, 2010): near its edge the spectrum of
    noise falls like j^(2/3), for isotropic and for coloured noise alike. The slope of that fall is fitted below the
    candidate rank, and the rank is the last place where consecutive eigenvalues differ by more than ``EDGE_FACTOR``
    slopes; repeated until the candidate stays. Nothing is assumed about the noise level or its covariance.

    Parameters
    ----------
    eigenvalues : Tensor
        Squared singular values, descending, without those that are zero.
    limit : int
        Largest rank to return.
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
        slope = abs(places @ values[start : start + EDGE_SPAN]) / (places @ places)  # of ordinary least squares
        apart = np.flatnonzero(gaps > EDGE_FACTOR * slope + ROUNDING * values[0])
        rank = int(apart[-1]) + 1 if len(apart) else 0
        if rank == candidate:
            break
        candidate = rank
    return rank

def estimate_rank(eigenvalues: Tensor, limit: int) -> int:
    """Rank of the shared subspace: the gap of ``gap_rank``, else the largest ratio of consecutive eigenvalues.

    The ratio, in the first quarter of the spectrum (Ahn and Horenstein, Econometrica 81, 2013), decides where no gap
    stands out or the spectrum is too short to fit one: a low rank, as every direction too many lets a stranger pass
    for a member. At least 1 unless all eigenvalues are zero or ``limit`` is.
    """
    limit = min(limit, len(eigenvalues))
    rank = gap_rank(eigenvalues, limit)
    values = np.append(eigenvalues.clamp(min=0.0).cpu().numpy(), 0.0)
    if rank or limit < 1 or values[0] == 0:
        return rank
    head = max(1, min(limit, len(values) // 4))
    return int(np.argmax(values[:head] / np.maximum(values[1 : head + 1], ROUNDING * values[0]))) + 1

def held_out_rank(energies: Tensor, limit: int) -> int:
    """Number of leading directions in which clients vary as others predict, judged on clients held out; may be 0.

    ``energies`` (p,) is what a client has, in the mean, in each principal direction of the other clients, descending.
    A direction that only looks large because it was fitted to its clients' noise holds no more of another one than its
    neighbours. Directions count as long as they hold ``HELD_OUT_SNR`` times the median of the next ``HELD_OUT_WINDOW``: from there on,
    the signal in a direction exceeds its noise, and a client does better to keep it than to average it out. Finds up
    to ``HELD_OUT_WINDOW`` / 2 of them; more than that hide one another.
    """
    values, rank = energies.cpu(), 0
    while rank < min(limit, len(values) - 1):
        if values[rank] <= HELD_OUT_SNR * values[rank + 1 : rank + 1 + HELD_OUT_WINDOW].median():
            break
        rank += 1
    return rank

def resolved_rank(eigenvalues: Tensor) -> int:
    """Number of eigenvalues of a scatter, descending, above rounding: its numerical rank."""
    return int((eigenvalues > ROUNDING * eigenvalues[:1]).sum())
