"""Confidence intervals for means, rates and slopes, and a test of many z scores against theory."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd
import statsmodels.api as sm
from scipy import stats
from statsmodels.stats.proportion import proportion_confint


def mean_interval(values: Iterable[float], level: float = 0.95) -> tuple[float, float, float]:
    """Return the mean and the two ends of its t interval; the ends are NaN for a single value."""
    x = np.asarray(list(values), dtype=float)
    if len(x) < 2:
        return float(x.mean()), float("nan"), float("nan")
    half = stats.t.ppf(0.5 + level / 2, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)

def rate_interval(successes: int, trials: int, level: float = 0.95) -> tuple[float, float, float]:
    """Return the proportion of successes and the two ends of its Wilson interval."""
    low, high = proportion_confint(successes, trials, 1 - level, method="wilson")
    return successes / trials, float(low), float(high)


def slope_interval(x: Iterable[float], y: Iterable[float], level: float) -> tuple[float, float, float]:
    """Return the slope of log y on log x and the two ends of its interval.

    The fit is ordinary least squares with HC3 standard errors, which allow for unequal variances.
    """
    design = sm.add_constant(np.log(np.asarray(list(x), dtype=float)))
    fit = sm.OLS(np.log(np.asarray(list(y), dtype=float)), design).fit(cov_type="HC3", use_t=True)
    low, high = fit.conf_int(1 - level)[1]
    return float(fit.params[1]), float(low), float(high)


def agreement(summary: pd.DataFrame, by: str = "term") -> pd.DataFrame:
    """Test whether the z scores of many independent cells are compatible with chance; one row per group of ``by``.

    ``max_z`` is the largest |z|, and ``p_max`` is the probability that the largest |z| of that many cells is at least
    so large. ``beyond_3`` counts the cells with |z| > 3, and ``expected`` is the count expected by chance.
    ``chi_square`` is the sum of all z^2, and ``p_value`` its p-value. z follows Student's t distribution with draws - 1
    degrees of freedom; it is first transformed to the standard normal distribution.
    """
    rows = []
    for name, group in summary.dropna(subset="z").groupby(by, sort=False):
        z = stats.norm.isf(stats.t.sf(group.z.abs(), group.draws - 1))
        p_max = -np.expm1(len(z) * np.log1p(-2 * stats.norm.sf(z.max())))
        row = {by: name, "cells": len(z), "max_z": z.max(), "p_max": p_max, "beyond_3": int((z > 3).sum())}
        row |= {"expected": len(z) * 2 * stats.norm.sf(3), "chi_square": (z**2).sum()}
        rows.append({**row, "p_value": stats.chi2.sf((z**2).sum(), len(z))})
    return pd.DataFrame(rows)
