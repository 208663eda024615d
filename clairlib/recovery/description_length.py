"""Description length: which candidate frame is the one of the benign clients.

The clients are described as members of frames and as outliers; the partition with the shortest description decides.
"""

from __future__ import annotations

from dataclasses import replace
from math import log

import torch
from scipy import stats
from torch import Tensor

from clairlib.linalg.rank import resolved_rank
from clairlib.linalg.subspace import project_out, squared_singular_values
from clairlib.recovery.detection import FAMILY_ERROR
from clairlib.recovery.effective_dimensions import EffectiveDimensions
from clairlib.recovery.frame import Frame, centred, floor_energy, rank_limit
from clairlib.recovery.leave_one_out import leave_one_out

OWN_RANK = 16  # directions of its own that an outlier is described with at most
OUTLIER_NOISE_RATIO = 1.5  # times the noise energy of a benign client: whoever is further off is coded as an outlier


def best_set(X: Tensor, weights: Tensor, candidates: list[Frame]) -> Frame:
    """The candidate of the shortest description, each candidate's set being tried at the others' ranks too."""
    best = shortest_description(X, weights, at_every_rank(X, weights, candidates))
    return next(frame for frame in candidates if torch.equal(frame.members, best.members))


def at_every_rank(X: Tensor, weights: Tensor, candidates: list[Frame]) -> list[Frame]:
    """The candidates, and their sets with the ranks of the others: sets are compared, not the ranks found for them."""
    p, q = candidates[0].shared_block[0], X.shape[2]
    frames = list(candidates)
    for frame in candidates:
        largest = min(rank_limit(frame.size, p, q), resolved_rank(frame.eigenvalues))
        others = {other.rank for other in candidates if other.rank <= largest} - {frame.rank}
        frames += [replace(frame, basis=frame.eigenvectors[:, :rank]) for rank in sorted(others)]
    return frames


def shortest_description(X: Tensor, weights: Tensor, candidates: list[Frame]) -> Frame:
    """The frame that describes most members in the cheapest description of the clients as frames and outliers.

    The length of a partition, in twice natural units, is the sum over clients of the cheapest way to describe each,
    plus log p for every parameter of the frames in use, plus the price of claiming contamination at all.
    """
    K = len(X)
    costs, overheads = description_lengths(X, weights, candidates)
    price = stats.norm.isf(FAMILY_ERROR / K) ** 2  # claiming an outlier must beat the luckiest of K benign clients
    best: tuple[float, list[int]] | None = None
    for first in range(len(candidates)):
        chosen, cost, length = [first], costs[first], float(costs[first].sum() + overheads[first])
        while len(chosen) < len(candidates):
            used = float(overheads[chosen].sum())
            options = [
                (float(torch.minimum(cost, costs[c]).sum() + used + overheads[c]), c)
                for c in range(len(candidates))
                if c not in chosen
            ]
            if min(options)[0] >= length:
                break
            length, c = min(options)
            chosen, cost = [*chosen, c], torch.minimum(cost, costs[c])
        length += 0.0 if all(bool(candidates[c].members.all()) for c in chosen) else price
        if best is None or length < best[0]:
            best = (length, chosen)
    assert best is not None
    cheapest = costs[best[1]].argmin(dim=0)  # where each client is described, in the order of best[1]
    described = [int((candidates[c].members & (cheapest == i)).sum()) for i, c in enumerate(best[1])]
    return candidates[best[1][described.index(max(described))]]


