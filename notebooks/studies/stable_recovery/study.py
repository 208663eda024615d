"""Growth of the subspace error with the noise of the updates (Statement 2b of notebook 03, this project's)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Generator, Tensor

from clairlib import CLAIR
from clairlib.core.seeds import derive
from clairlib.linalg.subspace import sin_theta
from clairlib.recovery.frame import fit_frame
from clairlib.reproduce.sweep import Rows, sweep
from clairlib.simulate import Planted, planted
from clairlib.theory import stable_recovery as rates
from studies.common.intervals import mean_interval, rate_interval, slope_interval

SHARE = 0.3  # fraction of contaminated clients, which are unstructured
FOUND, TOLD = "CLAIR", "CLAIR, told S and r"  # TOLD is the oracle
UNWEIGHTED = {FOUND: "CLAIR, no weights", TOLD: "told S and r, no weights"}
LEVEL = 1 - 0.05 / 9  # Bonferroni: nine intervals of the notebook hold jointly at 95 %
CLOSE = 1.05  # an error up to this multiple of the oracle's counts as equal
PREDICTED = {"sigma": 1.0, "s": -0.5, "p": 0.5, "a": -1.0, "q": 0.0, "q_entry": -0.5}  # exponent by axis


@dataclass(frozen=True)
class Setting:
    """Parameters of planted clients.

    ``noise`` is sigma, the standard deviation of an entry's noise. ``signal`` is a, the norm of a row of A_k.
    ``unequal`` is the noise variance of every second client over that of the others.
    """

    K: int = 24
    p: int = 50
    q: int = 10
    r: int = 3
    noise: float = 0.01
    signal: float = 1.0
    row_correlation: float = 0.0
    unequal: float = 1.0

    @property
    def s(self) -> int:
        """Number of benign clients."""
        return self.K - round(SHARE * self.K)

    @property
    def sizes(self) -> tuple[float, int, int, int, int, float]:
        """Arguments (sigma, p, q, s, r, a) of the closed forms in ``clairlib.theory.stable_recovery``."""
        return self.noise, self.p, self.q, self.s, self.r, self.signal

    @property
    def weights(self) -> Tensor | None:
        """Inverse noise variances (K,) up to scale; None where all are equal."""
        noisy = torch.arange(self.K) % 2 == 1
        return torch.where(noisy, 1 / self.unequal, 1.0).double() if self.unequal != 1 else None


BASE = Setting()


def setting(axis: str, level: float) -> Setting:
    """Return ``BASE`` with one axis set to a level.

    Axes for the exponents: sigma, s (the level is K), p, a, q (rows of A_k keep their norm, so entries shrink as
    q^(-1/2)) and q_entry (entries of A_k keep their size). Axes for the curves over the noise: white and coloured. Axis
    for unequal noise variances: unequal.
    """
    knobs = {"sigma": "noise", "white": "noise", "coloured": "noise", "s": "K", "a": "signal", "q_entry": "q"}
    knob = knobs.get(axis, axis)
    chosen = replace(BASE, **{knob: type(getattr(BASE, knob))(level)})
    if axis == "q_entry":
        chosen = replace(chosen, signal=(level / BASE.q) ** 0.5)
    return replace(chosen, row_correlation=0.6) if axis == "coloured" else chosen


def regressor(axis: str, level: float) -> float:
    """Return the quantity in which the first-order error is an exact power on an axis; on axis q, return q itself."""
    c = setting(axis, level)
    freedom = c.s - 1 - (c.r + 1) / c.q
    return {"s": freedom, "p": c.p - c.r, "q_entry": c.q * freedom}.get(axis, level)


def stability_cell(axis: str, level: float, group: int, draws: int, seed: int) -> dict[str, Rows]:
    """Measure one group of draws at one level: subspace error by method, and its predicted value."""
    chosen = setting(axis, level)
    names = ("stability", axis, str(level), group)
    truths = [plant(chosen, derive(seed, *names, draw)) for draw in range(draws)]
    return {"stability": [{"draw": i, **row} for i, truth in enumerate(truths) for row in measure(chosen, truth)]}


def plant(chosen: Setting, generator: Generator) -> Planted:
    """Draw planted clients of a setting, in units of the signal a.

    Rows of A_k from ``planted`` have norm 1. Noise and common part are divided by a, because
    M + a U A_k + E_k = a (M / a + U A_k + E_k / a) has the same subspaces as the bracket.
    """
    noise, p, q, _, r, a = chosen.sizes
    rest = {"row_correlation": chosen.row_correlation, "weights": chosen.weights, "generator": generator}
    return planted(share=SHARE, K=chosen.K, p=p, q=q, r=r, noise_std=noise / a, common_norm=1 / a, **rest)  # type: ignore[arg-type]


def measure(chosen: Setting, truth: Planted) -> Rows:
    """Measure one draw: a row per method, for CLAIR and the oracle, with and without weights where noise is unequal.

    ``first`` is the first-order squared error in expectation over clients. ``given`` is that error given this draw's
    coefficients and subspace. ``beyond`` is the prediction beyond first order, and ``bound`` the bound of Statement 2b
    (i); both hold for equal weights.
    """
    X, w, U, S = truth.updates, chosen.weights, truth.basis, truth.benign
    A = U.T @ truth.targets[S]
    covariance = (chosen.noise / chosen.signal) ** 2 * rates.row_covariance(chosen.p, chosen.row_correlation)
    spread = float(covariance.trace() - (U.T @ covariance @ U).trace())
    white = chosen.row_correlation == 0
    shared = {
        "first": rates.first_order(*chosen.sizes),
        "beyond": rates.spiked(*chosen.sizes) if white else rates.coloured(U, covariance, chosen.q, chosen.s),
        "bound": rates.stability_bound((X - truth.targets)[S], A),
    }
    rows: Rows = []
    for used in [w] if w is None else [w, None]:
        known = torch.ones(len(X), dtype=torch.float64) if used is None else used
        result = CLAIR().fit(X, weights=used)
        oracle = fit_frame(X, known, S, chosen.r).basis
        variances = None if w is None else 1 / w[S]
        given = rates.first_order_given(A, spread, weights=known[S], variances=variances)
        for method, basis, verdict in ((FOUND, result.basis, result.benign), (TOLD, oracle, S)):
            named = method if used is w else UNWEIGHTED[method]
            rows.append({"method": named, "given": given, **shared, **compare(basis, verdict, truth)})
    return rows


def compare(basis: Tensor, verdict: Tensor, truth: Planted) -> dict[str, Any]:
    """Measure the errors of a basis and of a verdict against the truth; ``noisy`` columns count every second client."""
    noisy = torch.arange(len(verdict)) % 2 == 1
    return {
        "error": rates.subspace_distance(basis, truth.basis),
        "largest": sin_theta(basis, truth.basis),
        "exact": bool(torch.equal(verdict, truth.benign)),
        "exact_rank": basis.shape[1] == truth.rank,
        "false_alarms": int((~verdict & truth.benign).sum()),
        "noisy": int((truth.benign & noisy).sum()),
        "noisy_flagged": int((~verdict & truth.benign & noisy).sum()),
    }


def stability_study(
    axes: Mapping[str, Sequence[float]], draws: int, group: int, *, seed: int = 0, **how: Any
) -> pd.DataFrame:
    """Run ``stability_cell`` over axes, their levels and groups of draws; one row per draw and method.

    ``group`` is the number of draws in a group. ``how`` goes to ``clairlib.reproduce.sweep.sweep`` (cache, jobs).

    Raises
    ------
    ValueError
        ``group`` does not divide ``draws``.
    """
    if group < 1 or draws % group:
        raise ValueError(f"groups of {group} do not divide {draws} draws")
    how_many = {"draws": group, "seed": seed}
    places = itertools.product(((axis, level) for axis in axes for level in axes[axis]), range(draws // group))
    cells = [{"axis": axis, "level": level, "group": g, **how_many} for (axis, level), g in places]
    return sweep(stability_cell, cells, **how)["stability"]


def angles(draws: pd.DataFrame) -> pd.DataFrame:
    """Return the draws in which the rank is found, so that Theta has r angles; `against_oracle` uses all draws."""
    return draws[draws.exact_rank]


def group_errors(draws: pd.DataFrame) -> pd.DataFrame:
    """Compute the root mean square error of each group of draws; each group is one point of the regressions.

    Only draws with the right rank count (``angles``). A group of n draws averages n (p - r) r squared normals, so the
    log of its root mean square has a bias of only -1 / (2 n (p - r) r). On axis q errors are multiplied by
    sqrt(s - 1 - (r + 1) / q), which removes their finite-size part.
    """
    rows = []
    for (axis, level, number, method), part in angles(draws).groupby(["axis", "level", "group", "method"], sort=False):
        c = setting(axis, level)
        factor = (c.s - 1 - (c.r + 1) / c.q) ** 0.5 if axis == "q" else 1.0
        row = {"axis": axis, "level": level, "group": number, "method": method, "x": regressor(axis, level)}
        row |= {name: factor * part[name].pow(2).mean() ** 0.5 for name in ("error", "largest")}
        rows.append(row | {"predicted": factor * part["first"].iloc[0] ** 0.5})
    return pd.DataFrame(rows)


def exponents(groups: pd.DataFrame, level: float = LEVEL) -> pd.DataFrame:
    """Fit the log-log slope by axis and method, and add the prediction.

    The fit is ordinary least squares with HC3 intervals, which allow for unequal variances.
    """
    rows = []
    for (axis, method), part in groups.groupby(["axis", "method"], sort=False):
        row = dict(zip(("slope", "low", "high"), slope_interval(part.x, part.error, level), strict=True))
        rows.append({"axis": axis, "method": method, "points": len(part), **row, "predicted": PREDICTED[axis]})
    return pd.DataFrame(rows)


def largest_exponents(groups: pd.DataFrame, level: float = LEVEL) -> pd.DataFrame:
    """Fit the log-log slope in p of the largest sine, whose predicted finite-size slope is below 1/2.

    ``corrected`` is the slope of ``rates.largest_sine`` over the same p.
    """
    rows = []
    for method, part in groups[groups.axis == "p"].groupby("method", sort=False):
        corrected = [rates.largest_sine(*setting("p", p).sizes) for p in part.level]
        row = dict(zip(("slope", "low", "high"), slope_interval(part.x, part.largest, level), strict=True))
        row |= {"uncorrected": 0.5, "corrected": slope_interval(part.x, corrected, level)[0]}
        rows.append({"method": method, **row})
    return pd.DataFrame(rows)


def against_oracle(draws: pd.DataFrame) -> pd.DataFrame:
    """Compare CLAIR's error with the oracle's in each cell.

    Columns: median ratio, proportion of ratios up to ``CLOSE`` (Wilson interval), numbers of wrong sets and wrong
    ranks, and proportion of draws in which the oracle's largest sine exceeds the bound.
    """
    rows = []
    for (axis, level), part in draws.groupby(["axis", "level"], sort=False):
        found, told = (part[part.method == method].reset_index() for method in (FOUND, TOLD))
        ratio = found.error / told.error
        share, low, high = rate_interval(int((ratio <= CLOSE).sum()), len(ratio))
        row = {"axis": axis, "level": level, "draws": len(ratio), "median": ratio.median(), "share_close": share}
        row |= {"low": low, "high": high, "wrong_set": (~found.exact).sum(), "wrong_rank": (~found.exact_rank).sum()}
        rows.append(row | {"over_bound": (told.largest > told.bound).mean()})
    return pd.DataFrame(rows)


def over_prediction(draws: pd.DataFrame, level: float = LEVEL) -> pd.DataFrame:
    """Average squared error over its first-order prediction given each draw, by method, where the rank is found."""
    rows = []
    for method, part in angles(draws).groupby("method", sort=False):
        mean, low, high = mean_interval(part.error**2 / part.given, level)
        rows.append({"method": method, "draws": len(part), "over_predicted": mean, "low": low, "high": high})
    return pd.DataFrame(rows)


def noise_curve(draws: pd.DataFrame, level: float = LEVEL) -> pd.DataFrame:
    """Summarise axes white and coloured: squared error, its prediction beyond first order, and CLAIR's verdicts.

    ``measured`` and ``predicted`` are mean squared errors over the first-order one. ``breakdown`` is the noise level at
    which the estimated subspace keeps nothing of the true one. ``exact`` (Wilson interval) is the proportion of draws
    with the right set and rank.
    """
    rows = []
    for (axis, noise, method), part in draws.groupby(["axis", "level", "method"], sort=False):
        c, first = setting(axis, noise), part["first"].iloc[0]
        mean, low, high = (end / first for end in mean_interval(part.error**2, level))
        row = {"axis": axis, "noise": noise, "method": method, "measured": mean, "low": low, "high": high}
        row |= {"predicted": part.beyond.mean() / first, "over_predicted": mean * first / part.beyond.mean()}
        row |= {"rms": (mean * first) ** 0.5, "breakdown": rates.breakdown(*c.sizes[1:])}
        if c.row_correlation:
            row["breakdown"] = min(row["breakdown"], rates.coloured_breakdown(c.row_correlation, c.q))
        found = rate_interval(int((part.exact & part.exact_rank).sum()), len(part))
        rows.append(row | dict(zip(("exact", "exact_low", "exact_high"), found, strict=True)))
    return pd.DataFrame(rows)


def worst_prediction(curve: pd.DataFrame, part: float = 0.5) -> float:
    """Return the oracle's largest relative prediction error of squared error, at noise up to ``part`` of breakdown."""
    known = curve[(curve.method == TOLD) & (curve.noise <= part * curve.breakdown)]
    return float((known.over_predicted - 1).abs().max())


