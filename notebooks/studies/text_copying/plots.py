"""Figures of notebook 08; each function takes tables of the text-copying study and returns a Figure."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clairlib.plots import BENIGN, CONTAMINATED, NEUTRAL, PALE, STYLE, colour_of

AXES = {
    "sequences": "sequences a client",
    "share": "contaminated share",
    "label_noise": "label noise",
    "rank": "adapter rank",
    "clients": "clients",
}
LOGARITHMIC = ("sequences", "rank")


def accuracies(table: pd.DataFrame) -> Figure:
    """Draw benign accuracy by method with its interval over seeds, and the worst client; one panel per setting.

    ``table`` columns: setting, method, accuracy, low, high, worst_client; all rows have one label noise level.
    """
    with plt.style.context(STYLE):
        settings = list(dict.fromkeys(table.setting))
        methods = list(dict.fromkeys(table.method))
        size = (3.2 + 2.9 * len(settings), 1 + 0.24 * len(methods))
        figure, panels = plt.subplots(1, len(settings), figsize=size, sharey=True, sharex=True, squeeze=False)
        for axes, setting in zip(panels[0], settings, strict=True):
            rows = table[table.setting == setting]
            places = np.array([methods.index(method) for method in rows.method])
            colours = [colour_of(method) for method in rows.method]
            axes.hlines(places, rows.low, rows.high, colors=colours, linewidth=1.6)
            axes.scatter(rows.accuracy, places, color=colours, s=28, zorder=3)
            axes.plot(rows.worst_client, places, "|", color=NEUTRAL, markersize=8)
            axes.set(title=setting, xlabel="benign copying accuracy")
        _name_rows(panels[0][0], methods)
        panels[0][0].plot([], [], "|", color=NEUTRAL, markersize=8, label="worst client")
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower right")
    return figure


def _name_rows(axes: Axes, methods: list[str]) -> None:
    axes.set_yticks(range(len(methods)), methods, fontsize=8)
    axes.set_ylim(len(methods) - 0.4, -0.6)  # the first row on top


def on_and_off_symbols(table: pd.DataFrame) -> Figure:
    """Draw accuracy on the dialects' symbols and on other tokens, by method.

    ``table`` columns: method, on_symbols, off_symbols.
    """
    with plt.style.context(STYLE):
        methods = list(table.method)
        figure, axes = plt.subplots(figsize=(7, 1 + 0.24 * len(methods)))
        places = range(len(methods))
        axes.hlines(places, table.on_symbols, table.off_symbols, color="#e6e6e6", linewidth=3)
        axes.plot(table.on_symbols, places, "o", color=CONTAMINATED, label="on the dialects' symbols")
        axes.plot(table.off_symbols, places, "o", color=BENIGN, label="off them")
        axes.set(xlabel="benign copying accuracy", xlim=(-0.02, 1.02))
        _name_rows(axes, methods)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return figure


def vocabulary_leverage(table: pd.DataFrame) -> Figure:
    """Draw the recovered subspace's leverage on every token; ``table`` columns: token, leverage, symbol (bool)."""
    with plt.style.context(STYLE):
        mean = table.groupby(["token", "symbol"], as_index=False).leverage.mean()
        figure, axes = plt.subplots(figsize=(8, 2.8))
        for is_symbol, colour, label in ((False, PALE, "other tokens"), (True, CONTAMINATED, "dialect symbols")):
            rows = mean[mean.symbol == is_symbol]
            axes.bar(rows.token, rows.leverage, color=colour, label=label)
        axes.set(title="What the recovered subspace writes to", xlabel="token", ylabel="leverage")
        axes.legend(loc="lower center", bbox_to_anchor=(0.75, 1.0), ncols=2)
    return figure


