"""Figures that several studies draw; each function takes a tidy table and returns a Figure."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clairlib.baselines import AGGREGATORS
from clairlib.plots import BENIGN, CONTAMINATED, NEUTRAL, STYLE, colour_of

PAIRS = {
    "benign, benign": BENIGN,
    "benign, contaminated": "#e69f00",
    "contaminated, contaminated": CONTAMINATED,
    "random": NEUTRAL,
}

LINES = ("local", "FedAvg", "MultiKrum", "geometric median", "Subspace-Median", "CLAIR")
"""Methods that are drawn as lines along a sweep."""


def method_label(method: str) -> str:
    """Return a method's name, followed by the side information that the method is told."""
    rule = AGGREGATORS.get(method)
    return f"{method} (told {rule.told})" if rule is not None and rule.told else method


def _words(kind: object) -> str:
    return str(kind).replace("_", " ")


def stress(table: pd.DataFrame, *, panel: str | None, shown: str, full_colour: float) -> Figure:
    """Draw a table as a heat map: methods down, kinds of contamination across.

    Each cell shows the value with its interval. The best values are bold. The colour is the gain over local.

    ``table`` columns: kind, method, value, low, high, gain, best, and ``panel`` where there are several panels.
    ``shown`` is the format of a value. ``full_colour`` is the gain over local at which the colour saturates.
    """
    with plt.style.context(STYLE):
        cases = [("", table)] if panel is None else [(f"{panel} {v:g}", t) for v, t in table.groupby(panel)]
        methods, kinds = (list(dict.fromkeys(table[name])) for name in ("method", "kind"))
        size = (3.2 + 0.66 * len(kinds) * len(cases), 1.2 + 0.34 * len(methods))
        figure, panels = plt.subplots(1, len(cases), figsize=size, sharey=True, squeeze=False)
        for axes, (title, rows) in zip(panels[0], cases, strict=True):
            _stress_panel(axes, rows.set_index(["method", "kind"]), methods, kinds, shown, full_colour)
            axes.set_title(title)
        panels[0][0].set_yticks(range(len(methods)), [method_label(m) for m in methods], fontsize=8)
    return figure


def _stress_panel(
    axes: Axes, rows: pd.DataFrame, methods: list[str], kinds: list[str], shown: str, full_colour: float
) -> None:
    gain = rows.gain.unstack("kind").reindex(index=methods, columns=kinds)
    colour = np.sign(gain) * (gain.abs() / full_colour).clip(upper=1.0).pow(0.5)  # root: small gains stay visible
    axes.imshow(colour, cmap="RdBu", vmin=-1.7, vmax=1.7, aspect="auto")  # text is unreadable on the map's dark ends
    for i, method in enumerate(methods):
        for j, kind in enumerate(kinds):
            if (method, kind) in rows.index:
                row = rows.loc[method, kind]
                weight = "bold" if row.best else "normal"
                low = "" if np.isnan(row.low) else f"{row.low:{shown}}–{row.high:{shown}}"
                axes.text(j, i - 0.16, f"{row.value:{shown}}", ha="center", va="center", fontsize=7, weight=weight)
                axes.text(j, i + 0.26, low, ha="center", va="center", fontsize=4.5)
    axes.set_xticks(range(len(kinds)), [_words(kind) for kind in kinds], rotation=45, ha="right", fontsize=8)
    axes.grid(False)


