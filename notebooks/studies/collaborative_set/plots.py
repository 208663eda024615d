"""Figures of notebook 04; each function takes tidy tables of `studies.collaborative_set.study` and returns a Figure."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clairlib.plots import BENIGN, CONTAMINATED, NEUTRAL, STYLE, colour_of

METHODS = ("CLAIR", "CLAIR, told r", "CLAIR, told S and r", "told P, M, sigma: energy", "told P, M, sigma: filtered",
           "norm filter", "Krum distance", "geometric median distance")
COLOURS = {name: colour_of(name) for name in METHODS} | {
    "told S and r": colour_of("CLAIR, told S and r"),
    "top r": "#9ecae1",  # filters, by number of scored directions
    "top 2 r": BENIGN,
    "all (Frobenius)": "#000000",
    "isotropic": BENIGN,  # calibration, by kind of noise
    "coloured": CONTAMINATED,
}
KS_5_PERCENT = 1.358  # asymptotic 5 % point of sqrt(n) times the Kolmogorov-Smirnov distance


def _name(row: pd.Series) -> str:
    return f"{row.contamination.replace('_', ' ')} {row.share:.0%}"


def recovery_grid(table: pd.DataFrame, value: str = "exact") -> Figure:
    """Draw a heat map of ``value`` in percent: cells down, methods and noise levels across, one panel per K.

    ``table`` columns: K, noise, contamination, share, method and ``value``.
    """
    with plt.style.context(STYLE):
        counts = sorted(table.K.unique())
        methods = [name for name in COLOURS if name in set(table.method) and name != "CLAIR, told r"]
        noises = sorted(table.noise.unique())
        rows = table.drop_duplicates(["contamination", "share"]).apply(_name, axis=1).nunique()
        size = (1.8 + 2.0 * len(methods) * len(counts), 1.8 + 0.27 * rows / len(counts) ** 0.5)
        figure, panels = plt.subplots(1, len(counts), figsize=size, squeeze=False)
        for axes, K in zip(panels[0], counts, strict=True):
            _heat(axes, table[table.K == K], value, methods, noises)
            axes.set_title(f"{K} clients", pad=34)
    return figure


def _heat(axes: Axes, table: pd.DataFrame, value: str, methods: list[str], noises: list[float]) -> None:
    table = table.sort_values(["contamination", "share"], key=lambda c: c.map(_place) if c.name != "share" else c)
    labels = list(dict.fromkeys(table.apply(_name, axis=1)))
    columns = pd.MultiIndex.from_product([methods, noises])
    wide = table.assign(cell=table.apply(_name, axis=1)).pivot(index="cell", columns=["method", "noise"], values=value)
    shown = 100 * wide.reindex(index=labels, columns=columns).to_numpy(dtype=float)
    axes.imshow(shown, cmap="RdYlBu", vmin=0, vmax=100, aspect="auto")
    for (i, j), percent in np.ndenumerate(shown):
        if not np.isnan(percent):
            dark = percent < 15 or percent > 85
            axes.text(j, i, f"{percent:.0f}", ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set_xticks(range(len(columns)), [f"{noise:g}" for _, noise in columns], fontsize=7, rotation=90)
    for place, method in enumerate(methods):
        middle = place * len(noises) + (len(noises) - 1) / 2
        axes.text(middle, -0.75, method.replace(": ", ":\n"), ha="center", va="bottom", fontsize=8)
        axes.axvline((place + 1) * len(noises) - 0.5, color="white", linewidth=4)
    axes.set_xlabel("noise of a row")
    axes.grid(False)


def _place(kind: object) -> int:
    return ["unstructured", "dense", "coalition", "sign_flip"].index(str(kind))


def _lines(axes: Axes, rows: pd.DataFrame, x: str, y: str, by: str) -> None:
    """Draw one line with intervals per value of ``by``; lines are shifted, so that equal ones stay visible."""
    step = 0.012 * (rows[x].max() - rows[x].min())
    for place, (name, line) in enumerate(rows.groupby(by, sort=False)):
        line = line.sort_values(x)
        spread = np.abs([line[y] - line.low, line.high - line[y]])
        style: dict[str, Any] = {"color": COLOURS[str(name)], "label": str(name), "linewidth": 1.2, "markersize": 4}
        axes.errorbar(line[x] + place * step, line[y], spread, fmt="o-", **style)


def separation_curves(table: pd.DataFrame, promised: float) -> Figure:
    """Draw the rate of exact sets against the smallest separation; one panel per kind and contaminated fraction.

    ``table`` columns: contamination, share, method, separation, exact, low, high. ``promised`` is Statement 3's
    separation. Each method is a line.
    """
    with plt.style.context(STYLE):
        cases = list(table.groupby(["contamination", "share"], sort=False))
        figure, panels = plt.subplots(1, len(cases), figsize=(3 * len(cases), 3.4), sharey=True, squeeze=False)
        for axes, ((kind, share), rows) in zip(panels[0], cases, strict=True):
            _lines(axes, rows, "separation", "exact", "method")
            axes.axvline(promised, color=NEUTRAL, linestyle="--", linewidth=1)
            axes.set(title=f"{str(kind).replace('_', ' ')} {share:.0%}", ylim=(-0.03, 1.03))
            axes.set_xlabel("smallest distance / sigma")
        panels[0][0].set_ylabel("exact set found")
        _legend_below(figure, panels[0][0])
    return figure


def _legend_below(figure: Figure, axes: Axes, columns: int = 5) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), columns), fontsize=9)


def promise(table: pd.DataFrame) -> Figure:
    """Draw the told detectors' rate of exact sets against the distance; one panel per statistic.

    Distances are in units of Statement 3's. ``table`` columns: statistic, basis, K, factor, exact. The mean over kinds
    of contamination is drawn.
    """
    with plt.style.context(STYLE):
        names = list(dict.fromkeys(table.statistic))
        figure, panels = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.5), sharey=True, squeeze=False)
        for axes, statistic in zip(panels[0], names, strict=True):
            mean = table[table.statistic == statistic].groupby(["basis", "K", "factor"]).exact.mean().reset_index()
            for (basis, K), rows in mean.groupby(["basis", "K"]):
                colour, style = (BENIGN, "-") if basis == "true" else (CONTAMINATED, "--")
                marker = "os^v"[sorted(table.K.unique()).index(K) % 4]
                axes.plot(rows.factor, rows.exact, marker + style, color=colour, label=f"{basis} subspace, K = {K}")
            axes.axvline(1, color=NEUTRAL, linestyle="--", linewidth=1)
            axes.set(title=f"told detector, {statistic}", xlabel="distance / Statement 3's", ylim=(-0.03, 1.03))
        panels[0][0].set_ylabel("exact set found")
        _legend_below(figure, panels[0][0], 3)
    return figure


def calibration(summary: pd.DataFrame, runs: pd.DataFrame) -> Figure:
    """Draw runs without contamination: rate of runs with a flagged client, and p-values of one client against uniform.

    ``summary`` columns: K, noise, anybody, low, high; ``runs`` columns: K, noise, p_value.
    """
    with plt.style.context(STYLE):
        figure, (left, *panels) = plt.subplots(1, 3, figsize=(12, 3.4))
        places = np.arange(len(summary))
        spread = np.abs([summary.anybody - summary.low, summary.high - summary.anybody])
        colours = [COLOURS[noise] for noise in summary.noise]
        left.bar(places, summary.anybody, color=colours, width=0.6)
        left.errorbar(places, summary.anybody, spread, fmt="none", color="black", capsize=3, linewidth=1)
        left.axhline(0.01, color=NEUTRAL, linestyle="--", linewidth=1)
        left.set_xticks(places, [f"{row.noise}\nK = {row.K}" for row in summary.itertuples()], fontsize=7)
        left.set(title="Anybody flagged", ylabel="share of runs")
        for axes, noise in zip(panels, ("isotropic", "coloured"), strict=True):
            _p_values(axes, runs[runs.noise == noise])
            axes.set_title(f"p-values, {noise} noise")
    return figure


def _p_values(axes: Axes, runs: pd.DataFrame) -> None:
    """Draw the proportion of p-values below each level, less the level.

    The band holds 95 % of uniform samples that are as large as the smallest sample.
    """
    for shade, (K, rows) in zip(("#9ecae1", "#4292c6", "#08306b"), runs.groupby("K"), strict=False):
        values = np.sort(rows.p_value)
        axes.step(values, np.arange(1, len(values) + 1) / len(values) - values, color=shade, label=f"K = {K}")
    band = KS_5_PERCENT / max(runs.groupby("K").size().min(), 1) ** 0.5
    axes.axhspan(-band, band, color="#efefef", zorder=0)
    axes.set(xlabel="level", ylabel="share below, less the level")
    axes.legend(fontsize=8)


def filter_curves(table: pd.DataFrame) -> Figure:
    """Draw AUC against strength, one line per filter; kinds across, spread of the noise levels down.

    ``table`` columns: contamination, spread, filter, strength, auc, low, high.
    """
    with plt.style.context(STYLE):
        kinds, spreads = list(dict.fromkeys(table.contamination)), sorted(table.spread.unique())
        size = (3 * len(kinds), 0.6 + 2.5 * len(spreads))
        figure, panels = plt.subplots(len(spreads), len(kinds), figsize=size, sharey=True, sharex=True, squeeze=False)
        for row, spread in zip(panels, spreads, strict=True):
            for axes, kind in zip(row, kinds, strict=True):
                rows = table[(table.contamination == kind) & (table.spread == spread)]
                _lines(axes, rows, "strength", "auc", "filter")
                axes.set_title(f"{kind.replace('_', ' ')}, noise " + (f"± {spread:.0%}" if spread else "equal"))
            row[0].set_ylabel("AUC")
        for axes in panels[-1]:
            axes.set_xlabel("strength")
        _legend_below(figure, panels[0][0])
    return figure


def rank_bars(table: pd.DataFrame) -> Figure:
    """Draw the distribution of the estimated rank, and the rates of exact sets with the rank told and estimated.

    ``table`` is a result of ``study.rank_table``; one row per cell.
    """
    with plt.style.context(STYLE):
        cells = table[table.method == "CLAIR"].reset_index(drop=True)
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 1.2 + 0.24 * len(cells)), sharey=True)
        places, start = np.arange(len(cells)), np.zeros(len(cells))
        ranks = [column for column in table if column.startswith("rank ")]
        for column, shade in zip(ranks, ("#fee090", "#fdae61", BENIGN, "#9ecae1", "#c9c9c9"), strict=True):
            left.barh(places, cells[column], left=start, color=shade, label=column, height=0.75)
            start = start + cells[column].to_numpy()
        for offset, method in ((-0.14, "CLAIR"), (0.14, "CLAIR, told r")):
            rows = table[table.method == method]
            spread = np.abs([rows.exact - rows.low, rows.high - rows.exact])
            label = "rank estimated" if method == "CLAIR" else "rank told"
            right.errorbar(rows.exact, places + offset, xerr=spread, fmt="o", color=COLOURS[method], label=label)
        left.set_yticks(places, [f"{_name(row)}, noise {row.noise:g}" for _, row in cells.iterrows()], fontsize=8)
        left.set_ylim(len(cells) - 0.4, -0.6)
        left.set_xlabel("share of draws: estimated rank")
        right.set(xlabel="exact set found", xlim=(-0.03, 1.03))
        for axes in (left, right):
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, fontsize=8, columnspacing=0.8)
    return figure


def roc(table: pd.DataFrame) -> Figure:
    """Draw mean ROC curves, kinds across, noise levels down.

    ``table`` columns: noise, contamination, method, false_alarms, caught.
    """
    with plt.style.context(STYLE):
        kinds, noises = list(dict.fromkeys(table.contamination)), sorted(table.noise.unique())
        size = (2.9 * len(kinds), 0.6 + 2.6 * len(noises))
        figure, panels = plt.subplots(len(noises), len(kinds), figsize=size, sharex=True, sharey=True, squeeze=False)
        for row, noise in zip(panels, noises, strict=True):
            for axes, kind in zip(row, kinds, strict=True):
                chosen = table[(table.contamination == kind) & (table.noise == noise)]
                for method, line in chosen.groupby("method", sort=False):
                    line = line.sort_values("false_alarms")
                    axes.plot(line.false_alarms, line.caught, color=COLOURS[str(method)], label=str(method))
                axes.set_title(f"{kind.replace('_', ' ')}, noise {noise:g}")
            row[0].set_ylabel("contaminated caught")
        for axes in panels[-1]:
            axes.set_xlabel("benign flagged")
        _legend_below(figure, panels[0][0])
    return figure
