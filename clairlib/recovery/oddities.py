"""What is reported without a verdict: updates that are copies of one another, and directions that few clients use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clairlib.recovery.frame import Frame, centred

if TYPE_CHECKING:
    from clairlib.recovery.module_fit import ModuleFit

COPY_CORRELATION = 0.9  # correlation of the noise of two clients above which one is called a copy
FEW_USERS = 0.5  # users are few below this part of the number over which Gaussian coefficients would spread


def near_duplicates(fits: Sequence[ModuleFit], members: Tensor) -> list[tuple[int, int]]:
    """Return pairs of clients whose residuals off the subspace correlate by more than ``COPY_CORRELATION``.

    The noise of honest clients is their own, so residuals of two of them have a correlation near 0. All modules count
    in which coordinates are common to all clients (not those of large adapters, whose cores are compressed).
    """
    G = torch.zeros(len(members), len(members), dtype=torch.float64, device=members.device)
    for fit in fits:
        if (R := fit.residuals(members)) is not None:
            flat = R.flatten(1)
            G += flat @ flat.T / flat.square().sum(dim=1).median().clamp(min=torch.finfo(flat.dtype).tiny)
    size = G.diagonal().clamp(min=torch.finfo(G.dtype).tiny).sqrt()
    alike = (G / size[:, None] / size > COPY_CORRELATION).triu(diagonal=1)
    return [(int(j), int(k)) for j, k in alike.nonzero().tolist()]


def directions_of_few(X: Tensor, weights: Tensor, frame: Frame) -> list[list[int]]:
    """Return, for each direction of the subspace that few members use, the clients that use it more than the mean.

    With s_ki the share of direction i in client k's energy inside the subspace, (sum_k s_ki)^2 / sum_k s_ki^2 clients
    use it. Gaussian coefficients in q columns give n / (1 + 2 / q) of n members; below ``FEW_USERS`` of this, users are
    few. A backdoor that a few clients share looks like this; so does an honest minority with a topic of its own.
    """
    if frame.rank < 2:
        return []
    energy = (frame.basis.T @ centred(X, weights, frame)[frame.members]).square().sum(dim=2)  # (n, r)
    shares = energy / energy.sum(dim=1, keepdim=True).clamp(min=torch.finfo(X.dtype).tiny)
    users = shares.sum(dim=0).square() / shares.square().sum(dim=0).clamp(min=torch.finfo(X.dtype).tiny)
    few = users < FEW_USERS * frame.size / (1 + 2 / X.shape[2])
    clients = frame.members.nonzero()[:, 0]
    return [clients[own > own.mean()].tolist() for own, rare in zip(shares.T, few.tolist(), strict=True) if rare]