def sweep(values: pd.DataFrame, outcomes: pd.DataFrame, along: str, label: str) -> Figure:
    """Draw benign accuracy (top) and flagged clients (bottom) along one parameter; one column of panels per kind.

    ``values`` is a table of ``tables.stress_table``, ``outcomes`` a table of ``tables.outcomes``. ``along`` is a column
    of both tables.
    """
    with plt.style.context(STYLE):
        kinds = list(dict.fromkeys(values.kind))
        size = (2 + 3 * len(kinds), 5.4)
        figure, panels = plt.subplots(2, len(kinds), figsize=size, sharex="col", sharey="row", squeeze=False)
        for top, bottom, kind in zip(*panels, kinds, strict=True):
            for method in LINES:
                _line(top, values[(values.kind == kind) & (values.method == method)], along, method, colour_of(method))
            rows = outcomes[outcomes.kind == kind].sort_values(along)
            bottom.plot(rows[along], rows.recall, "o-", color=CONTAMINATED, label="contaminated clients flagged")
            bottom.plot(rows[along], rows.benign_flagged, "o-", color=BENIGN, label="benign clients flagged")
            bottom.plot(rows[along], rows.exact, "s--", color=NEUTRAL, label="exact set found")
            bottom.set(xlabel=label, ylim=(-0.03, 1.05))
            top.set_title(_words(kind))
        for axes, name in zip(panels[:, 0], ("benign copying accuracy", "share"), strict=True):
            axes.set_ylabel(name)
        handles, labels = zip(*(axes.get_legend_handles_labels() for axes in panels[:, 0]), strict=True)
        figure.legend(sum(handles, []), sum(labels, []), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _line(axes: Axes, rows: pd.DataFrame, along: str, label: str, colour: str) -> None:
    rows = rows.sort_values(along)
    spread = np.abs([rows.value - rows.low, rows.high - rows.value])
    axes.errorbar(rows[along], rows.value, spread, fmt="o-", color=colour, label=label, linewidth=1.2, markersize=4)


def success_rates(table: pd.DataFrame) -> Figure:
    """Draw every method's backdoor success rate with its interval; ``table`` columns: method, success, low, high."""
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 1 + 0.24 * len(table)))
        places = np.arange(len(table))
        colours = [colour_of(method) for method in table.method]
        axes.barh(places, table.success, color=colours, height=0.7)
        axes.hlines(places, table.low, table.high, color="black", linewidth=1)
        axes.set_yticks(places, [method_label(m) for m in table.method], fontsize=8)
        axes.set_ylim(len(table) - 0.4, -0.6)  # the first row on top
        axes.set(xlabel="triggers after which the backdoor's answer is written", xlim=(0, 1))
    return figure


def client_scores(table: pd.DataFrame, by: str) -> Figure:
    """Draw the scores of all clients, one row of dots per value of ``by``.

    ``table`` columns: score, contaminated, flagged and the column named by ``by``.
    """
    with plt.style.context(STYLE):
        groups = sorted(table[by].unique())
        figure, axes = plt.subplots(figsize=(7, 0.7 + 0.42 * len(groups)))
        for row, group in enumerate(groups):
            for truth, colour in ((False, BENIGN), (True, CONTAMINATED)):
                points = table[(table[by] == group) & (table.contaminated == truth)]
                axes.plot(points.score, np.full(len(points), row), "o", color=colour, alpha=0.75)
                wrong = points[points.flagged != points.contaminated]
                axes.plot(wrong.score, np.full(len(wrong), row), "x", color="black", markersize=9)
        axes.plot([], [], "o", color=BENIGN, label="benign")
        axes.plot([], [], "o", color=CONTAMINATED, label="contaminated")
        axes.plot([], [], "x", color="black", label="wrong verdict")
        axes.set_yticks(range(len(groups)), [str(g) for g in groups])
        axes.set_xscale("symlog", linthresh=5)
        axes.set(xlabel="standard deviations above benign", ylabel=by.replace("_", " "))
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return figure

def principal_angles(table: pd.DataFrame) -> Figure:
    """Draw principal angles between the column spaces of two clients' own updates, by kind of pair.

    ``table`` columns: pair, angle, degrees, spread. An error bar is one standard deviation over pairs in each
    direction, averaged over runs.
    """
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(6, 3.2))
        mean = table.groupby(["pair", "angle"], as_index=False)[["degrees", "spread"]].mean()
        for place, (pair, colour) in enumerate(PAIRS.items()):
            rows = mean[mean.pair == pair]
            beside = rows.angle + 0.06 * (place - 1.5)  # shifted, so that the error bars do not overlap
            axes.errorbar(beside, rows.degrees, rows.spread, fmt="o-", color=colour, label=pair, capsize=2)
        axes.set_xticks(sorted(table.angle.unique()))
        axes.set(xlabel="principal angle", ylabel="degrees", ylim=(0, 92))
        axes.legend(fontsize=8)
    return figure
