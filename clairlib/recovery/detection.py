"""Detection of contaminated clients: calibration of log scores on a set of benign clients, and two decisions.

Decision (i): is any client contaminated, one by one or as a group? If none is, the nominal family-wise error is
``FAMILY_ERROR``; it is measured, not proved. Decision (ii): which clients are contaminated? They are cut where a
two-component model of the log scores gives posterior one half, the least error.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import special, stats
from torch import Tensor

FAMILY_ERROR = 0.01
STRANGER_ERROR = 0.001  # level of the test for a group; together with Simes' half it stays within FAMILY_ERROR
CUT_ROUNDS = 30
SMALLEST_SHARE = 0.25  # least part of the benign clients that a set of members is taken to be
LEAST_KEPT_VARIANCE = 0.05  # least part of the variance of scores that a selected set is taken to show
PRIOR_CLIENTS = 6.0  # weight, in clients, of the variance under pure noise against the variance between members


@dataclass(frozen=True)
class Calibration:
    """Position (K,) of every client relative to the benign members; a member is compared with the other members only.

    ``z``: standard deviations from the members' mean log score; ``p_values``: chances that a benign score is as high.
    ``spread`` and ``freedom``: standard deviation of a client that is no member, and its degrees of freedom.
    """

    z: Tensor
    p_values: Tensor
    spread: float
    freedom: float


def calibrate(log_scores: Tensor, members: Tensor, variance: float) -> Calibration:
    """Compare every log score with those of the members, by a moderated t statistic.

    The members' variance is shrunk towards ``variance``, the variance under pure noise, with the weight of
    ``PRIOR_CLIENTS`` further clients (Smyth 2004). This keeps power if there are few members.
    """
    x, n = log_scores.double(), int(members.sum())
    deviation = x - x[members].mean()
    squares = deviation[members].square().sum()
    left = torch.where(members, n - 1, n)  # number of members with which each client is compared
    shift = torch.where(members, n / max(n - 1, 1), torch.ones_like(x))
    rest = torch.where(members, squares - deviation.square() * n / max(n - 1, 1), squares).clamp(min=0.0)
    lowered, kept = selection(x, members)
    freedom = PRIOR_CLIENTS + left - 1
    spread = ((PRIOR_CLIENTS * variance + rest / kept) / freedom).sqrt()
    seen = (rest / kept / (left - 1).clamp(min=1)).sqrt()
    centre = lowered * torch.minimum(seen, spread)
    z = (deviation * shift - centre) / (spread * (1 + 1 / left).sqrt())
    p_values = special.stdtr(freedom.cpu().numpy(), -z.cpu().numpy())  # upper tail of Student's t beyond z
    whole = (PRIOR_CLIENTS * variance + float(squares) / kept) / (PRIOR_CLIENTS + n - 1)
    spread_of_new = (whole * (1 + 1 / n)) ** 0.5
    return Calibration(z, torch.as_tensor(p_values, device=x.device), spread_of_new, PRIOR_CLIENTS + n - 1)


def selection(x: Tensor, members: Tensor) -> tuple[float, float]:
    """Return by how many standard deviations the members' mean lies below that of all, and the part of their variance.

    The members (K,) bool were selected as those with the least scores x (K,), so they are a normal sample cut at the
    smallest score of the others. With z the cut and lambda = phi(z) / Phi(z), the mean of such a sample is -lambda and
    its variance 1 - z lambda - lambda^2; mean and variance of the members are solved for z. Others that stand far apart
    were not cut off, and change nothing.
    """
    inside, others = x[members].double(), x[~members].double()
    others = others[others > inside.mean()]
    if len(inside) < 3 or not len(others):
        return 0.0, 1.0
    mean, spread, cut = float(inside.mean()), float(inside.std()), float(others.min())
    z = 3.0
    for _ in range(CUT_ROUNDS):
        tail = float(stats.norm.pdf(z) / stats.norm.cdf(z))
        kept = max(1 - z * tail - tail**2, LEAST_KEPT_VARIANCE)
        sigma = max(spread / kept**0.5, 1e-300)
        z = min(max((cut - mean) / sigma - tail, stats.norm.ppf(SMALLEST_SHARE)), 8.0)
    tail = float(stats.norm.pdf(z) / stats.norm.cdf(z))
    return tail, max(1 - z * tail - tail**2, LEAST_KEPT_VARIANCE)


def any_contaminated(p_values: Tensor) -> bool:
    """Decision (i): return whether Simes' test rejects that all clients are benign.

    The statistic is min_i K p_(i) / i over the sorted p-values (Simes 1986), with power if many clients stand out a
    little. Its level is a theorem for independent p-values. Here they are slightly dependent, so it is nominal. It is
    half of ``FAMILY_ERROR``; the search for members may spend the rest.
    """
    return simes_cut(p_values) >= 0


def simes_cut(p_values: Tensor, level: float = FAMILY_ERROR / 2) -> float:
    """Return the largest p-value p_(i) with K p_(i) / i <= ``level``, or -1 if there is none."""
    ordered = p_values.sort().values
    places = torch.arange(1, len(ordered) + 1, dtype=ordered.dtype, device=ordered.device)
    rejected = ordered[len(ordered) * ordered / places <= level]
    return float(rejected.max()) if len(rejected) else -1.0


def benign_set(log_scores: Tensor, members: Tensor, p_values: Tensor, variance: float, inside: Tensor) -> Tensor:
    """Make both decisions: return the benign clients (K,) bool, which are all clients if none stands out.

    ``p_values`` are calibrated on ``members``. ``inside`` (K,) are log energies inside the subspace. Decision (ii)
    starts from the members that Simes' test does not reject. If it rejects none, the suspects must lack inside energy.
    """
    if any_contaminated(p_values):
        return least_error_set(log_scores, members & (p_values > simes_cut(p_values)), variance)
    decided = least_error_set(log_scores, members, variance)
    return decided if lacks_subspace_energy(inside, ~decided) else torch.ones_like(members)


def lacks_subspace_energy(inside: Tensor, suspects: Tensor) -> bool:
    """Decision (i) for a group: return whether the suspects have less energy in the subspace than the other clients.

    ``inside`` (K,) are the log energies in the subspace, compared by a one-sided Mann-Whitney test at level
    ``STRANGER_ERROR``. A client that does not use the subspace has almost no energy in it, while the individual parts
    of benign clients inside it are exchangeable. The level is nominal, because the choice of suspects depends on the
    size of the part inside. This test never decides which clients are contaminated.
    """
    if not bool(suspects.any()) or bool(suspects.all()):
        return False
    x, s = inside.cpu().numpy(), suspects.cpu().numpy()
    return bool(stats.mannwhitneyu(x[s], x[~s], alternative="less").pvalue <= STRANGER_ERROR)


def least_error_set(log_scores: Tensor, members: Tensor, variance: float) -> Tensor:
    """Decision (ii): return the benign clients (K,) bool under a two-component model of the log scores.

    Starting from ``members``, every client is assigned to the likelier component until none moves, at most 30 times.
    Each component is normal with unknown centre and variance, estimated from the *other* clients, so a client's
    predictive distribution is a Student t. The benign variance is shrunk towards ``variance`` with the weight of
    ``PRIOR_CLIENTS`` clients; the contaminated one, with the weight of one client, towards the square of a quarter of
    the distance between the centres. A client below the benign centre is benign. A single suspect stays contaminated.
    """
    x = log_scores.double().cpu().numpy()
    benign = members.cpu().numpy().copy()
    for _ in range(30):
        updated = _likelier_benign(x, benign, variance)
        if (updated == benign).all():
            break
        benign = updated
    return torch.as_tensor(benign, device=log_scores.device)


def _likelier_benign(x: np.ndarray, benign: np.ndarray, variance: float) -> np.ndarray:
    """Return whether each client (K,) is likelier benign than contaminated, by components fitted to the others."""
    n, low, low_squares = _without_each(x, benign)
    m, high, high_squares = _without_each(x, ~benign)
    tight = (PRIOR_CLIENTS * variance + low_squares) / (PRIOR_CLIENTS + n - 1)
    wide = np.maximum(((high - low) ** 2 / 16 + high_squares) / m.clip(min=1), tight)
    as_benign = stats.t.logpdf(x, PRIOR_CLIENTS + n - 1, low, np.sqrt(tight * (1 + 1 / n.clip(min=1))))
    as_contaminated = stats.t.logpdf(x, m.clip(min=1), high, np.sqrt(wide * (1 + 1 / m.clip(min=1))))
    with np.errstate(divide="ignore"):
        likelier = as_benign + np.log(n) > as_contaminated + np.log(m)
    undecided = (n == 0) | (m == 0) | (high <= low)  # the components cannot be told apart
    return np.where(undecided, benign, (x <= low) | likelier)


def _without_each(x: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return size, mean and sum of squared deviations (K,) of a group of scores without each client in turn."""
    n = group.sum() - group
    mean = x[group].mean() if group.any() else 0.0
    shift = np.where(group, (x - mean) / n.clip(min=1), 0.0)  # decrease of the mean when the member is left out
    squares = ((x[group] - mean) ** 2).sum() - shift * (x - mean) * (n + 1)
    return n, mean - shift, squares.clip(min=0.0)
