"""Description length: code each client as a member of a candidate frame or as an outlier; the shortest code decides."""

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
from clairlib.recovery.leave_one_out import LeaveOneOut

OWN_RANK = 16  # largest number of directions of its own with which an outlier is described
OUTLIER_NOISE_RATIO = 1.5  # own energy per degree of freedom, over the noise, above which only the own part counts


def best_set(X: Tensor, weights: Tensor, candidates: list[Frame]) -> Frame:
    """Return the candidate whose set has the shortest description; each set is tried at the other sets' ranks too."""
    best = shortest_description(X, weights, at_every_rank(X, weights, candidates))
    return next(frame for frame in candidates if torch.equal(frame.members, best.members))


def at_every_rank(X: Tensor, weights: Tensor, candidates: list[Frame]) -> list[Frame]:
    """Return the candidates, and their sets at the others' ranks, so that sets are compared and not estimated ranks."""
    p, q = candidates[0].shared_block[0], X.shape[2]
    frames = list(candidates)
    for frame in candidates:
        largest = min(rank_limit(frame.size, p, q), resolved_rank(frame.eigenvalues))
        others = {other.rank for other in candidates if other.rank <= largest} - {frame.rank}
        frames += [replace(frame, basis=frame.eigenvectors[:, :rank]) for rank in sorted(others)]
    return frames


def shortest_description(X: Tensor, weights: Tensor, candidates: list[Frame]) -> Frame:
    """Return the frame with the most members in the shortest description of the clients as members and outliers.

    The length of a partition, in twice natural units, sums each client's cheapest description, log p for every
    parameter of the frames in use, and a fixed price if any client is described as contaminated.
    """
    K = len(X)
    costs, overheads = description_lengths(X, weights, candidates)
    # An outlier must save more than the most extreme of K benign clients would by chance.
    price = stats.norm.isf(FAMILY_ERROR / K) ** 2
    best: tuple[float, list[int]] | None = None
    for first in range(len(candidates)):
        chosen, cost, length = [first], costs[first], float(costs[first].sum() + overheads[first])
        while rest := [c for c in range(len(candidates)) if c not in chosen]:
            used = float(overheads[chosen].sum())
            options = [(float(torch.minimum(cost, costs[c]).sum() + used + overheads[c]), c) for c in rest]
            if min(options)[0] >= length:
                break
            length, c = min(options)
            chosen, cost = [*chosen, c], torch.minimum(cost, costs[c])
        length += 0.0 if all(bool(candidates[c].members.all()) for c in chosen) else price
        if best is None or length < best[0]:
            best = (length, chosen)
    assert best is not None
    cheapest = costs[best[1]].argmin(dim=0)  # the frame, in the order of best[1], that describes each client
    described = [int((candidates[c].members & (cheapest == i)).sum()) for i, c in enumerate(best[1])]
    return candidates[best[1][described.index(max(described))]]


def description_lengths(X: Tensor, weights: Tensor, candidates: list[Frame]) -> tuple[Tensor, Tensor]:
    """Return the cost (F, K) of each client's description through each frame, and the cost (F,) of each frame.

    The unit is the noise energy of one degree of freedom, from the leave-one-out residuals of the frame with the least
    noise; its effective rows and columns are used for all frames. A member costs the energy of its residual, and log p
    for each of its coefficients. An outlier has g directions of its own, at rows + columns - g parameters each, and a
    variance of its own for the rest (`own_variance`). It is described on top of the frame's subspace, with
    coefficients, or without the subspace, whichever is cheaper. The influence of an outlier is bounded, so outliers do
    not choose the frame. A frame costs log p for each parameter of its subspace and its common part.
    """
    K, p, q = X.shape
    noise = [left_out_noise(X, weights, f) for f in candidates]
    base = candidates[min(range(len(candidates)), key=noise.__getitem__)]
    R = project_out(base.basis, _differences(X, weights, base))
    free = max(base.size - 1 - base.rank / q, 0.5)  # the fit used up one member for the mean, r / q for the subspace
    p_eff, q_eff = EffectiveDimensions(R[base.members], base.shared_block).effective_dimensions(free)
    unit = max(min(noise), floor_energy(X)) / (p_eff * q_eff)  # noise energy of one degree of freedom
    rows, price = p_eff + base.rank, log(p)
    costs = torch.empty(len(candidates), K, dtype=X.dtype, device=X.device)
    without_subspace: dict[bytes, Tensor] = {}  # cost of an outlier by set; it is the same at every rank of a set
    for i, frame in enumerate(candidates):
        coefficients, D = price * frame.rank * q_eff, _differences(X, weights, frame)
        R = project_out(frame.basis, D)
        total = weights[frame.members].sum()
        own = total / (total + weights)  # part of a non-member's energy that is not the error of the mean
        off = max(rows - frame.rank, 1.0)  # a frame of higher rank than the base may leave almost no rows
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
    """Return the cost (K,) of residuals in units of the noise: the cheapest g own directions, and a variance."""
    tails = torch.nn.functional.pad(squared_singular_values(R).flip(1).cumsum(dim=1).flip(1), (0, 1))
    tails = tails[:, : int(min(rows, columns, OWN_RANK)) + 1]  # energy beyond the top g singular directions
    g = torch.arange(tails.shape[1], device=R.device)
    free = (rows - g) * (columns - g)  # degrees of freedom left to noise
    off = free * own_variance(tails / free.clamp(min=1e-9), own[:, None])
    return (off + price * g * (rows + columns - g)).min(dim=1).values


def _differences(X: Tensor, weights: Tensor, frame: Frame) -> Tensor:
    return with_neglected(centred(X, weights, frame) * weights.sqrt()[:, None, None], weights, frame)


def with_neglected(R: Tensor, weights: Tensor, frame: Frame) -> Tensor:
    """Add to residuals (K, p, q) from a frame the energy that the compressed cores neglect.

    In the own coordinates of a member j, the members' mean has a fraction w_j / W of the noise of j, which the cores
    neglect in the residuals of all other clients. Without it, a frame with few members would seem to have less noise.
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
    """Return the off-subspace noise energy of a member, from its leave-one-out residuals.

    It is divided by 1 + r / (q (s - 1)), because a subspace fitted without the member leaves that much more outside.
    In-sample residuals of few clients would be far too small.
    """
    R = with_neglected(LeaveOneOut(X, weights, frame).R, weights, frame)
    energy = R[frame.members].square().sum(dim=(1, 2)).mean()
    return float(energy) / (1 + frame.rank / (X.shape[2] * max(frame.size - 1, 1)))


def own_variance(x: Tensor, own: Tensor) -> Tensor:
    """Return the cost per degree of freedom of a non-member with a variance of its own: 1 + log x, or x if x < 1.

    ``x`` is its energy per degree of freedom in units of the noise, and ``own`` the part of x that is its own. If x own
    exceeds ``OUTLIER_NOISE_RATIO``, it replaces x: far from the frame, the error of the members' mean is not part of
    the outlier's variance. No variance is below the members' noise.
    """
    x = torch.where(x * own > OUTLIER_NOISE_RATIO, x * own, x)
    return torch.where(x > 1, 1 + x.clamp(min=1).log(), x)
