"""Figures of notebook 06; each function takes tables of `studies.linear_regression.study` and returns a Figure."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clairlib.plots import BENIGN, CONTAMINATED, NEUTRAL, STYLE, colour_of
from studies.linear_regression import study

DRAWN = {
    study.SINGLE: colour_of("local"),
    **{name: colour_of(name) for name in ("PCA", "block FMS", "spectral")},
    **{name: colour_of(name) for name in (study.CLAIR_ALONE, study.POOLED, study.TOLD_RANK, study.ORACLE_POOLED)},
}


def largest_errors(summary: pd.DataFrame, cells: list[str], published: pd.DataFrame | None = None) -> Figure:
    """Draw the mean of the largest inlier error with its interval, by cell and method; lines are published means.

    ``summary`` is a result of ``study.summarise``. ``cells`` lists its columns that identify a cell. ``published`` has
    the same columns and ARMUL.
    """
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(11, 3.8))
        places = {cell: i for i, cell in enumerate(summary.groupby(cells, sort=False).groups)}
        names = [name for name in DRAWN if name in set(summary.method)]
        for i, name in enumerate(names):
            rows = summary[summary.method == name]
            x = np.array([places[cell] for cell in _cells(rows, cells)]) + (i - (len(names) - 1) / 2) * 0.1
            spread = [rows.error - rows.low, rows.high - rows.error]
            axes.bar(x, rows.error, width=0.09, color=DRAWN[name], yerr=spread, error_kw={"linewidth": 1}, label=name)
        if published is not None:
            x = np.array([places[cell] for cell in _cells(published, cells) if cell in places])
            values = [v for cell, v in zip(_cells(published, cells), published.ARMUL, strict=True) if cell in places]
            axes.hlines(values, x - 0.45, x + 0.45, color="black", linewidth=1, label="ARMUL, as published")
        axes.set_xticks(list(places.values()), [_words(cells, cell) for cell in places], fontsize=8)
        axes.set(ylabel="largest inlier $\\ell_2$ error", ylim=(0, None))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    return figure


def _cells(rows: pd.DataFrame, cells: list[str]) -> list[tuple[object, ...]]:
    return list(rows[cells].itertuples(index=False, name=None))


def _words(names: list[str], cell: tuple[object, ...]) -> str:
    parts = []
    for name, value in zip(names, cell, strict=True):
        shown = f"{value:.0%} contaminated" if name == "share" else f"{value}" if isinstance(value, str) else ""
        parts.append(shown or f"{name}-subspace part {value:g}")
    return "\n".join(parts)


def covariance(table: pd.DataFrame) -> Figure:
    """Draw the error told S and P over two formulas (left), and the other methods' errors over the exact one (right).

    ``table`` is a result of ``study.summarise_responses``; each cell is a row of points.
    """
    with plt.style.context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 0.9 + 0.34 * len(table)), sharey=True)
        places = np.arange(len(table))
        for formula, marker, colour in (("exact", "o", BENIGN), ("isotropic", "x", CONTAMINATED)):
            left.plot(table["told S and P"] / table[formula], places, marker, color=colour, label=f"over {formula}")
        left.axvline(1, color=NEUTRAL, linewidth=0.8)
        left.set_xlabel("error told S and P / Statement 4")
        for name, marker, colour in (
            (study.ORACLE, "o", colour_of(study.ORACLE)),
            (study.CLAIR_ALONE, "o", colour_of(study.CLAIR_ALONE)),
            (study.ORACLE_POOLED, "s", colour_of(study.ORACLE_POOLED)),
            (study.POOLED, "s", colour_of(study.POOLED)),
            (study.SINGLE, "d", DRAWN[study.SINGLE]),
        ):
            hollow = "none" if marker == "s" else colour
            right.plot(table[name] / table.exact, places, marker, color=colour, markerfacecolor=hollow, label=name)
        right.axvline(1, color=NEUTRAL, linewidth=0.8)
        right.set_xlabel("error / Statement 4, told S and P")
        _log_ticks(right)
        names = [
            f"q={c.q}, sizes 1:{c.spread:g}, correlation {c.correlation:g}, {c.share:.0%}" for c in table.itertuples()
        ]
        left.set_yticks(places, names, fontsize=8)
        left.invert_yaxis()
        left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8)
        right.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=8)
    return figure


def held_out(summary: pd.DataFrame) -> Figure:
    """Draw held-out error over single-task error with its interval; rows are data sets, columns corruptions.

    ``summary`` is a result of ``study.summarise`` against single-task.
    """
    with plt.style.context(STYLE):
        sets = list(dict.fromkeys(summary.data))
        cells = list(dict.fromkeys(zip(summary.kind, summary.share, strict=True)))
        methods = [name for name in dict.fromkeys(summary.method) if name != study.SINGLE]
        size = (2.2 + 2.1 * len(cells), 0.9 + 0.26 * len(methods) * len(sets))
        figure, panels = plt.subplots(len(sets), len(cells), figsize=size, sharex="row", sharey=True, squeeze=False)
        for line, data in zip(panels, sets, strict=True):
            for axes, (kind, share) in zip(line, cells, strict=True):
                rows = summary[(summary.data == data) & (summary.kind == kind) & (summary.share == share)]
                _relative(axes, rows.set_index("method").loc[methods])
                axes.set_title(f"{data}: {f'{share:.0%} {kind}' if share else 'nobody corrupted'}", fontsize=9)
            line[0].set_yticks(range(len(methods)), methods, fontsize=8)
        panels[0][0].invert_yaxis()
        figure.supxlabel("held-out error / single-task", fontsize=9)
    return figure


def _relative(axes: Axes, rows: pd.DataFrame) -> None:
    centre, low, high = (np.exp(rows[name]) for name in ("log_ratio", "ratio_low", "ratio_high"))
    spread = [centre - low, high - centre]
    colours = [DRAWN.get(name, colour_of(name)) for name in rows.index]
    places = np.arange(len(rows))
    axes.errorbar(centre, places, xerr=spread, fmt="none", ecolor=NEUTRAL, linewidth=1)
    axes.scatter(centre, places, c=colours, s=16)
    axes.axvline(1, color=NEUTRAL, linewidth=0.8)
    _log_ticks(axes)


def _log_ticks(axes: Axes) -> None:
    """Set a log scale with few, plain numbers."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    steps = [10.0**k for k in range(-2, 4)] if high > 20 * low else [0.5, 0.7, 1, 1.5, 2, 3, 5, 8]
    shown = [x for x in steps if low <= x <= high]
    axes.set_xticks(shown, [f"{x:g}" for x in shown], fontsize=8)
    axes.minorticks_off()
