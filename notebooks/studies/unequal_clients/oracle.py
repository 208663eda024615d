"""A test for contaminated clients that is told every a_k and sigma_k, the subspace and the common part."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from clairlib.core.seeds import derive
from clairlib.linalg.subspace import project_out
from clairlib.recovery.detection import FAMILY_ERROR
from studies.unequal_clients.clients import Drawn

NULL_DRAWS = 20_000


def oracle_flags(drawn: Drawn) -> Tensor:
    """Return the clients (K,) bool that the test finds contaminated, dense updates of one module.

    Tested is the energy of P_perp (Theta_k / a_k - M) in its top r directions over the variance of its noise, at level
    ``FAMILY_ERROR`` / K.
    """
    ((name, X),) = drawn.updates.items()
    U, a = drawn.bases[name], drawn.scales
    assert isinstance(X, Tensor)
    K, p, q = X.shape
    off = project_out(U, X / a[:, None, None] - drawn.common[name])
    variance = (drawn.noise / a).square() / (p * q)
    return top_energy(off, U.shape[1]) / variance > cut(p - U.shape[1], q, U.shape[1], FAMILY_ERROR / K)


def top_energy(R: Tensor, directions: int) -> Tensor:
    """Return the energy (n,) of matrices (n, rows, columns) in their top singular directions."""
    return torch.linalg.eigvalsh(R.mT @ R)[:, -directions:].sum(dim=1)


@cache
def cut(rows: int, columns: int, directions: int, level: float) -> float:
    """Return the top energy that standard normal noise (rows, columns) exceeds with chance ``level``, by simulation."""
    generator = derive(0, "oracle's cut", rows, columns, directions)
    E = torch.randn(NULL_DRAWS, rows, columns, generator=generator, dtype=torch.float64)
    return float(torch.quantile(top_energy(E, directions), 1 - level))
