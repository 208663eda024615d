"""Figures of notebook 01: what the updates determine, rivals of the benign clients, and attacks inside the subspace."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from clairlib.plots import BENIGN, CONTAMINATED, NEUTRAL, STYLE

BLANK, PALE = "#ffffff", "#f0d9cc"
OUTCOMES = {"benign": BENIGN, "rivals": CONTAMINATED, "other": NEUTRAL}


def difference_ranks(table: pd.DataFrame, rank: int) -> Figure:
    """Draw the rank of every pair's difference, one panel per kind; ``table`` is a result of ``study.rank_table``."""
    with plt.style.context(STYLE):
        kinds = list(dict.fromkeys(table.contamination))
        figure, panels = plt.subplots(1, len(kinds), figsize=(2.9 * len(kinds), 3.3), squeeze=False)
        colours, steps = ListedColormap([BLANK, BENIGN, PALE]), BoundaryNorm([-0.5, 0.5, rank + 0.5, 1e6], 3)
        for axes, kind in zip(panels[0], kinds, strict=True):
            rows = table[table.contamination == kind]
            square = rows.pivot(index="first", columns="second", values="rank").to_numpy()
            edge = int(rows[rows["first"] == rows["second"]].benign.sum()) - 0.5
            axes.imshow(square, cmap=colours, norm=steps, interpolation="nearest")
            axes.axhline(edge, color="black", linewidth=1)
            axes.axvline(edge, color="black", linewidth=1)
            axes.grid(False)
            axes.set(title=kind.replace("_", " "), xlabel="client, benign first", xticks=[], yticks=[])
            for (j, k), value in np.ndenumerate(square):
                axes.text(
                    k, j, value, ha="center", va="center", fontsize=6, color="white" if 0 < value <= rank else "#777"
                )
        panels[0][0].set_ylabel("client, benign first")
    return figure


def needed(table: pd.DataFrame) -> Figure:
    """Draw how often the largest set is unique, by columns q and number of benign clients; a line marks the theory.

    ``table`` columns: q, benign, unique, needed.
    """
    with plt.style.context(STYLE):
        square = table.pivot(index="q", columns="benign", values="unique")
        figure, axes = plt.subplots(figsize=(4.6, 3.2))
        axes.imshow(square.to_numpy(), cmap=ListedColormap([PALE, BENIGN]), norm=BoundaryNorm([0, 0.5, 1], 2))
        axes.grid(False)
        axes.set_xticks(range(square.shape[1]), list(square.columns))
        axes.set_yticks(range(square.shape[0]), list(square.index))
        for (i, j), value in np.ndenumerate(square.to_numpy()):
            axes.text(j, i, f"{value:.0%}", ha="center", va="center", color="white" if value > 0.5 else "#555")
        for i, least in enumerate(table.groupby("q").needed.first()):
            place = least - square.columns[0] - 0.5
            axes.plot([place, place], [i - 0.5, i + 0.5], color="black", linewidth=3)
        axes.set(title="Benign clients are the unique largest set", xlabel="benign clients of 12", ylabel="columns q")
    return figure


def rival_outcomes(table: pd.DataFrame, benign: int) -> Figure:
    """Draw the set that CLAIR takes for benign (bars) and the winner by exact algebra (labels), by number of rivals.

    ``table`` is a result of ``study.summarise_rivals``; one panel per kind.
    """
    with plt.style.context(STYLE):
        kinds = list(dict.fromkeys(table.kind))
        figure, panels = plt.subplots(1, len(kinds), figsize=(3.5 * len(kinds), 3.3), sharey=True, squeeze=False)
        for axes, kind in zip(panels[0], kinds, strict=True):
            rows = table[table.kind == kind]
            _stacked(axes, rows)
            letters = rows[["algebra benign", "algebra tie", "algebra rivals"]].to_numpy().argmax(axis=1)
            for place, letter in enumerate(letters):
                axes.text(place, 1.03, ("benign", "tie", "rivals")[letter], ha="center", fontsize=8)
            axes.set_xticks(range(len(rows)), list(rows["count"]))
            axes.set(
                title=kind.replace("_", " "), xlabel=f"contaminated clients, against {benign} benign", ylim=(0, 1.12)
            )
        panels[0][0].set_ylabel("share of draws, CLAIR")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _stacked(axes: Axes, rows: pd.DataFrame) -> None:
    bottom = np.zeros(len(rows))
    for outcome, colour in OUTCOMES.items():
        share = rows[f"CLAIR {outcome}"].to_numpy()
        axes.bar(range(len(rows)), share, bottom=bottom, color=colour, width=0.7, label=f"CLAIR finds: {outcome}")
        bottom = bottom + share


