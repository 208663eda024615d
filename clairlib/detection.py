"""Who is contaminated: calibration of log scores on a set of benign clients, and the two decisions.

(i) Is anybody contaminated? At a nominal family-wise error of ``FAMILY_ERROR`` when nobody is; measured, not proved.
(ii) If so, who? The cut that errs least: where a two-component model of the log scores gives posterior one half.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import numpy as np
import torch
from scipy import stats
from torch import Tensor

FAMILY_ERROR = 0.01
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
    p_values = stats.t.sf(z.cpu().numpy(), freedom.cpu().numpy())
    return Calibration(z, torch.as_tensor(p_values, device=x.device))


def anybody(p_values: Tensor) -> bool:
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


def benign_set(log_scores: Tensor, members: Tensor, p_values: Tensor, variance: float) -> Tensor:
    """Both decisions: the benign clients (K,) bool; everybody when nobody stands out.

    ``p_values`` are those calibrated on ``members``; decision (ii) starts from the members they do not reject.
    """
    if not anybody(p_values):
        return torch.ones_like(members)
    return least_error_set(log_scores, members & (p_values > simes_cut(p_values)), variance)


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
        updated = np.array([_is_benign(x, benign, k, variance) for k in range(len(x))])
        if (updated == benign).all():
            break
        benign = updated
    return torch.as_tensor(benign, device=log_scores.device)


def _is_benign(x: np.ndarray, benign: np.ndarray, k: int, variance: float) -> bool:
    """Is client k likelier benign than contaminated, judged by components fitted to the others?"""
    others = np.arange(len(x)) != k
    low, high = x[benign & others], x[~benign & others]
    if not len(low) or not len(high) or high.mean() <= low.mean():
        return bool(benign[k])
    if x[k] <= low.mean():
        return True
    n, m, quarter = len(low), len(high), (high.mean() - low.mean()) / 4
    tight = (PRIOR_CLIENTS * variance + low.var() * n) / (PRIOR_CLIENTS + n - 1)
    wide = max((quarter**2 + high.var() * m) / m, tight)
    as_benign = stats.t.logpdf(x[k], PRIOR_CLIENTS + n - 1, low.mean(), (tight * (1 + 1 / n)) ** 0.5)
    as_contaminated = stats.t.logpdf(x[k], m, high.mean(), (wide * (1 + 1 / m)) ** 0.5)
    return bool(as_benign + log(n) > as_contaminated + log(m))
