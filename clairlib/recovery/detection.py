"""Who is contaminated: calibration of log scores on a set of benign clients, and the two decisions.

(i) Is anybody contaminated, one by one or as a group? At a nominal family-wise error of ``FAMILY_ERROR`` when nobody
is; measured, not proved.
(ii) If so, who? The cut that errs least: where a two-component model of the log scores gives posterior one half.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor

FAMILY_ERROR = 0.01
STRANGER_ERROR = 0.001  # with Simes' half of FAMILY_ERROR still within it
PRIOR_CLIENTS = 6.0  # weight, in clients, of the noise law's own spread against the spread seen between members


@dataclass(frozen=True)
class Calibration:
    """Where every client stands against the benign members.

    ``z`` (K,) distance from the members' mean log score in standard deviations, and ``p_values`` (K,), the chance of
    a benign client's score at least as high. A member is compared with the others only.
    """

    z: Tensor
    p_values: Tensor


def calibrate(log_scores: Tensor, members: Tensor, variance: float) -> Calibration:
    """Compare every log score with those of the members, by a moderated t statistic.

    The members' variance is shrunk towards ``variance``, that of pure noise, as if seen in ``PRIOR_CLIENTS`` more
    clients (Smyth 2004), which keeps power when members are few; a member is left out of its own comparison.
    """
    x, n = log_scores.double(), int(members.sum())
    mean = x[members].mean()
    deviation = x - mean
    squares = deviation[members].square().sum()
    left = torch.where(members, n - 1, n)  # members each client is compared with
    shift = torch.where(members, n / max(n - 1, 1), torch.ones_like(x))
    rest = torch.where(members, squares - deviation.square() * n / max(n - 1, 1), squares).clamp(min=0.0)
    freedom = PRIOR_CLIENTS + left - 1
    spread = ((PRIOR_CLIENTS * variance + rest) / freedom).sqrt()
    z = deviation * shift / (spread * (1 + 1 / left).sqrt())
    p_values = special.stdtr(freedom.cpu().numpy(), -z.cpu().numpy())  # that of Student's t beyond z
    return Calibration(z, torch.as_tensor(p_values, device=x.device))


def any_contaminated(p_values: Tensor) -> bool:
    """Decision (i): does Simes' test reject that all clients are benign?

    min_i K p_(i) / i over the sorted p-values (Simes 1986): as strict as Bonferroni on one extreme client, with power
    where many stand out a little. Its level is a theorem for independent p-values; those of clients compared with one
    another are slightly dependent, so here it is nominal. Half of ``FAMILY_ERROR`` is spent here, the other half is
    left to the search that chose the members.
    """
    return simes_cut(p_values) >= 0


def simes_cut(p_values: Tensor) -> float:
    """The largest p-value p_(i) with K p_(i) / i <= ``FAMILY_ERROR`` / 2, -1 where there is none."""
    ordered = p_values.sort().values
    places = torch.arange(1, len(ordered) + 1, dtype=ordered.dtype, device=ordered.device)
    rejected = ordered[len(ordered) * ordered / places <= FAMILY_ERROR / 2]
    return float(rejected.max()) if len(rejected) else -1.0


def benign_set(log_scores: Tensor, members: Tensor, p_values: Tensor, variance: float, inside: Tensor) -> Tensor:
    """Both decisions: the benign clients (K,) bool; everybody when nobody stands out.

    ``p_values`` are those calibrated on ``members``; decision (ii) starts from the members they do not reject, and from
    all of them where it needs the group to be told apart by what is ``inside`` the subspace.
    """
    if any_contaminated(p_values):
        return least_error_set(log_scores, members & (p_values > simes_cut(p_values)), variance)
    decided = least_error_set(log_scores, members, variance)
    return decided if lacks_subspace_energy(inside, ~decided) else torch.ones_like(members)


def lacks_subspace_energy(inside: Tensor, suspects: Tensor) -> bool:
    """Decision (i) for a group: do the suspects have less energy inside the subspace (K,) than the others?

    A one-sided Mann-Whitney test at ``STRANGER_ERROR``. Whoever does not use the subspace has next to nothing in it.
    If all clients were benign, their parts inside it, each its own, would be exchangeable. Suspects are chosen by what
    lies outside, but for the size of their update, in which both parts count, so the level is nominal, not exact. Never
    decides who: a client that lacks a part inside, or has a large one, is not flagged for that.
    """
    if not bool(suspects.any()) or bool(suspects.all()):
        return False
    x, s = inside.cpu().numpy(), suspects.cpu().numpy()
    return bool(stats.mannwhitneyu(x[s], x[~s], alternative="less").pvalue <= STRANGER_ERROR)


def least_error_set(log_scores: Tensor, members: Tensor, variance: float, rounds: int = 30) -> Tensor:
    """Decision (ii): the benign clients (K,) bool under a two-component model of the log scores.

    Starts from ``members`` and gives every client to the likelier component until nobody moves. Each component is
    normal with unknown centre and variance, seen through the *other* clients: a Student t. The benign variance is
    shrunk towards ``variance`` with the weight of ``PRIOR_CLIENTS`` clients, the contaminated one towards the square of
    a quarter of the distance between the centres, which puts the midpoint two deviations off, with the weight of one
    client. A client below the benign centre is benign; a lone suspect stays contaminated, as nothing is known of its
    component.
    """
    x = log_scores.double().cpu().numpy()
    benign = members.cpu().numpy().copy()
    for _ in range(rounds):
        updated = _likelier_benign(x, benign, variance)
        if (updated == benign).all():
            break
        benign = updated
    return torch.as_tensor(benign, device=log_scores.device)


def _likelier_benign(x: np.ndarray, benign: np.ndarray, variance: float) -> np.ndarray:
    """Is each client (K,) likelier benign than contaminated, judged by components fitted to the others?"""
    n, low, low_squares = _without_each(x, benign)
    m, high, high_squares = _without_each(x, ~benign)
    tight = (PRIOR_CLIENTS * variance + low_squares) / (PRIOR_CLIENTS + n - 1)
    wide = np.maximum(((high - low) ** 2 / 16 + high_squares) / m.clip(min=1), tight)
    as_benign = stats.t.logpdf(x, PRIOR_CLIENTS + n - 1, low, np.sqrt(tight * (1 + 1 / n.clip(min=1))))
    as_contaminated = stats.t.logpdf(x, m.clip(min=1), high, np.sqrt(wide * (1 + 1 / m.clip(min=1))))
    with np.errstate(divide="ignore"):
        likelier = as_benign + np.log(n) > as_contaminated + np.log(m)
    undecided = (n == 0) | (m == 0) | (high <= low)  # nothing to tell the components apart by
    return np.where(undecided, benign, (x <= low) | likelier)


def _without_each(x: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Size, mean and sum of squared deviations (K,) of a group of scores without each client in turn."""
    n = group.sum() - group
    mean = x[group].mean() if group.any() else 0.0
    shift = np.where(group, (x - mean) / n.clip(min=1), 0.0)  # what leaving a member out takes from the mean
    squares = ((x[group] - mean) ** 2).sum() - shift * (x - mean) * (n + 1)
    return n, mean - shift, squares.clip(min=0.0)
