"""Attacks: what contaminated clients send, computed from the updates of the honest clients.

The attackers know all honest updates. Attacks on the training data are in `studies.text_copying.dialects`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor
from statistics import NormalDist

import torch
from torch import Generator, Tensor

from clairlib.linalg.low_rank import LowRank, as_dense, truncate
from clairlib.linalg.subspace import project_out

SCALED_BY = 10.0
IPM_FACTOR = 0.5  # tau with which Xie, Koyejo and Gupta evade the median and Krum


@dataclass(frozen=True)
class Model:
    """Size of the honest updates, which random attacks match: rank r, and ||M||_F in units of a row of A_k.

    In these units a benign update has the expected squared norm r + ``common_norm``^2.
    """

    rank: int
    common_norm: float = 1.0


Attack = Callable[[Tensor, Tensor, Model, Generator], Tensor]


def random_frame(p: int, r: int, *, generator: Generator) -> Tensor:
    """Draw an orthonormal basis (p, r) of a uniformly distributed subspace."""
    Q, R = torch.linalg.qr(torch.randn(p, r, generator=generator, dtype=torch.float64))
    return Q * R.diagonal().sign()


def coefficients(count: int, r: int, q: int, *, generator: Generator) -> Tensor:
    """Draw client-specific coefficients (count, r, q), whose rows have unit expected squared norm."""
    return torch.randn(count, r, q, generator=generator, dtype=torch.float64) / q**0.5


def random_common_part(p: int, q: int, size: float, *, generator: Generator) -> Tensor:
    """Draw a dense Gaussian matrix (p, q) and scale it to Frobenius norm ``size``."""
    M = torch.randn(p, q, generator=generator, dtype=torch.float64)
    return M * (size / torch.linalg.matrix_norm(M))


def _unstructured(honest: Tensor, contaminated: Tensor, model: Model, generator: Generator) -> Tensor:
    """Give each contaminated client an r-frame of its own: a random subspace and a random common part."""
    return torch.cat([_coalition(honest, k[None], model, generator) for k in _indices(contaminated)])


def _dense(honest: Tensor, contaminated: Tensor, model: Model, generator: Generator) -> Tensor:
    """Draw full-rank Gaussian updates with the expected squared Frobenius norm of benign ones, r + ||M||_F^2."""
    count, p, q = honest[contaminated].shape
    scale = ((model.rank + model.common_norm**2) / (p * q)) ** 0.5
    return torch.randn(count, p, q, generator=generator, dtype=torch.float64) * scale


def _coalition(honest: Tensor, contaminated: Tensor, model: Model, generator: Generator) -> Tensor:
    """Give all contaminated clients the same r-frame: one random subspace and one random common part."""
    count, p, q = honest[contaminated].shape
    frame = random_frame(p, model.rank, generator=generator)
    M = random_common_part(p, q, model.common_norm, generator=generator)
    return M + frame @ coefficients(count, model.rank, q, generator=generator)


def _sign_flip(honest: Tensor, contaminated: Tensor, model: Model, generator: Generator) -> Tensor:
    """Return the negative of the client's own honest update."""
    return -honest[contaminated]


def _scaled(honest: Tensor, contaminated: Tensor, model: Model, generator: Generator) -> Tensor:
    """Return the client's own honest update times ``SCALED_BY``."""
    return SCALED_BY * honest[contaminated]


def _alie(honest: Tensor, contaminated: Tensor, model: Model, generator: Generator) -> Tensor:
    """A little is enough (Baruch, Baruch, Goldberg 2019): benign mean + `alie_deviations` deviations, per entry."""
    benign = _benign(honest, contaminated)
    z = alie_deviations(len(honest), len(honest) - len(benign))
    return _everybody(benign.mean(dim=0) + z * benign.std(dim=0), honest, contaminated)


def alie_deviations(clients: int, contaminated: int) -> float:
    """Return Baruch's z_max, the standard normal quantile of (n - m - s) / (n - m) with s = floor(n / 2 + 1) - m.

    n is ``clients`` and m is ``contaminated``. The m attackers need s benign clients for a majority; s is at least 1.
    """
    benign, needed = clients - contaminated, max(1, floor(clients / 2 + 1) - contaminated)
    return NormalDist().inv_cdf((benign - needed) / benign)


def _ipm(honest: Tensor, contaminated: Tensor, model: Model, generator: Generator) -> Tensor:
    """Inner product manipulation (Xie, Koyejo, Gupta 2020): -``IPM_FACTOR`` times the benign mean."""
    benign = _benign(honest, contaminated)
    return _everybody(-IPM_FACTOR * benign.mean(dim=0), honest, contaminated)


