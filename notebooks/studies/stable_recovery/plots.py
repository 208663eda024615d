"""Figures of notebook 03; each function takes a tidy table of `studies.stable_recovery.study` and returns a Figure."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clairlib.plots import BENIGN, COLOURS, CONTAMINATED, NEUTRAL, STYLE, colour_of

FOUND, TOLD = "CLAIR", "CLAIR, told S and r"
NAMES = {
    "sigma": r"noise $\sigma$",
    "s": r"$s - 1 - (r+1)/q$",
    "p": r"$p - r$",
    "a": r"signal $a$",
    "q": r"$q$, rows of $A_k$ of fixed norm",
    "q_entry": r"$(s-1)q - r - 1$, entries fixed",
}
KINDS = {"white": (BENIGN, "white noise"), "coloured": (CONTAMINATED, "coloured noise")}


def _spread(centre: pd.Series, low: pd.Series, high: pd.Series) -> list[pd.Series]:
    """Return lengths of error bars; rounding may put a Wilson interval's end on the wrong side of a rate of 0 or 1."""
    return [(centre - low).clip(lower=0), (high - centre).clip(lower=0)]


def exponent_panels(groups: pd.DataFrame, slopes: pd.DataFrame) -> Figure:
    """Draw CLAIR's error against each size, log-log: a point per group of draws; a line is the first order.

    ``groups`` columns: axis, method, x, error, predicted; ``slopes``: axis, method, slope, low, high, predicted.
    """
    fits = slopes[slopes.method == FOUND].set_index("axis")
    with plt.style.context(STYLE):
        figure, panels = plt.subplots(2, 3, figsize=(11, 6.2))
        for axes, (axis, fit) in zip(panels.flat, fits.iterrows(), strict=True):
            points = groups[(groups.axis == axis) & (groups.method == FOUND)].sort_values("x")
            axes.loglog(points.x, points.predicted, color=NEUTRAL, label="first order")
            axes.loglog(points.x, points.error, "o", color=COLOURS[FOUND], alpha=0.6, label="CLAIR, nothing told")
            axes.set(xlabel=NAMES[str(axis)], title=f"slope {fit.slope:.3f} (predicted {fit.predicted:g})")
            _plain_ticks(axes, points)
        for axes in panels[:, 0]:
            axes.set_ylabel(r"$\|\sin\Theta\|_F$")
        panels[1][1].set_ylabel(r"$\|\sin\Theta\|_F$, finite size removed")
        panels[0][0].legend(fontsize=8)
    return figure


def _plain_ticks(axes: Axes, points: pd.DataFrame) -> None:
    """Set ticks at the levels, and a vertical range of at least a factor of four: a constant error looks flat."""
    levels = sorted(points.x.unique())
    axes.set_xticks(levels, [f"{level:.3g}" for level in levels])
    axes.minorticks_off()
    centre = np.sqrt(points.error.min() * points.error.max())
    factor = max(2.0, 1.3 * np.sqrt(points.error.max() / points.error.min()))
    axes.set_ylim(centre / factor, centre * factor)
    ticks = [t for t in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if centre / factor <= t <= centre * factor]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])


def slope_deviations(slopes: pd.DataFrame) -> Figure:
    """Draw the fitted exponent less the predicted one, with intervals; the grey band is what the claims allow."""
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(6.5, 3))
        axes.axvspan(-0.1, 0.1, color="#eeeeee")
        axes.axvline(0, color=NEUTRAL, linewidth=0.8)
        names = list(dict.fromkeys(slopes.axis))
        for shift, (method, marker) in zip((-0.13, 0.13), ((FOUND, "o"), (TOLD, "s")), strict=True):
            part = slopes[slopes.method == method]
            places = np.arange(len(part)) + shift
            centre = part.slope - part.predicted
            spread = _spread(part.slope, part.low, part.high)
            axes.errorbar(centre, places, xerr=spread, fmt=marker, color=COLOURS[method], capsize=2, label=method)
        axes.set_yticks(range(len(names)), [NAMES[name] for name in names])
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel("fitted exponent - predicted exponent")
        axes.set_xticks([-0.1, -0.05, 0, 0.05, 0.1], ["-0.1", "-0.05", "0", "0.05", "0.1"])
        axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2)
    return figure


