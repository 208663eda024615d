"""Who is contaminated: calibration of log scores on a set of benign clients, and the two decisions.

(i) Is anybody contaminated? Family-wise error at most ``FAMILY_ERROR`` when nobody is.
(ii) If so, who? The cut that errs least: where a two-component model of the log scores gives posterior one half.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy import stats
from statsmodels.stats.multitest import multipletests
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
    shift = torch.where(members, n / max(n - 1, 1), 1.0)
    rest = torch.where(members, squares - deviation.square() * n / max(n - 1, 1), squares).clamp(min=0.0)
    freedom = PRIOR_CLIENTS + left - 1
    spread = ((PRIOR_CLIENTS * variance + rest) / freedom).sqrt()
    z = deviation * shift / (spread * (1 + 1 / left).sqrt())
    p_values = stats.t.sf(z.cpu().numpy(), freedom.cpu().numpy())
    return Calibration(z, torch.as_tensor(p_values, device=x.device))


def anybody(p_values: Tensor) -> bool:
    """Decision (i): does Holm's procedure reject for at least one client at family-wise error ``FAMILY_ERROR``?"""
    return bool(multipletests(p_values.cpu().numpy(), alpha=FAMILY_ERROR, method="holm")[0].any())


def least_error_cut(log_scores: Tensor, benign: Tensor, variance: float, rounds: int = 50) -> Tensor:
    """Decision (ii): the benign clients (K,) bool under a two-component normal model of the log scores.

    Starts from ``benign`` and alternates between fitting both components (variances shrunk: the benign one towards
    ``variance``, the contaminated one towards the square of half the distance between the centres, as a handful of
    contaminated clients says little about their spread) and giving each client to the likelier component.
    A client below the benign centre is benign.
    """
    x = log_scores.double()
    for _ in range(rounds):
        n, m = int(benign.sum()), int((~benign).sum())
        if n == 0 or m == 0:
            return benign
        low, high = x[benign].mean(), x[~benign].mean()
        if high <= low:
            return benign
        tight = (PRIOR_CLIENTS * variance + (x[benign] - low).square().sum()) / (PRIOR_CLIENTS + n)
        wide = ((high - low).square() / 4 + (x[~benign] - high).square().sum()) / (1 + m)
        wide = torch.maximum(wide, tight)
        log_odds = (x - high).square() / (2 * wide) - (x - low).square() / (2 * tight)
        log_odds = log_odds + 0.5 * (wide / tight).log() + torch.log(torch.tensor(n / m))
        updated = (log_odds > 0) | (x <= low)
        if torch.equal(updated, benign):
            break
        benign = updated
    return benign
