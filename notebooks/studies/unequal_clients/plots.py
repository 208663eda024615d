"""Figures of notebook 12; each function takes tables of `studies.unequal_clients.tables` and returns a Figure."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clairlib.plots import BENIGN, CONTAMINATED, NEUTRAL, STYLE
from studies.unequal_clients.cases import CONDITIONS
from studies.unequal_clients.clients import NOISE

COLOURS = {"CLAIR": BENIGN, "told all": "#000000", "alike": BENIGN, "samples 4:1": CONTAMINATED, "sizes .3": "#009e73"}
ACROSS = 5  # most panels in a row
DARK = 0.6  # larger shares stand in white


def false_alarms(table: pd.DataFrame, allowed: float) -> Figure:
    """Draw how often anybody honest is flagged, with Wilson intervals: conditions down, one panel a design.

    ``allowed`` is the nominal rate. ``table`` columns: design, condition, anybody, low, high.
    """
    with plt.style.context(STYLE):
        names = list(dict.fromkeys(table.design))
        rows = [name for name in CONDITIONS if name in set(table.condition)]
        down = -(-len(names) // ACROSS)
        across = min(len(names), ACROSS)
        size = (2.0 + 1.9 * across, down * (1.0 + 0.24 * len(rows)))
        figure, panels = plt.subplots(down, across, figsize=size, sharey=True, sharex=True, squeeze=False)
        for axes, design in zip(panels.flat, names, strict=False):
            own = table[table.design == design]
            _dots(axes, [rows.index(name) for name in own.condition], own, "anybody")
            axes.axvline(allowed, color=NEUTRAL, linestyle="--", linewidth=1)
            axes.set_title(f"{design}\ndraws: {own.draws.max()}", fontsize=9)
        for axes in list(panels.flat)[len(names) :]:
            axes.set_axis_off()
        panels[0][0].set_yticks(range(len(rows)), rows, fontsize=8)
        panels[0][0].set(ylim=(len(rows) - 0.5, -0.5), xlim=(-0.03, 1.03))
        figure.supxlabel("draws in which anybody is flagged", fontsize=10)
    return figure


def _dots(axes: Axes, places: list[int], rows: pd.DataFrame, value: str) -> None:
    axes.hlines(places, rows.low, rows.high, color=BENIGN, linewidth=1.2)
    axes.plot(rows[value], places, "o", color=BENIGN)


def recall_curves(table: pd.DataFrame) -> Figure:
    """Draw the share of weak attackers found against their energy, one panel a kind, one line a method.

    ``table`` columns: kind, energy, method, recall, low, high.
    """
    with plt.style.context(STYLE):
        kinds = list(dict.fromkeys(table.kind))
        figure, panels = plt.subplots(1, len(kinds), figsize=(4.2 * len(kinds), 3.5), sharey=True, squeeze=False)
        for axes, kind in zip(panels[0], kinds, strict=True):
            for method, rows in table[table.kind == kind].groupby("method", sort=False):
                _line(axes, rows, "energy", "recall", str(method))
            axes.axvline(NOISE**2, color=NEUTRAL, linestyle="--", linewidth=1)
            axes.set(title=kind, xlabel="energy off the subspace", ylim=(-0.03, 1.03))
        panels[0][0].set_ylabel("attackers found")
        panels[0][0].legend(fontsize=8)
    return figure


def _line(axes: Axes, rows: pd.DataFrame, x: str, y: str, label: str) -> None:
    rows = rows.sort_values(x)
    spread = np.abs([rows[y] - rows.low, rows.high - rows[y]])
    axes.errorbar(rows[x], rows[y], spread, fmt="o-", color=COLOURS[label], label=label, linewidth=1.2, markersize=4)


def module_heat(table: pd.DataFrame) -> Figure:
    """Draw attacks in single modules: attackers found, attackers shown, honest clients flagged; one row a design.

    ``table`` columns: design, placement, times_noise, recall, shown, honest_flagged.
    """
    values = {"recall": "attackers found", "shown": "attackers shown as few users", "honest_flagged": "honest flagged"}
    with plt.style.context(STYLE):
        designs = list(dict.fromkeys(table.design))
        size = (11, 0.5 + 2.3 * len(designs))
        figure, panels = plt.subplots(len(designs), len(values), figsize=size, sharey=True, sharex=True, squeeze=False)
        for row, design in zip(panels, designs, strict=True):
            for axes, (value, title) in zip(row, values.items(), strict=True):
                own = table[table.design == design]
                wide = own.pivot(index="placement", columns="times_noise", values=value)
                _heat(axes, wide.reindex(list(dict.fromkeys(own.placement))))
                axes.set_title(f"{title}, {design}", fontsize=9)
        for axes in panels[-1]:
            axes.set_xlabel("norm of the step / noise")
    return figure


def _heat(axes: Axes, wide: pd.DataFrame) -> None:
    """Draw shares in percent; what is not defined stays empty."""
    shown = wide.to_numpy(dtype=float)
    axes.imshow(shown, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (i, j), share in np.ndenumerate(shown):
        if not np.isnan(share):
            colour = "white" if share > DARK else "black"
            axes.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(wide.shape[1]), [_name(x) for x in wide.columns], fontsize=8)
    axes.set_yticks(range(len(wide)), [_name(x) for x in wide.index], fontsize=8)
    axes.grid(False)


def _name(value: object) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def seen(table: pd.DataFrame) -> Figure:
    """Draw how often a deviation is found against its multiple of the smallest that would be found half of the time.

    ``table`` columns: condition, factor, found, low, high.
    """
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(5, 3.4))
        for condition, rows in table.groupby("condition", sort=False):
            _line(axes, rows, "factor", "found", str(condition))
        axes.axhline(0.5, color=NEUTRAL, linestyle="--", linewidth=1)
        axes.axvline(1.0, color=NEUTRAL, linestyle="--", linewidth=1)
        axes.set(xlabel="deviation / smallest that would be found", ylabel="found", ylim=(-0.03, 1.03))
        axes.legend(fontsize=8)
    return figure


def ablation_heat(table: pd.DataFrame) -> Figure:
    """Draw the share of exact sets in percent: the rule that is off down, cells across, one panel a kind.

    ``table`` columns: without, kind, condition, exact. Of honest clients alone a set is exact if nobody is flagged.
    """
    titles = {"none": "honest alone:\nnobody flagged", "unstructured": "30 % unstructured:\nexact set"}
    with plt.style.context(STYLE):
        kinds = list(dict.fromkeys(table.kind))
        widths = [table[table.kind == kind].condition.nunique() for kind in kinds]
        size = (2.4 + 0.85 * sum(widths), 3.8)
        figure, panels = plt.subplots(1, len(kinds), figsize=size, sharey=True, width_ratios=widths, squeeze=False)
        for axes, kind in zip(panels[0], kinds, strict=True):
            own = table[table.kind == kind]
            wide = own.pivot(index="without", columns="condition", values="exact")
            _heat(axes, wide.loc[list(dict.fromkeys(own.without)), list(dict.fromkeys(own.condition))])
            axes.set_title(titles[kind], fontsize=9)
            plt.setp(axes.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor")
        panels[0][0].set_ylabel("without")
    return figure
