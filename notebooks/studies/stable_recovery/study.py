"""How the subspace error grows with preliminary estimation error (Statement 2b, this project's; see notebook 03)."""

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

SHARE = 0.3  # contaminated share, unstructured
FOUND, TOLD = "CLAIR", "CLAIR, told S and r"  # the second is the oracle
UNWEIGHTED = {FOUND: "CLAIR, no weights", TOLD: "told S and r, no weights"}
LEVEL = 1 - 0.05 / 9  # nine intervals of the notebook must hold their prediction: together at 95 % (Bonferroni)
CLOSE = 1.05  # an error at most this many times the oracle's counts as equal
PREDICTED = {"sigma": 1.0, "s": -0.5, "p": 0.5, "a": -1.0, "q": 0.0, "q_entry": -0.5}  # exponent by axis


@dataclass(frozen=True)
class Setting:
    """Planted clients: ``noise`` sigma per entry, ``signal`` a the norm of a row of A_k, ``unequal`` the noise variance
    of every second client over that of the others.
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
        """What the closed forms of ``clairlib.theory.stable_recovery`` depend on."""
        return self.noise, self.p, self.q, self.s, self.r, self.signal

    @property
    def weights(self) -> Tensor | None:
        """Inverse noise variances (K,) up to scale; None where equal."""
        noisy = torch.arange(self.K) % 2 == 1
        return torch.where(noisy, 1 / self.unequal, 1.0).double() if self.unequal != 1 else None


BASE = Setting()


def setting(axis: str, level: float) -> Setting:
    """``BASE`` with one thing changed.

    Axes of exponents: sigma, s (level: K), p, a, q (rows of A_k keep their norm: entries shrink as q^(-1/2)), q_entry
    (entries of A_k keep their size). Curves over the noise: white, coloured. And unequal.
    """
    knobs = {"sigma": "noise", "white": "noise", "coloured": "noise", "s": "K", "a": "signal", "q_entry": "q"}
    knob = knobs.get(axis, axis)
    chosen = replace(BASE, **{knob: type(getattr(BASE, knob))(level)})
    if axis == "q_entry":
        chosen = replace(chosen, signal=(level / BASE.q) ** 0.5)
    return replace(chosen, row_correlation=0.6) if axis == "coloured" else chosen


def regressor(axis: str, level: float) -> float:
    """The quantity of which the first-order error is an exact power on an axis; q itself on axis q."""
    c = setting(axis, level)
    freedom = c.s - 1 - (c.r + 1) / c.q
    return {"s": freedom, "p": c.p - c.r, "q_entry": c.q * freedom}.get(axis, level)


def stability_cell(axis: str, level: float, group: int, draws: int, seed: int) -> dict[str, Rows]:
    """One group of draws at one level: the subspace's error by method, beside what is predicted for it."""
    chosen = setting(axis, level)
    names = ("stability", axis, str(level), group)
    truths = [plant(chosen, derive(seed, *names, draw)) for draw in range(draws)]
    return {"stability": [{"draw": i, **row} for i, truth in enumerate(truths) for row in measure(chosen, truth)]}


def plant(chosen: Setting, generator: Generator) -> Planted:
    """Planted clients of a setting, in units of the signal.

    ``planted`` has rows of A_k of unit norm. M + a U A_k + E_k = a (M / a + U A_k + E_k / a) has the same subspaces as
    the bracket, so noise and common part are divided by a.
    """
    noise, p, q, _, r, a = chosen.sizes
    rest = {"row_correlation": chosen.row_correlation, "weights": chosen.weights, "generator": generator}
    return planted(share=SHARE, K=chosen.K, p=p, q=q, r=r, noise_std=noise / a, common_norm=1 / a, **rest)  # type: ignore[arg-type]