def noise_curves(curve: pd.DataFrame, r: int) -> Figure:
    """Draw errors and verdicts from small noise to the breakdown, for white and coloured noise.

    ``curve`` is a result of ``study.noise_curve``. Dotted vertical lines mark the breakdown of each kind of noise.
    """
    with plt.style.context(STYLE):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4))
        for kind, (colour, label) in KINDS.items():
            told, found = (curve[(curve.axis == kind) & (curve.method == m)] for m in (TOLD, FOUND))
            spread = _spread(told.measured, told.low, told.high)
            below = told[told.noise < told.breakdown]
            left.errorbar(told.noise, told.measured, yerr=spread, fmt="s", color=colour, capsize=2, label=label)
            left.plot(below.noise, below.predicted, color=colour, linewidth=1.2)
            middle.loglog(told.noise, told.rms, "s-", color=colour, label=f"{label}, told S and r")
            middle.loglog(found.noise, found.rms, "o--", color=colour, mfc="white", label=f"{label}, CLAIR")
            spread = _spread(found.exact, found.exact_low, found.exact_high)
            right.errorbar(found.noise, found.exact, yerr=spread, fmt="o--", color=colour, capsize=2, mfc="white")
            for axes in (left, middle, right):
                axes.axvline(told.breakdown.iloc[0], color=colour, linestyle=":", linewidth=1)
        middle.axhline(r**0.5, color=NEUTRAL, linewidth=0.8)
        left.set(xscale="log", title="squared error over first order", ylim=(0, None))
        middle.set(title=r"root mean square $\|\sin\Theta\|_F$")
        right.set(xscale="log", title="CLAIR: exact set and rank", ylim=(-0.03, 1.05))
        _noise_axes(left, middle, right)
        left.legend(loc="upper left")
        middle.legend(loc="lower right", fontsize=8, frameon=True, framealpha=0.9)
    return figure


def _noise_axes(*panels: Axes) -> None:
    for axes in panels:
        ticks = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set(xlim=(0.004, 0.6), xlabel=r"noise $\sigma$ per entry")


def unequal_noise(ratios: pd.DataFrame, alarms: pd.DataFrame) -> Figure:
    """Draw the error that weights save, and CLAIR's false alarms without weights.

    ``ratios`` columns: unequal, measured, predicted, closed_form; ``alarms``: unequal, method, anybody, low, high.
    """
    levels = ratios.dropna()
    colours = {name: colour_of(name) for name in (FOUND, "CLAIR, no weights")}
    with plt.style.context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6))
        left.loglog(levels.unequal, levels.closed_form, color=NEUTRAL, label=r"$\sum w \sum 1/w\; /\; s^2$")
        left.loglog(levels.unequal, levels.predicted, "k_", markersize=16, label="first order, given $A_k$")
        left.loglog(levels.unequal, levels.measured, "s", color=COLOURS[TOLD], label="measured, told S and r")
        left.set(title="squared error without weights / with", xlabel="ratio of noise variances")
        for shift, (method, colour) in zip((0.98, 1.02), colours.items(), strict=True):
            part = alarms[alarms.method == method]
            spread = _spread(part.anybody, part.low, part.high)
            places = part.unequal * shift  # side by side
            right.errorbar(places, part.anybody, yerr=spread, fmt="o-", color=colour, capsize=2, label=method)
        right.set(xscale="log", title="draws with a false alarm", xlabel="ratio of noise variances")
        right.set_ylim(-0.03, 1.05)
        for axes in (left, right):
            axes.minorticks_off()
            axes.set_xticks(list(levels.unequal), [f"{level:g}" for level in levels.unequal])
        left.set_yticks([1, 1.5, 2, 3], ["1", "1.5", "2", "3"])
        left.legend()
        right.legend(loc="center", frameon=True, framealpha=0.9)
    return figure
