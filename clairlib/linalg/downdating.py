"""Leading subspaces of a scatter matrix after removal of one client, for every client in turn."""

from math import acosh, ceil

import torch
from torch import Tensor

GUARD = 5  # directions in the subspace iteration beyond those wanted
DEGREE = 14  # largest degree of the filter polynomial
ROUNDS = 2
LEAST_RATIO = 1.35  # of the last wanted eigenvalue to the first filtered one; below, iterating costs more than it saves
CONVERGED = 1e-11  # residual over the spectral gap; it bounds the angle to the exact subspace


def downdated_bases(values: Tensor, loads: Tensor, rank: int) -> Tensor:
    """Return orthonormal bases (n, p, r) of the leading subspaces of S - E_k E_k', in the eigenvectors of S.

    ``values`` (p,) are the eigenvalues of S, descending, not negative. ``loads`` (n, p, q) are the E_k in the
    eigenvectors of S: without client k the scatter is S - E_k E_k', positive semidefinite. ``rank`` is r, in 0 .. p.

    The method is subspace iteration from the leading eigenvectors of S, filtered by Chebyshev polynomials (Zhou and
    Saad 2007), with a Rayleigh-Ritz step after each round. No eigenvalue of S - E_k E_k' exceeds that of S at the same
    position, so the next eigenvalue of S bounds the part of the spectrum that must be damped. A client whose residual
    does not prove an angle below ``CONVERGED`` gets a full eigendecomposition, so the accuracy does not depend on the
    convergence of the iteration.
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
    """Return the energy (p,) of E_k in the eigenvectors of S - E_k E_k', by descending eigenvalue, as a mean over k.

    It is a held-out client's energy in the principal directions of the others. Arguments as for `downdated_bases`.
    """
    directions = exact_bases(values, loads, len(values)).flip(2)
    return (directions.mT @ loads).square().sum(dim=2).mean(dim=0)


def _apply(values: Tensor, loads: Tensor, Q: Tensor) -> Tensor:
    """Return (diag(values) - E_k E_k') Q_k."""
    return torch.baddbmm(values[:, None] * Q, loads, loads.mT @ Q, alpha=-1)


def _filtered(values: Tensor, loads: Tensor, Q: Tensor, rank: int, bound: float) -> Tensor:
    """Return T_d(2 M_k / bound - 1) Q_k with unit columns, or M_k Q_k if S ends before ``bound``; M_k = S - E_k E_k'.

    At the degree d the last wanted eigenvalue grows by 1 / ``CONVERGED`` relative to all eigenvalues up to ``bound``.
    """
    if bound <= torch.finfo(loads.dtype).eps * float(values[0]):
        return _apply(values, loads, Q)
    degree = min(DEGREE, ceil(acosh(1 / CONVERGED) / acosh(2 * float(values[rank - 1]) / bound - 1)))
    shifted, loads = 2 * values / bound - 1, loads * (2 / bound) ** 0.5
    before, Q = Q, _apply(shifted, loads, Q)
    shifted, loads = 2 * shifted, loads * 2**0.5
    for _ in range(degree - 1):
        before, Q = Q, _apply(shifted, loads, Q).sub_(before)
    return Q / torch.linalg.vector_norm(Q, dim=1, keepdim=True)


def exact_bases(values: Tensor, loads: Tensor, rank: int) -> Tensor:
    """As `downdated_bases`, by a full eigendecomposition of each client's matrix."""
    return torch.linalg.eigh(torch.diag(values) - loads @ loads.mT)[1][..., len(values) - rank :]
