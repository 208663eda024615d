"""Means, rates and slopes with intervals, and the agreement of many with theory."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.proportion import proportion_confint


def mean_interval(values: Iterable[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean and its t interval; NaN ends for a single value."""
    x = np.asarray(list(values), dtype=float)
    if len(x) < 2:
        return float(x.mean()), float("nan"), float("nan")
    half = stats.t.ppf(0.5 + level / 2, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)

def rate_interval(successes: int, trials: int, level: float = 0.95) -> tuple[float, float, float]:
    """Share of successes and its Wilson interval."""
    low, high = proportion_confint(successes, trials, 1 - level, method="wilson")
    return successes / trials, float(low), float(high)


def slope_interval(x: Iterable[float], y: Iterable[float], level: float) -> tuple[float, float, float]:
    """Slope of log y on log x by ordinary least squares, with its interval."""
    design = sm.add_constant(np.log(np.asarray(list(x), dtype=float)))
    fit = sm.OLS(np.log(np.asarray(list(y), dtype=float)), design).fit(cov_type="HC3", use_t=True)
    low, high = fit.conf_int(1 - level)[1]
    return float(fit.params[1]), float(low), float(high)


def agreement(summary: pd.DataFrame, by: str = "term") -> pd.DataFrame:
    """How far the z of many independent cells are from chance: largest |z|, chi-square, and the p-value of both.

    ``beyond_3`` cells have |z| > 3 where chance gives ``expected``; ``p_max`` is the chance that the largest of so many
    is as large. z follows Student's law with draws - 1 degrees of freedom and is carried to the normal law first.
    """
    rows = []
    for name, group in summary.dropna(subset="z").groupby(by, sort=False):
        z = stats.norm.isf(stats.t.sf(group.z.abs(), group.draws - 1))
        p_max = -np.expm1(len(z) * np.log1p(-2 * stats.norm.sf(z.max())))
        row = {by: name, "cells": len(z), "max_z": z.max(), "p_max": p_max, "beyond_3": int((z > 3).sum())}
        row |= {"expected": len(z) * 2 * stats.norm.sf(3), "chi_square": (z**2).sum()}
        rows.append({**row, "p_value": stats.chi2.sf((z**2).sum(), len(z))})
    return pd.DataFrame(rows)
