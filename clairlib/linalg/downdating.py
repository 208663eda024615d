"""Leading subspaces of a scatter that has lost one client, for every client in turn."""

from __future__ import annotations

from math import acosh, ceil

import torch
from torch import Tensor

GUARD = 5  # directions iterated on beyond those wanted
DEGREE = 14  # of the filter polynomial, at most
ROUNDS = 2
LEAST_RATIO = 1.35  # of the last wanted eigenvalue to the first filtered one: below, iterating costs more than it saves
CONVERGED = 1e-11  # residual over the gap, which bounds the angle to the exact subspace


def downdated_bases(values: Tensor, loads: Tensor, rank: int) -> Tensor:
    """Orthonormal bases (n, p, r) of the leading subspaces of S - E_k E_k', in the coordinates of S's eigenvectors.

    Subspace iteration from the leading eigenvectors of S, filtered by Chebyshev polynomials (Zhou and Saad 2007), with
    a Rayleigh-Ritz step after each: no eigenvalue of S - E_k E_k' exceeds that of S in the same place, so S's own next
    eigenvalue bounds what has to be damped. A client for which the residual does not show an angle below ``CONVERGED``
    goes to a full eigendecomposition, so the result never depends on how well the iteration went.

    Parameters
    ----------
    values : Tensor (p,)
        Eigenvalues of S, descending, not negative.
    loads : Tensor (n, p, q)
        E_k: what client k brings to the scatter. S - E_k E_k' is positive semidefinite.
    rank : int
        r, in 0 .. p.
    """
    p, width = len(values), min(len(values), rank + GUARD)
    if rank == 0 or width == p or float(values[rank - 1]) < LEAST_RATIO * float(values[width]):
        return _exact(values, loads, rank)
    Q = torch.eye(p, width, dtype=loads.dtype, device=loads.device).expand(len(loads), p, width)
    for _ in range(ROUNDS):
        Q = torch.linalg.qr(_filtered(values, loads, Q, rank, float(values[width])))[0]
        image = _apply(values, loads, Q)
        ritz, W = torch.linalg.eigh(Q.mT @ image)
        Q, image = Q @ W, image @ W
        residual = image[..., -rank:] - Q[..., -rank:] * ritz[:, None, -rank:]
        angles = torch.linalg.matrix_norm(residual) / (ritz[:, -rank] - ritz[:, -rank - 1])
        missed = ~(angles <= CONVERGED)  # not a number where the two coincide
        if not bool(missed.any()):
            return Q[..., -rank:]
    bases = Q[..., -rank:].clone()
    bases[missed] = _exact(values, loads[missed], rank)
    return bases


def held_out_energies(values: Tensor, loads: Tensor) -> Tensor:
    """Energy (p,) that a client has in each principal direction of the others, mean over clients; as `downdated_bases`.

    Directions of S - E_k E_k', by descending eigenvalue, are those of the other clients; E_k is measured in them.
    """
    directions = _exact(values, loads, len(values)).flip(2)
    return (directions.mT @ loads).square().sum(dim=2).mean(dim=0)


def _apply(values: Tensor, loads: Tensor, Q: Tensor) -> Tensor:
    """(diag(values) - E_k E_k') Q_k."""
    return torch.baddbmm(values[:, None] * Q, loads, loads.mT @ Q, alpha=-1)


def _degree(wanted: float, bound: float) -> int:
    """The least d, at most ``DEGREE``, with which ``wanted`` grows to 1 / ``CONVERGED`` times all up to ``bound``."""
    return min(DEGREE, ceil(acosh(1 / CONVERGED) / acosh(2 * wanted / bound - 1)))


def _filtered(values: Tensor, loads: Tensor, Q: Tensor, rank: int, bound: float) -> Tensor:
    """T_d(2 M_k / bound - 1) Q_k with columns of unit norm; M_k Q_k where the spectrum ends before ``bound``."""
    if bound <= torch.finfo(loads.dtype).eps * float(values[0]):
        return _apply(values, loads, Q)
    shifted, loads = 2 * values / bound - 1, loads * (2 / bound) ** 0.5
    before, Q = Q, _apply(shifted, loads, Q)
    shifted, loads = 2 * shifted, loads * 2**0.5
    for _ in range(_degree(float(values[rank - 1]), bound) - 1):
        before, Q = Q, _apply(shifted, loads, Q).sub_(before)
    return Q / torch.linalg.vector_norm(Q, dim=1, keepdim=True)


def _exact(values: Tensor, loads: Tensor, rank: int) -> Tensor:
    return torch.linalg.eigh(torch.diag(values) - loads @ loads.mT)[1][..., len(values) - rank :]
