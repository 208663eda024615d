"""Leading subspaces of a scatter matrix after removal of one client, for every client in turn."""

from __future__ import annotations

from math import acosh, ceil

import torch
from torch import Tensor

GUARD = 5  # directions in the subspace iteration beyond those wanted
DEGREE = 14  # largest degree of the filter polynomial
ROUNDS = 2
# Ratio of the last wanted eigenvalue to the first filtered one, below which iterating costs more than it saves.
LEAST_RATIO = 1.35
CONVERGED = 1e-11  # residual over the spectral gap; it bounds the angle to the exact subspace


def downdated_bases(values: Tensor, loads: Tensor, rank: int) -> Tensor:
    """Return orthonormal bases (n, p, r) of the leading subspaces of S - E_k E_k', in the eigenvectors of S.

    The method is subspace iteration from the leading eigenvectors of S, filtered by Chebyshev polynomials (Zhou and
    Saad 2007), with a Rayleigh-Ritz step after each round. No eigenvalue of S - E_k E_k' exceeds that of S at the same
    position, so the next eigenvalue of S bounds the part of the spectrum that must be damped. If the residual of a
    client does not prove an angle below ``CONVERGED``, a full eigendecomposition is computed for this client. Therefore
    the accuracy of the result does not depend on the convergence of the iteration.

    Parameters
    ----------
    values : Tensor (p,)
        Eigenvalues of S, descending, not negative.
    loads : Tensor (n, p, q)
        E_k, in the eigenvectors of S: without client k the scatter is S - E_k E_k', which is positive semidefinite.
    rank : int
        r, in 0 .. p.
    """
    p, width = len(values), min(len(values), rank + GUARD)
    if rank == 0 or width == p or float(values[rank - 1]) < LEAST_RATIO * float(values[width]):
        return exact_bases(values, loads, rank)
    Q = torch.eye(p, width, dtype=loads.dtype, device=loads.device).expand(len(loads), p, width)
    for _ in range(ROUNDS):
        Q = torch.linalg.qr(_filtered(values, loads, Q, rank, float(values[width])))[0]
        image = _apply(values, loads, Q)
        ritz, W = torch.linalg.eigh(Q.mT @ image)
        Q, image = Q @ W, image @ W
        residual = image[..., -rank:] - Q[..., -rank:] * ritz[:, None, -rank:]
        angles = torch.linalg.matrix_norm(residual) / (ritz[:, -rank] - ritz[:, -rank - 1])
        # NaN if the two eigenvalues coincide. At or below the bound the direction sought may be one that is damped.
        missed = ~(angles <= CONVERGED) | (ritz[:, -rank] <= values[width])
        if not bool(missed.any()):
            return Q[..., -rank:]
    bases = Q[..., -rank:].clone()
    bases[missed] = exact_bases(values, loads[missed], rank)
    return bases


def held_out_energies(values: Tensor, loads: Tensor) -> Tensor:
    """Return the energy (p,) of a held-out client in each principal direction of the others, as a mean over clients.

    The principal directions of the other clients are the eigenvectors of S - E_k E_k', by descending eigenvalue; the
    energy is that of E_k. Arguments as for `downdated_bases`.
    """
    directions = exact_bases(values, loads, len(values)).flip(2)
    return (directions.mT @ loads).square().sum(dim=2).mean(dim=0)


def _apply(values: Tensor, loads: Tensor, Q: Tensor) -> Tensor:
    """Return (diag(values) - E_k E_k') Q_k."""
    return torch.baddbmm(values[:, None] * Q, loads, loads.mT @ Q, alpha=-1)


def _degree(wanted: float, bound: float) -> int:
    """Return the degree of the filter polynomial, at most ``DEGREE``.

    It is the least degree at which ``wanted`` grows by 1 / ``CONVERGED`` relative to all eigenvalues up to ``bound``.
    """
    return min(DEGREE, ceil(acosh(1 / CONVERGED) / acosh(2 * wanted / bound - 1)))


def _filtered(values: Tensor, loads: Tensor, Q: Tensor, rank: int, bound: float) -> Tensor:
    """Return T_d(2 M_k / bound - 1) Q_k with columns of unit norm, for M_k = S - E_k E_k'.

    If the spectrum of S ends before ``bound``, return M_k Q_k.
    """
    if bound <= torch.finfo(loads.dtype).eps * float(values[0]):
        return _apply(values, loads, Q)
    shifted, loads = 2 * values / bound - 1, loads * (2 / bound) ** 0.5
    before, Q = Q, _apply(shifted, loads, Q)
    shifted, loads = 2 * shifted, loads * 2**0.5
    for _ in range(_degree(float(values[rank - 1]), bound) - 1):
        before, Q = Q, _apply(shifted, loads, Q).sub_(before)
    return Q / torch.linalg.vector_norm(Q, dim=1, keepdim=True)


def exact_bases(values: Tensor, loads: Tensor, rank: int) -> Tensor:
    return torch.linalg.eigh(torch.diag(values) - loads @ loads.mT)[1][..., len(values) - rank :]