def in_subspace_attacks(table: pd.DataFrame, K: int) -> Figure:
    """Draw the effect of in-subspace attacks on the other clients, and how often attackers are flagged, by attack size.

    ``table`` is a result of ``study.summarise_attacks``; one line per attack and number of attackers among K clients.
    """
    with plt.style.context(STYLE):
        figure, panels = plt.subplots(1, 4, figsize=(14, 3.4))
        colours = dict(zip(sorted(table.attackers.unique()), (BENIGN, CONTAMINATED, "#e69f00", NEUTRAL), strict=False))
        groups = table.groupby(["attackers", "attack"], sort=False)
        for place, ((attackers, attack), rows) in enumerate(groups):
            style = "o-" if attack == "spread" else "s--"
            beside = rows["size"] * 1.07**place  # shifted, so that the intervals do not overlap
            spread = [rows.ratio - rows.low, rows.high - rows.ratio]
            kind = {"fmt": style, "color": colours[attackers], "label": f"{attackers} of {K}, {attack}"}
            panels[0].errorbar(beside, rows.ratio, spread, **kind)
            for axes, column in zip(panels[1:], ("sine_ratio", "flagged", "refused"), strict=True):
                axes.plot(beside, rows[column], style, color=colours[attackers])
        for axes in panels:
            axes.set(xscale="log", xlabel="size of the attack, 1 = honest")
        for axes in panels[:2]:
            axes.axhline(1, color=NEUTRAL, linewidth=0.8)
        top = min(1.05 * table.high.max(), 2 * table.ratio.max())  # with few draws intervals can be very wide
        panels[0].set_ylim(0, top)
        panels[1].set_yscale("log")
        panels[0].set(title="Others' refined error over no attack", ylabel="ratio, 95 % interval")
        panels[1].set(title="Subspace's sine over no attack", ylabel="ratio")
        panels[2].set(title="Attackers flagged", ylabel="share", ylim=(-0.04, 1.04))
        panels[3].set(title="Refinement refused", ylabel="share of draws", ylim=(-0.04, 1.04))
        figure.legend(loc="outside lower center", ncols=len(groups))
    return figure


def few_benign(table: pd.DataFrame) -> Figure:
    """Draw how often CLAIR finds the benign set, against the number of benign clients; one line per noise level.

    ``table`` columns: noise, benign, exact, low, high.
    """
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(5.2, 3.2))
        for place, ((noise, rows), colour) in enumerate(
            zip(table.groupby("noise"), (BENIGN, CONTAMINATED), strict=False)
        ):
            spread = [(rows.exact - rows.low).clip(lower=0), (rows.high - rows.exact).clip(lower=0)]
            axes.errorbar(
                rows.benign + 0.06 * place, rows.exact, spread, fmt="o-", color=colour, label=f"noise {noise:g}"
            )
        axes.set_xticks(sorted(table.benign.unique()))
        axes.set(
            title="CLAIR, told nothing", xlabel="benign clients of 24", ylabel="exact set found", ylim=(-0.04, 1.04)
        )
        axes.legend(loc="lower right")
    return figure
