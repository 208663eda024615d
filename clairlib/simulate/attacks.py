"""What contaminated clients send: every kind of contamination of updates, from what the honest clients send.

The attackers know all honest updates. Kinds that act on training data instead are in `studies.text_copying.dialects`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import floor
from statistics import NormalDist

import torch
from torch import Generator, Tensor

from clairlib.linalg.low_rank import LowRank, truncate
from clairlib.linalg.subspace import project_out

SCALED_BY = 10.0
IPM_FACTOR = 0.5  # tau of Xie, Koyejo, Gupta's experiments that evade the median and Krum


@dataclass(frozen=True)
class Model:
    """The honest clients' model, to which drawn contamination is matched: rank r, and ||M||_F in units of a row of A_k.

    A benign update has expected squared norm r + ``common_norm``^2 in these units.
    """

    rank: int
    common_norm: float = 1.0


Attack = Callable[[Tensor, Tensor, Model, Generator], Tensor]


def random_frame(p: int, r: int, *, generator: Generator) -> Tensor:
    """Orthonormal basis (p, r) of a uniformly distributed subspace."""
    Q, R = torch.linalg.qr(torch.randn(p, r, generator=generator, dtype=torch.float64))
    return Q * R.diagonal().sign()


def coefficients(count: int, r: int, q: int, *, generator: Generator) -> Tensor:
    """Client-specific coefficients (count, r, q): each of the r rows has unit expected squared norm."""
    return torch.randn(count, r, q, generator=generator, dtype=torch.float64) / q**0.5


def random_common_part(p: int, q: int, size: float, *, generator: Generator) -> Tensor:
    """Dense Gaussian matrix (p, q) of Frobenius norm ``size``."""
    M = torch.randn(p, q, generator=generator, dtype=torch.float64)
    return M * (size / torch.linalg.matrix_norm(M))


def _unstructured(honest: Tensor, contaminated: Tensor, model: Model, generator: Generator) -> Tensor:
    """Each contaminated client has an r-frame of its own: a random subspace and a random common part."""
    return torch.cat([_coalition(honest, k[None], model, generator) for k in _indices(contaminated)])


def _dense(honest: Tensor, contaminated: Tensor, model: Model, generator: Generator) -> Tensor:
    """Full-rank Gaussian updates of the same expected squared Frobenius norm as benign ones, r + ||M||_F^2."""
    count, p, q = honest[contaminated].shape
    scale = ((model.rank + model.common_norm**2) / (p * q)) ** 0.5
    return torch.randn(count, p, q, generator=generator, dtype=torch.float64) * scale


def _coalition(honest: Tensor, contaminated: Tensor, model: Model, generator: Generator) -> Tensor:
    """Contaminated clients share one r-frame of their own: a subspace and a common part."""
    count, p, q = honest[contaminated].shape
    frame = random_frame(p, model.rank, generator=generator)
    M = random_common_part(p, q, model.common_norm, generator=generator)
    return M + frame @ coefficients(count, model.rank, q, generator=generator)


def _sign_flip(honest: Tensor, contaminated: Tensor, model: Model, generator: Generator) -> Tensor:
    """The negative of the client's own honest update."""
    return -honest[contaminated]


def _scaled(honest: Tensor, contaminated: Tensor, model: Model, generator: Generator) -> Tensor:
    """The client's own honest update, ``SCALED_BY`` times as large."""
    return SCALED_BY * honest[contaminated]


def _alie(honest: Tensor, contaminated: Tensor, model: Model, generator: Generator) -> Tensor:
    """A little is enough (Baruch, Baruch, Goldberg 2019): every entry the benign mean + ``alie_deviations`` std."""
    benign = _benign(honest, contaminated)
    z = alie_deviations(len(honest), len(honest) - len(benign))
    return _everybody(benign.mean(dim=0) + z * benign.std(dim=0), honest, contaminated)


def alie_deviations(clients: int, contaminated: int) -> float:
    """Baruch's z_max = quantile((n - m - s) / (n - m)) of the standard normal, with s = floor(n / 2 + 1) - m.

    s is the number of benign clients that m attackers need for a majority. Where they have it already, s = 1.
    """
    benign, needed = clients - contaminated, max(1, floor(clients / 2 + 1) - contaminated)
    return NormalDist().inv_cdf((benign - needed) / benign)


def _ipm(honest: Tensor, contaminated: Tensor, model: Model, generator: Generator) -> Tensor:
    """Inner product manipulation (Xie, Koyejo, Gupta 2020): -``IPM_FACTOR`` times the benign mean."""
    benign = _benign(honest, contaminated)
    return _everybody(-IPM_FACTOR * benign.mean(dim=0), honest, contaminated)