def weights_ratio(draws: pd.DataFrame, level: float = LEVEL) -> pd.DataFrame:
    """Compare the oracle's squared error without and with weights on axis unequal; geometric means over draws.

    ``predicted`` is the first-order ratio given each draw. ``over_predicted`` is the measured ratio over it, with its
    interval. ``closed_form`` assumes that half the clients are noisy. The row with unequal = NaN pools all levels.
    """
    keys = ["level", "group", "draw"]
    with_, without = (draws[draws.method == m].set_index(keys) for m in (TOLD, UNWEIGHTED[TOLD]))
    measured, predicted = 2 * np.log(without.error / with_.error), np.log(without.given / with_.given)
    rows = []
    for unequal in [*dict.fromkeys(draws.level), float("nan")]:
        at = np.isin(measured.index.get_level_values("level"), unequal) | np.isnan(unequal)
        over = np.exp(mean_interval(measured[at] - predicted[at], level))
        row = {"unequal": unequal, "draws": int(at.sum()), "measured": np.exp(measured[at].mean())}
        row["predicted"] = np.exp(predicted[at].mean())
        row["closed_form"] = rates.unweighted_over_weighted(torch.tensor([1.0, 1 / unequal]))
        rows.append(row | dict(zip(("over_predicted", "low", "high"), over, strict=True)))
    return pd.DataFrame(rows)


def false_alarms(draws: pd.DataFrame) -> pd.DataFrame:
    """Measure on axis unequal how often CLAIR flags benign clients, which ones, and the effect on the error.

    ``anybody`` is the proportion of draws with at least one benign client flagged (Wilson interval). ``noisy`` and
    ``others`` are the proportions flagged among benign clients with more and with less noise. ``error_ratio`` is
    CLAIR's root mean square error, where the rank is found, over that of the oracle with weights.
    """
    rows = []
    for (unequal, method), part in draws.groupby(["level", "method"], sort=False):
        if method in (FOUND, UNWEIGHTED[FOUND]):
            rate, low, high = rate_interval(int((part.false_alarms > 0).sum()), len(part))
            row = {"unequal": unequal, "method": method, "draws": len(part), "anybody": rate, "low": low, "high": high}
            row["noisy"] = part.noisy_flagged.sum() / part.noisy.sum()
            row["others"] = (part.false_alarms - part.noisy_flagged).sum() / (BASE.s - part.noisy).sum()
            told = draws[(draws.level == unequal) & (draws.method == TOLD)].error.pow(2).mean()
            rows.append(row | {"error_ratio": (angles(part).error.pow(2).mean() / told) ** 0.5})
    return pd.DataFrame(rows)