def description_lengths(X: Tensor, weights: Tensor, candidates: list[Frame]) -> tuple[Tensor, Tensor]:
    """Cost (F, K) of describing each client through each frame, and of describing each frame (F,).

    In units of the noise of one degree of freedom, taken left one out from the frame with the least noise, and with its
    effective dimensions (rows, columns): a member costs the energy of its residual and log p for each of its
    coefficients. An outlier has g directions of its own, at rows + columns - g parameters each, and a variance of its
    own for the rest (`own_variance`); on top of the frame's subspace and its coefficients, or without it; whichever is
    least. Bounded influence, so that outliers do not choose the frame, and no frame is cheaper for holding
    directions that only one client uses. A frame costs log p for each parameter of its subspace and its common part.
    """
    K, p, q = X.shape
    noise = [left_out_noise(X, weights, f) for f in candidates]
    base = candidates[min(range(len(candidates)), key=noise.__getitem__)]
    R = _residuals(X, weights, base)
    p_eff, q_eff = EffectiveDimensions(R[base.members], base.shared_block).effective_dimensions(free_clients(base, q))
    unit = max(min(noise), floor_energy(X)) / (p_eff * q_eff)  # noise energy of one degree of freedom
    rows, price = p_eff + base.rank, log(p)

    costs = torch.empty(len(candidates), K, dtype=X.dtype, device=X.device)
    without_subspace: dict[bytes, Tensor] = {}  # an outlier's description: the same at every rank of a set
    for i, frame in enumerate(candidates):
        coefficients, D = price * frame.rank * q_eff, _differences(X, weights, frame)
        R = project_out(frame.basis, D)
        total = weights[frame.members].sum()
        own = total / (total + weights)  # part of an outsider's energy that is its own
        off = max(rows - frame.rank, 1.0)  # a frame of higher rank than the reference may leave next to no room
        in_frame = _own_description(R / unit**0.5, off, q_eff, own, price) + coefficients
        key = frame.members.cpu().numpy().tobytes()
        if key not in without_subspace:
            without_subspace[key] = _own_description(D / unit**0.5, rows, q_eff, own, price)
        energy = R.square().sum(dim=(1, 2))
        outlier = torch.minimum(in_frame, without_subspace[key]) + price
        costs[i] = torch.where(frame.members, energy / unit + coefficients, outlier)
    overheads = [price * max(rows - f.rank, 1.0) * (f.rank + q_eff) for f in candidates]
    return costs, torch.tensor(overheads, dtype=X.dtype, device=X.device)


def _own_description(R: Tensor, rows: float, columns: float, own: Tensor, price: float) -> Tensor:
    """Cheapest description (K,) of residuals in units of the noise: g directions of their own, then a variance."""
    tails = tail_energies(R, int(min(rows, columns, OWN_RANK)))  # (K, g + 1)
    g = torch.arange(tails.shape[1], device=R.device)
    free = (rows - g) * (columns - g)  # degrees of freedom left to noise
    off = free * own_variance(tails / free.clamp(min=1e-9), own[:, None])
    return (off + price * g * (rows + columns - g)).min(dim=1).values


def _differences(X: Tensor, weights: Tensor, frame: Frame) -> Tensor:
    return with_neglected(centred(X, weights, frame) * weights.sqrt()[:, None, None], weights, frame)


def _residuals(X: Tensor, weights: Tensor, frame: Frame) -> Tensor:
    return project_out(frame.basis, _differences(X, weights, frame))


def with_neglected(R: Tensor, weights: Tensor, frame: Frame) -> Tensor:
    """Residuals (K, p, q) from a frame with the energy of the mean's noise in coordinates that other clients own.

    The cores neglect it, a share w_k / W of a client's own noise: a frame of few members, in which it is large, would
    look the quieter for it. It is counted on the client's own coordinates, as if the others' noise were its own.
    """
    rows, columns = frame.shared_block
    if frame.shared_block == R.shape[1:]:
        return R
    share = weights / weights[frame.members].sum()
    whole = torch.where(frame.members, 1 / (1 - share), 1 + share).sqrt()[:, None, None]
    R = R.clone()
    R[:, rows:] *= whole
    R[:, :rows, columns:] *= whole
    return R


def left_out_noise(X: Tensor, weights: Tensor, frame: Frame) -> float:
    """Off-subspace noise energy of a member: its residual left one out, less what the subspace without it lost.

    In-sample residuals would be far too small where a few clients are fitted with many directions, the largest of
    their noise.
    """
    R = with_neglected(leave_one_out(X, weights, frame), weights, frame)
    energy = R[frame.members].square().sum(dim=(1, 2)).mean()
    return float(energy) / (1 + frame.rank / (X.shape[2] * max(frame.size - 1, 1)))


def free_clients(frame: Frame, q: int) -> float:
    """Members less what the fit used up of their off-subspace noise: one for the mean, r / q for the subspace."""
    return max(frame.size - 1 - frame.rank / q, 0.5)


def own_variance(x: Tensor, own: Tensor) -> Tensor:
    """Cost per degree of freedom of an outsider with a variance of its own, ``own`` part of x its own.

    1 + log x; x where that is less than one, as no variance is below the noise of the others. Far off, the error of
    the members' mean is not the outlier's; close by, it is what being outside costs.
    """
    x = torch.where(x * own > OUTLIER_NOISE_RATIO, x * own, x)
    return torch.where(x > 1, 1 + x.clamp(min=1).log(), x)


def tail_energies(R: Tensor, largest: int) -> Tensor:
    """Energy of each residual (K, p, q) beyond its g top singular directions, (K, largest + 1), g = 0 .. largest."""
    squares = squared_singular_values(R)
    return torch.nn.functional.pad(squares.flip(1).cumsum(dim=1).flip(1), (0, 1))[:, : largest + 1]