def joint_spectrum(table: pd.DataFrame, rank: int, shown: int = 20) -> Figure:
    """Draw singular values of the centred updates side by side; ``table`` columns: clients, direction, singular_value.

    ``rank``: dimension that the dialects give the shared subspace, after which the benign clients' values should drop.
    """
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(6, 3))
        for (name, rows), colour in zip(table.groupby("clients", sort=False), (BENIGN, NEUTRAL), strict=True):
            mean = rows[rows.direction <= shown].groupby("direction").singular_value.mean()
            axes.plot(mean.index, mean, "o-", color=colour, label=str(name))
        axes.axvline(rank + 0.5, color=NEUTRAL, linestyle="--", linewidth=0.8)
        axes.set(xlabel="direction", ylabel="singular value", ylim=(0, None))
        axes.legend()
    return figure


def curves(table: pd.DataFrame) -> Figure:
    """Draw benign accuracy along each curve, one line per method.

    ``table`` columns: curve, value, method, accuracy, low, high.
    """
    with plt.style.context(STYLE):
        names = list(dict.fromkeys(table.curve))
        figure, panels = plt.subplots(1, len(names), figsize=(3 * len(names), 3.4), sharey=True, squeeze=False)
        for axes, name in zip(panels[0], names, strict=True):
            for method, rows in table[table.curve == name].groupby("method", sort=False):
                _line(axes, rows, "accuracy", colour_of(str(method)), str(method))
            _place(axes, name)
        panels[0][0].set_ylabel("benign copying accuracy")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
    return figure


def detection_curves(table: pd.DataFrame) -> Figure:
    """Draw the rate of exact sets and the scores' AUC along each curve; ``table`` columns: curve, value, exact, auc."""
    with plt.style.context(STYLE):
        names = list(dict.fromkeys(table.curve))
        figure, panels = plt.subplots(1, len(names), figsize=(3 * len(names), 3), sharey=True, squeeze=False)
        for axes, name in zip(panels[0], names, strict=True):
            rows = table[table.curve == name]
            axes.plot(rows.value, rows.auc, "s--", color=NEUTRAL, label="AUC of the scores")
            axes.plot(rows.value, rows.exact, "o-", color=BENIGN, label="share of exact sets")
            axes.set_ylim(-0.03, 1.05)
            _place(axes, name)
        panels[0][0].legend(fontsize=8)
    return figure


def gain_against_data(table: pd.DataFrame) -> Figure:
    """Draw the gain over local against sequences per client: measured in accuracy (left), estimated by CLAIR (right).

    ``table`` columns: curve, value, gain, mean, low, high. Grey lines are proportional to 1 / sequences.
    """
    with plt.style.context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(9, 3.2))
        table = table[table.curve == "sequences"]
        for axes, names in zip(panels, (("CLAIR", "CLAIR, told S and r"), ("removed",)), strict=True):
            for name in names:
                _line(axes, table[table.gain == name], "mean", (BENIGN if name == "removed" else colour_of(name)), name)
            rows = table[table.gain == names[-1]].sort_values("value")
            inverse = rows["mean"].iloc[0] * rows.value.iloc[0] / rows.value
            axes.plot(rows.value, inverse, color=NEUTRAL, zorder=0, label="1 / sequences")
            axes.set_yscale("log")
            _place(axes, "sequences")
        panels[0].set_ylabel("accuracy gained over local")
        panels[1].set_ylabel("squared error removed, estimated")
        panels[0].legend(fontsize=8)
    return figure


def _line(axes: Axes, rows: pd.DataFrame, y: str, colour: str, label: str) -> None:
    rows = rows.sort_values("value")
    spread = np.abs([rows[y] - rows.low, rows.high - rows[y]])
    axes.errorbar(rows.value, rows[y], spread, fmt="o-", color=colour, label=label, linewidth=1.2, markersize=4)


def _place(axes: Axes, curve: str) -> None:
    """Label a curve's axis, and set its ticks where it is logarithmic."""
    axes.set_xlabel(AXES[curve])
    if curve in LOGARITHMIC:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
