"""What the verdict could have seen: the smallest deviation of each client that would have been found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor

from clairlib.recovery.detection import FAMILY_ERROR, Calibration
from clairlib.recovery.leave_one_out import MIN_EXPLAINED_VARIANCE
from clairlib.recovery.verdict import ModuleScores, module_shares

LARGEST_RATIO = 1e6  # largest deviation that is looked for, over a client's size

@dataclass(frozen=True)
class Verdict:
    """The verdict on a set of clients: the set ``benign`` (K,) bool, and what could have been seen.

    ``scores`` and ``p_values`` (K,) are pooled over modules; ``smallest_deviation`` (K,) as in `smallest_deviations`;
    ``is_shared`` whether the benign clients share anything.
    """

    benign: Tensor
    scores: Tensor
    p_values: Tensor
    smallest_deviation: Tensor
    is_shared: bool

    @classmethod
    def of(cls, readings: Sequence[ModuleScores], benign: Tensor, pooled: Calibration) -> Verdict:
        """Return the verdict for the set that stayed, from its scores in all modules."""
        seen = smallest_deviations(readings, pooled)
        return cls(benign, pooled.z, pooled.p_values, seen, is_anything_shared(readings))


def smallest_deviations(readings: Sequence[ModuleScores], pooled: Calibration) -> Tensor:
    """Return the deviation (K,) that would have been found half of the time, in multiples of the client's own size.

    A deviation of norm c ||Theta_k|| in every module, off the subspace and in the scored directions, adds c^2
    ||Theta_k||^2 to their energy T_k, and so sum_m s_m log(1 + c^2 ||Theta_k||^2 / T_k) to the pooled score, with the
    modules' shares s_m. c is such that a client at the members' mean reaches the level of the smallest of K p-values,
    ``FAMILY_ERROR`` / (2 K). Above 1, the client could have sent anything of its own size.
    """
    K = len(readings[0].scores)
    rise = float(stats.t.isf(FAMILY_ERROR / (2 * K), pooled.freedom)) * pooled.spread
    shares = module_shares(readings)[:, None]
    noise = torch.stack([reading.noise for reading in readings])  # (L, K) log T_k / ||Theta_k||^2
    low = torch.full_like(noise[0], -2 * torch.tensor(LARGEST_RATIO).log().item())
    high = -low
    for _ in range(60):
        middle = (low + high) / 2
        found = (shares * torch.nn.functional.softplus(middle - noise)).sum(dim=0) >= rise
        low, high = torch.where(found, low, middle), torch.where(found, middle, high)
    return (high / 2).exp()


def is_anything_shared(readings: Sequence[ModuleScores]) -> bool:
    """Return whether in any module the members share a subspace, or a common part off it.

    The line is ``MIN_EXPLAINED_VARIANCE``: of the variance that the subspace explains beyond chance, or of the energy
    off the subspace that the common part holds.
    """
    return max(max(float(reading.structure), reading.common) for reading in readings) >= MIN_EXPLAINED_VARIANCE
