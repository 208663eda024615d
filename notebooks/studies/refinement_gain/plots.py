"""Figures of notebook 05; each function takes tables of `studies.refinement_gain.study` and returns a Figure."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clairlib.plots import BENIGN, COLOURS, CONTAMINATED, NEUTRAL, STYLE, colour_of

PARTS = {
    "inside": ("noise inside", BENIGN),
    "off_subspace": ("noise outside, averaged", "#9ecae1"),
    "heterogeneity": ("heterogeneity", CONTAMINATED),
    "subspace_cost": ("subspace cost", "#e69f00"),
}
LINES = (BENIGN, "#e69f00", CONTAMINATED, "#009e73")


def terms(table: pd.DataFrame) -> Figure:
    """Draw each measured term against its formula (top, logarithmic) and their distance in standard errors (bottom).

    ``table`` columns: told, term, measured, formula, z, small. Negative values (subspace cost) enter by absolute value.
    """
    with plt.style.context(STYLE):
        figure, panels = plt.subplots(2, 2, figsize=(10, 6), sharex="col", height_ratios=(1.6, 1))
        for column, (told, title) in enumerate((("P", "told S and P"), ("r", "told S and r, P estimated"))):
            rows = table[(table.told == told) & (table.term != "total")].dropna(subset="z")
            above, below = panels[0][column], panels[1][column]
            for term, (label, colour) in PARTS.items():
                chosen = rows[(rows.term == term) & (rows.formula != 0)]
                for axes, values in ((above, chosen.measured.abs()), (below, chosen.z)):
                    filled = chosen.small.to_numpy(dtype=bool)
                    x, y = chosen.formula.abs().to_numpy(), values.to_numpy()
                    axes.plot(x[filled], y[filled], "o", color=colour, label=label if len(chosen) else None, alpha=0.8)
                    axes.plot(x[~filled], y[~filled], "o", color=colour, markerfacecolor="none")
            ends = np.array([rows.formula.abs()[rows.formula != 0].min(), rows.formula.abs().max()])
            above.plot(ends, ends, color=NEUTRAL, linewidth=0.8, zorder=0)
            above.set(title=title, xscale="log", yscale="log")
            below.axhspan(-3, 3, color="#eeeeee", zorder=0)
            below.set(xlabel="formula", yscale="symlog", ylim=(-40, 40), yticks=[-30, -10, -3, 0, 3, 10, 30])
            below.set_yticklabels(["-30", "-10", "-3", "0", "3", "10", "30"])
        panels[0][0].set_ylabel("measured")
        panels[1][0].set_ylabel("standard errors apart")
        panels[0][1].plot([], [], "o", color=NEUTRAL, markerfacecolor="none", label="beyond second order")
        panels[0][1].legend(loc="upper left", fontsize=8)
    return figure


def methods(table: pd.DataFrame) -> Figure:
    """Draw error by method over the local error, with intervals; a panel per noise level.

    Each contaminated fraction has a group of bars. ``table`` columns: noise, share, method, error, low, high, formula.
    The formula, told S and r, is a black line.
    """
    with plt.style.context(STYLE):
        levels, names = sorted(table.noise.unique()), list(dict.fromkeys(table.method))
        figure, panels = plt.subplots(1, len(levels), figsize=(5 * len(levels), 3.4), sharey=True, squeeze=False)
        for axes, noise in zip(panels[0], levels, strict=True):
            rows = table[table.noise == noise]
            shares = sorted(rows.share.unique())
            for i, name in enumerate(names):
                bars = rows[rows.method == name].sort_values("share")
                x = np.arange(len(shares)) + (i - (len(names) - 1) / 2) * 0.16
                spread = [bars.error - bars.low, bars.high - bars.error]
                colour = colour_of(name)
                axes.bar(x, bars.error, width=0.15, color=colour, yerr=spread, error_kw={"linewidth": 1}, label=name)
            for place, share in enumerate(shares):
                value = rows[rows.share == share].formula.iloc[0]
                label = "formula, told S and r" if place == 0 else None
                axes.hlines(value, place - 0.42, place + 0.42, color="black", linewidth=1, label=label)
            axes.set_xticks(range(len(shares)), [f"{share:.0%}" for share in shares])
            axes.set(title=f"noise {noise:g}", xlabel="contaminated clients", yscale="log")
        panels[0][0].set_ylabel("error / local error")
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    return figure


def boundary(crossings: pd.DataFrame, clients: pd.DataFrame) -> Figure:
    """Draw where refinement stops paying.

    Left and middle: measured zero crossings with intervals, along h and along the sample size, in units of the
    first-order root; crosses mark the second order. Right: gain against the number of benign clients; lines are first
    order.

    ``crossings`` columns: K, share, q, r, noise, axis, crossing, low, high, second. ``clients`` columns: s, ratio,
    gain, low, high, formula, enough.
    """
    with plt.style.context(STYLE):
        figure, panels = plt.subplots(1, 3, figsize=(13, 4), width_ratios=(1, 1, 1.1))
        for axes, axis, label in zip(
            panels, ("heterogeneity", "samples"), ("h", "n"), strict=False
        ):
            _crossings(axes, crossings[crossings.axis == axis], f"{label} of zero gain / first order")
        panels[1].set_yticklabels([])
        panels[0].set_title("As h grows")
        panels[1].set_title("As n grows")
        for colour, (ratio, rows) in zip(LINES, clients.groupby("ratio"), strict=False):
            spread = [rows.gain - rows.low, rows.high - rows.gain]
            label = f"h = {ratio:g} h*" if ratio else "h = 0"
            panels[2].errorbar(rows.s, rows.gain, spread, fmt="o", color=colour, label=label)
            panels[2].plot(rows.s, rows.formula, color=colour, linewidth=1)
        panels[2].axhline(0, color=NEUTRAL, linewidth=0.8)
        panels[2].axvline(4, color=NEUTRAL, linewidth=0.8, linestyle="--")
        panels[2].set(title="As s grows: q = 1, r = 3", xlabel="benign clients s", ylabel="gain / local error")
        panels[2].set(xscale="log", xticks=[3, 4, 5, 6, 8, 12, 24], xticklabels=["3", "4", "5", "6", "8", "12", "24"])
        panels[2].minorticks_off()
        panels[2].legend(loc="lower left", bbox_to_anchor=(0.2, 0.0))
    return figure


def _crossings(axes: Axes, rows: pd.DataFrame, label: str) -> None:
    places = np.arange(len(rows))
    spread = [rows.crossing - rows.low, rows.high - rows.crossing]
    axes.errorbar(rows.crossing, places, xerr=spread, fmt="o", color=BENIGN, label="measured")
    axes.plot(rows.second, places, "x", color="black", markersize=7, label="second order")
    axes.axvline(1, color=NEUTRAL, linewidth=0.8)
    clients = (rows.K - (rows.share * rows.K).round()).astype(int)
    names = [f"s={s} q={q} r={r} noise {n:g}" for s, q, r, n in zip(clients, rows.q, rows.r, rows.noise, strict=True)]
    axes.set_yticks(places, names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.legend(loc="lower left", bbox_to_anchor=(0.35, 1.0), ncols=2, fontsize=8)


def decisions(low_rank: pd.DataFrame, readings: pd.DataFrame, told: pd.DataFrame) -> Figure:
    """Draw the decisions of the refusal rule.

    Left: fraction of draws that are refined as low-rank heterogeneity grows. Right: fraction of right decisions on the
    same updates under two readings, told nothing and told the noise level.

    ``low_rank`` columns: rank, noise, ratio, refines; ``readings`` and ``told``: reading, noise, ratio, right.
    """
    with plt.style.context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), width_ratios=(1.2, 1))
        markers = dict(zip(sorted(low_rank.noise.unique()), "os^vD", strict=False))
        for (rank, noise), rows in low_rank.groupby(["rank", "noise"]):
            colour = LINES[int(rank - 1) % len(LINES)]
            label = f"rank {rank:g}, noise {noise:g}"
            line = "--" if rank > 1 else "-"
            left.plot(rows.ratio, rows.refines, line, marker=markers[noise], color=colour, label=label, linewidth=1)
        left.axvline(1, color=NEUTRAL, linewidth=0.8)
        left.set(xlabel="h / h*", ylabel="share of draws refined", ylim=(-0.05, 1.05))
        left.set_title("Low-rank heterogeneity: how often CLAIR refines")
        left.legend(fontsize=8)
        names = [f"{row.reading}\nnoise {row.noise:g}, h = {row.ratio:g} h*" for row in readings.itertuples()]
        places = np.arange(len(names))
        right.barh(places - 0.2, readings.right, height=0.36, color=BENIGN, label="nothing told")
        right.barh(places + 0.2, told.right, height=0.36, color="#009e73", label="told S, r and the noise")
        for place, share in zip(places, readings.right, strict=True):
            right.text(share + 0.01, place - 0.2, "" if share > 0.05 else f"{share:.0%}", va="center", fontsize=8)
        right.set_yticks(places, names, fontsize=8)
        right.invert_yaxis()
        right.set(xlabel="the same updates read twice: share of right decisions", xlim=(0, 1.05))
        right.legend(loc="lower center", bbox_to_anchor=(0.6, 1.0), ncols=2, fontsize=8)
    return figure


def weights(table: pd.DataFrame) -> Figure:
    """Draw errors with unequal sample sizes, told the weights and not; lines: an oracle told P and S.

    ``table`` columns: spread, told, local, oracle, formula, clair. The lines are closed forms.
    """
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(6.5, 3.4))
        for told, colour, word in ((True, BENIGN, "told"), (False, "#e69f00", "not told")):
            rows = table[table.told == told].sort_values("spread")
            axes.plot(rows.spread, rows.formula, color=colour, linewidth=1, label=f"formula, {word} the weights")
            axes.plot(rows.spread, rows.oracle, "o", color=colour, label=f"told S and P, {word} the weights")
            name = f"CLAIR, {word} the weights"
            axes.plot(rows.spread, rows.clair, "s", color=colour, markerfacecolor="none", label=name)
        rows = table[table.told].sort_values("spread")
        axes.plot(rows.spread, rows.local, color=COLOURS["local"], linestyle="--", label="local")
        axes.set(xlabel="largest / smallest sample size", ylabel="squared error", xscale="log", yscale="log")
        axes.set_xticks(sorted(table.spread.unique()), [f"{x:g}" for x in sorted(table.spread.unique())])
        axes.minorticks_off()
        axes.set_yticks([0.05, 0.1, 0.2, 0.5, 1.0], ["0.05", "0.1", "0.2", "0.5", "1"])
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