def _stealth(honest: Tensor, contaminated: Tensor, model: Model, generator: Generator) -> Tensor:
    """Return the client's own honest update plus a rank-one step of unit norm, orthogonal to the benign subspace.

    The step is the same for all, so it does not average out. The benign subspace is spanned by the r leading left
    singular vectors of the benign updates minus their mean.
    """
    benign = _benign(honest, contaminated)
    wide = (benign - benign.mean(dim=0)).permute(1, 0, 2).flatten(1)  # (p, s*q)
    basis = torch.linalg.svd(wide, full_matrices=False).U[:, : model.rank]
    p, q = honest.shape[1:]
    output, right = (torch.randn(n, 1, generator=generator, dtype=torch.float64) for n in (p, q))
    step = project_out(basis, output) @ right.T
    return honest[contaminated] + step / torch.linalg.matrix_norm(step)


def _free_rider(honest: Tensor, contaminated: Tensor, model: Model, generator: Generator) -> Tensor:
    """Return zero updates, as of clients that did not train (those that send random noise instead are ``dense``)."""
    return torch.zeros_like(honest[contaminated])


ATTACKS: dict[str, Attack] = {
    "unstructured": _unstructured,
    "dense": _dense,
    "coalition": _coalition,
    "sign_flip": _sign_flip,
    "scaled": _scaled,
    "alie": _alie,
    "ipm": _ipm,
    "stealth": _stealth,
    "free_rider": _free_rider,
}
"""Attack name -> function that returns the updates (n, p, q) of the contaminated clients.

The first argument holds all clients' honest updates (K, p, q), the second a mask (K,) of the contaminated clients, or
their indices in the order in which the attack draws for them.
"""


def _indices(contaminated: Tensor) -> Tensor:
    return contaminated.nonzero().flatten() if contaminated.dtype == torch.bool else contaminated


def _benign(honest: Tensor, contaminated: Tensor) -> Tensor:
    """Return the honest clients' updates; raise ValueError if there are fewer than two, too few for a deviation."""
    mask = torch.ones(len(honest), dtype=torch.bool)
    mask[contaminated] = False
    if int(mask.sum()) < 2:
        raise ValueError(f"an attack needs at least two honest clients; {int(mask.sum())} of {len(honest)} are")
    return honest[mask]


def _everybody(update: Tensor, honest: Tensor, contaminated: Tensor) -> Tensor:
    """Repeat one update (p, q) for all contaminated clients."""
    return update.expand_as(honest[contaminated]).clone()


def attack(
    kind: str, updates: Tensor | Sequence[LowRank], contaminated: Tensor, *, rank: int, generator: Generator
) -> Tensor | list[LowRank]:
    """Replace the updates of the ``contaminated`` (K,) bool by an attack; those of honest clients are unchanged.

    ``kind`` is a key of ``ATTACKS``. ``updates``, as all clients send them if honest, are a Tensor (K, p, q) or
    adapters, which are multiplied out here, to K p q numbers; the result is of the same kind. ``rank`` r is the
    dimension of random subspaces, and of the benign subspace that ``stealth`` leaves.

    The attack is computed in units in which the mean squared norm of the honest clients is r + 1, so random attacks and
    steps have the size of the honest updates. An attacker with an adapter sends the best approximation of its attack at
    its own rank, which is smaller than attacks of higher rank (``dense``, ``alie``, ``ipm``, ``stealth``).

    Raises
    ------
    ValueError
        The kind is unknown, the mask is not bool or has another length, or fewer than two clients are honest.
    """
    check_kind(kind)
    if contaminated.shape != (len(updates),) or contaminated.dtype != torch.bool:
        shape, dtype = tuple(contaminated.shape), contaminated.dtype
        raise ValueError(f"contaminated must be a bool mask of {len(updates)} clients; got shape {shape}, {dtype}")
    if not contaminated.any():
        return updates if isinstance(updates, Tensor) else list(updates)
    honest = updates.double() if isinstance(updates, Tensor) else as_dense({kind: updates})[kind]
    mean_square = float(_benign(honest, contaminated).square().sum(dim=(1, 2)).mean())
    unit = (mean_square / (rank + 1)) ** 0.5 or 1.0
    sent = unit * ATTACKS[kind](honest / unit, contaminated, Model(rank), generator)
    if isinstance(updates, Tensor):
        replaced = updates.clone()
        replaced[contaminated] = sent.to(updates.dtype)
        return replaced
    adapters = list(updates)
    for k, update in zip(_indices(contaminated).tolist(), sent, strict=True):
        adapters[k] = as_adapter(update, like=adapters[k])
    return adapters


def as_adapter(update: Tensor, *, like: LowRank) -> LowRank:
    """Return the best approximation of a dense update (p, q) with the rank and dtype of ``like``, scale 1."""
    identity = torch.eye(update.shape[1], dtype=torch.float64)
    cut, _ = truncate(LowRank(update.double(), identity), like.rank)
    return LowRank(cut.B.to(like.B.dtype), cut.A.to(like.A.dtype))


def check_kind(kind: str) -> None:
    """Raise ValueError if the attack is unknown."""
    if kind not in ATTACKS:
        raise ValueError(f"contamination must be one of {', '.join(ATTACKS)}; got {kind!r}")