def measure(chosen: Setting, truth: Planted) -> Rows:
    """A row per method, CLAIR and the oracle, both with and without weights where noise is unequal.

    ``first`` is the first-order squared error, an expectation over clients; ``given`` that given this draw's
    coefficients and subspace; ``beyond`` what is predicted beyond first order; ``bound`` that of Statement 2b (i).
    The last two are for equal weights.
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
    """Errors of a basis and of a verdict against the truth; ``noisy``: every second client."""
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
    """``stability_cell`` over axes, their levels and groups; a row per draw and method.

    ``group`` divides ``draws``; ``how`` goes to ``experiments.sweep`` (cache, jobs).
    """
    if group < 1 or draws % group:
        raise ValueError(f"groups of {group} do not divide {draws} draws")
    how_many = {"draws": group, "seed": seed}
    places = itertools.product(((axis, level) for axis in axes for level in axes[axis]), range(draws // group))
    cells = [{"axis": axis, "level": level, "group": g, **how_many} for (axis, level), g in places]
    return sweep(stability_cell, cells, **how)["stability"]


def angles(draws: pd.DataFrame) -> pd.DataFrame:
    """Draws in which the rank is found: Theta has r angles. The others count in ``against_oracle``."""
    return draws[draws.exact_rank]


def group_errors(draws: pd.DataFrame) -> pd.DataFrame:
    """Root mean squares over each group of draws, a point of the regressions; draws with the rank found (``angles``).

    n draws average n (p - r) r squared normals, so the log of their root mean square is off by -1 / (2 n (p - r) r)
    only. On axis q errors are multiplied by sqrt(s - 1 - (r + 1) / q), their finite-size part.
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
    """Log-log slope by axis and method, OLS with intervals that allow for unequal spread (HC3), and the prediction."""
    rows = []
    for (axis, method), part in groups.groupby(["axis", "method"], sort=False):
        row = dict(zip(("slope", "low", "high"), slope_interval(part.x, part.error, level), strict=True))
        rows.append({"axis": axis, "method": method, "points": len(part), **row, "predicted": PREDICTED[axis]})
    return pd.DataFrame(rows)


def largest_exponents(groups: pd.DataFrame, level: float = LEVEL) -> pd.DataFrame:
    """The same in p for the largest sine, whose finite-size slope is that of ``rates.largest_sine``, below 1/2."""
    rows = []
    for method, part in groups[groups.axis == "p"].groupby("method", sort=False):
        corrected = [rates.largest_sine(*setting("p", p).sizes) for p in part.level]
        row = dict(zip(("slope", "low", "high"), slope_interval(part.x, part.largest, level), strict=True))
        row |= {"uncorrected": 0.5, "corrected": slope_interval(part.x, corrected, level)[0]}
        rows.append({"method": method, **row})
    return pd.DataFrame(rows)


def against_oracle(draws: pd.DataFrame) -> pd.DataFrame:
    """CLAIR's error over the oracle's by cell: median, share of at most ``CLOSE`` (Wilson), wrong ranks and sets."""
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
    """Squared error over the first-order one given each draw, by method, rank found: mean and interval."""
    rows = []
    for method, part in angles(draws).groupby("method", sort=False):
        mean, low, high = mean_interval(part.error**2 / part.given, level)
        rows.append({"method": method, "draws": len(part), "over_predicted": mean, "low": low, "high": high})
    return pd.DataFrame(rows)


def noise_curve(draws: pd.DataFrame, level: float = LEVEL) -> pd.DataFrame:
    """Axes white and coloured: squared error over first order, what is predicted beyond it, CLAIR's verdicts.

    ``measured`` and ``predicted`` are mean squared errors over the first-order one, ``breakdown`` the noise at which
    nothing of the subspace is left, ``exact`` (Wilson interval) the share of draws with the set and the rank found.
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
    """Largest relative error of the oracle's predicted squared error, at noise up to ``part`` of the breakdown."""
    known = curve[(curve.method == TOLD) & (curve.noise <= part * curve.breakdown)]
    return float((known.over_predicted - 1).abs().max())


def weights_ratio(draws: pd.DataFrame, level: float = LEVEL) -> pd.DataFrame:
    """Axis unequal: the oracle's squared error without weights over that with them, geometric means over draws.

    ``predicted`` is the first-order ratio given each draw, ``over_predicted`` the measured one relative to it, with its
    interval; ``closed_form`` has half the clients noisy. The row with unequal = NaN pools the levels.
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
    """Axis unequal: how often CLAIR flags benign clients (Wilson interval), which ones, and what it costs.

    ``anybody`` is the share of draws in which a benign client is flagged; ``noisy``, ``others`` shares of the benign
    clients with more and with less noise; ``error_ratio`` (rank found) to the oracle with weights, root mean squares.
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
