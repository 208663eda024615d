"""Figures of notebook 10; each function takes tables of the language study and returns a Figure."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clairlib.plots import BENIGN, NEUTRAL, PALE, STYLE
from clairlib.recovery.leave_one_out import MIN_EXPLAINED_VARIANCE
from studies.common.plots import PAIRS


def shared_subspace(spectrum: pd.DataFrame, angles: pd.DataFrame, rank: int) -> Figure:
    """Draw per module the spectrum of the clients that CLAIR keeps, and principal angles between pairs of clients.

    ``spectrum`` columns: module, direction, value; ``angles``: module, pair, angle, degrees. Values are means over
    seeds.
    """
    with plt.style.context(STYLE):
        modules = list(dict.fromkeys(spectrum.module))
        figure, panels = plt.subplots(len(modules), 2, figsize=(9, 0.6 + 2.7 * len(modules)), squeeze=False)
        for (left, right), module in zip(panels, modules, strict=True):
            _spectrum(left, spectrum[spectrum.module == module], rank)
            _angles(right, angles[angles.module == module])
            left.set_title(module, fontsize=9)
        panels[-1][0].set_xlabel("direction")
        panels[-1][1].set_xlabel("principal angle")
        panels[0][1].legend(fontsize=8)
    return figure


def _spectrum(axes: Axes, rows: pd.DataFrame, rank: int) -> None:
    values = rows.groupby("direction").value.mean()
    axes.bar(values.index, values, color=np.where(values.index <= rank, BENIGN, PALE))
    axes.set(ylabel="singular value / first", ylim=(0, 1.05))


def _angles(axes: Axes, rows: pd.DataFrame) -> None:
    for pair, colour in PAIRS.items():
        degrees = rows[rows.pair == pair].groupby("angle").degrees.mean()
        axes.plot(degrees.index, degrees, "o-", color=colour, label=pair, markersize=4)
    axes.set(ylabel="degrees", ylim=(0, 92))
    axes.set_xticks(sorted(set(rows.angle)))


def structure_by_module(table: pd.DataFrame) -> Figure:
    """Draw every module's shared structure with its interval; unrelated clients stay below the dashed line.

    ``table`` columns: module, shared_structure, low, high.
    """
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 1 + 0.26 * len(table)))
        places = np.arange(len(table))
        writes = table.module.str.contains("o_proj|down_proj|output")
        axes.barh(places, table.shared_structure, color=np.where(writes, BENIGN, PALE), height=0.7)
        axes.hlines(places, table.low, table.high, color="black", linewidth=1)
        axes.axvline(MIN_EXPLAINED_VARIANCE, color=NEUTRAL, linewidth=0.8, linestyle="--")
        axes.set_yticks(places, list(table.module), fontsize=8)
        axes.set_ylim(len(table) - 0.4, -0.6)  # the first row on top
        axes.set(xlabel="shared structure", xlim=(0, 1))
    return figure