def _stealth(honest: Tensor, contaminated: Tensor, model: Model, generator: Generator) -> Tensor:
    """Own honest update and a step of unit norm off the benign subspace, one rank-one step for all: it adds up.

    The subspace is the leading one, of dimension r, of the benign differences from their mean.
    """
    benign = _benign(honest, contaminated)
    wide = (benign - benign.mean(dim=0)).permute(1, 0, 2).flatten(1)  # (p, s*q)
    basis = torch.linalg.svd(wide, full_matrices=False).U[:, : model.rank]
    p, q = honest.shape[1:]
    output, right = (torch.randn(n, 1, generator=generator, dtype=torch.float64) for n in (p, q))
    step = project_out(basis, output) @ right.T
    return honest[contaminated] + step / torch.linalg.matrix_norm(step)


def _free_rider(honest: Tensor, contaminated: Tensor, model: Model, generator: Generator) -> Tensor:
    """Nothing was trained: a zero update. One that sends noise instead is ``dense``."""
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
"""Kind -> what the contaminated clients send (n, p, q), given what all would send if honest (K, p, q).

The second argument is a mask (K,) or the contaminated clients' indices in the order in which they draw.
"""


def _indices(contaminated: Tensor) -> Tensor:
    return contaminated.nonzero().flatten() if contaminated.dtype == torch.bool else contaminated


def _benign(honest: Tensor, contaminated: Tensor) -> Tensor:
    """Honest clients' updates, which need a standard deviation."""
    mask = torch.ones(len(honest), dtype=torch.bool)
    mask[contaminated] = False
    if int(mask.sum()) < 2:
        raise ValueError(f"an attack needs at least two honest clients; {int(mask.sum())} of {len(honest)} are")
    return honest[mask]


def _everybody(update: Tensor, honest: Tensor, contaminated: Tensor) -> Tensor:
    """One update (p, q) sent by all contaminated clients."""
    return update.expand_as(honest[contaminated]).clone()


def attack(
    kind: str,
    updates: Tensor | Sequence[LowRank],
    contaminated: Tensor,
    *,
    rank: int,
    generator: Generator,
) -> Tensor | list[LowRank]:
    """Trained clients' updates with those of the contaminated clients replaced.

    Drawn contamination and steps have the size of the honest updates: the attack is made in units in which the honest
    clients' mean squared norm is r + 1. An attacker among adapters sends an adapter as well, of its own rank: the best
    approximation of its attack, which for kinds of higher rank (``dense``, ``alie``, ``ipm``, ``stealth``) is smaller.

    Parameters
    ----------
    kind : str
        A key of ``ATTACKS``.
    updates : Tensor (K, p, q), or a sequence of LowRank
        What all clients send if honest. Adapters are multiplied out here, K p q numbers.
    contaminated : Tensor (K,), bool
    rank : int
        Dimension of drawn subspaces, and of the benign subspace that ``stealth`` leaves.

    Returns
    -------
    Tensor (K, p, q) or list of LowRank, as ``updates``; honest clients' updates unchanged.

    Raises
    ------
    ValueError
        For an unknown kind, a mask of another length, or fewer than two honest clients.
    """
    check_kind(kind)
    if contaminated.shape != (len(updates),) or contaminated.dtype != torch.bool:
        shape, dtype = tuple(contaminated.shape), contaminated.dtype
        raise ValueError(f"contaminated must be a bool mask of {len(updates)} clients; got shape {shape}, {dtype}")
    if not contaminated.any():
        return updates if isinstance(updates, Tensor) else list(updates)
    honest = updates.double() if isinstance(updates, Tensor) else torch.stack([_product(u) for u in updates])
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


def _product(update: LowRank) -> Tensor:
    return update.scale * (update.B.double() @ update.A.double())


def as_adapter(update: Tensor, *, like: LowRank) -> LowRank:
    """Best approximation of a dense update (p, q) by an adapter of the rank and dtype of ``like``, scale 1."""
    identity = torch.eye(update.shape[1], dtype=torch.float64)
    cut, _ = truncate(LowRank(update.double(), identity), like.rank)
    return LowRank(cut.B.to(like.B.dtype), cut.A.to(like.A.dtype))


def check_kind(kind: str) -> None:
    """Refuse an unknown kind of contamination."""
    if kind not in ATTACKS:
        raise ValueError(f"contamination must be one of {', '.join(ATTACKS)}; got {kind!r}")
