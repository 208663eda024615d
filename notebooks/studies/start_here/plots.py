"""Figures of notebook 00: how often the benign set is found, and the error of each method."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from clairlib.plots import NEUTRAL, STYLE, colour_of


def recovery_rates(table: pd.DataFrame) -> Figure:
    """Plot the fraction of seeds with the exact set against the contaminated fraction of clients.

    There is a panel per kind of contamination and a line per noise level. Columns of ``table``: contamination, share
    (contaminated fraction), noise, exact, low, high (Wilson interval of exact).
    """
    with plt.style.context(STYLE):
        kinds = list(dict.fromkeys(table.contamination))
        figure, panels = plt.subplots(1, len(kinds), figsize=(3.2 * len(kinds), 3), sharey=True, squeeze=False)
        shades = plt.get_cmap("viridis")(np.linspace(0.1, 0.75, table.noise.nunique()))
        for axes, kind in zip(panels[0], kinds, strict=True):
            levels = table[table.contamination == kind].groupby("noise")
            for place, (shade, (noise, rows)) in enumerate(zip(shades, levels, strict=False)):
                spread = [rows.exact - rows.low, rows.high - rows.exact]
                beside = rows.share + 0.008 * place  # shifted, so that the intervals do not hide one another
                axes.errorbar(beside, rows.exact, spread, fmt="o-", color=shade, label=f"noise {noise:g}")
            axes.axhline(0.95, color=NEUTRAL, linewidth=0.8, linestyle="--")
            axes.set(title=kind, xlabel="contaminated share", ylim=(-0.03, 1.05))
        panels[0][0].set_ylabel("exact set found")
        panels[0][0].legend(loc="lower left", fontsize=8)
    return figure


def errors(table: pd.DataFrame) -> Figure:
    """Plot the mean squared error of each method with its interval.

    Columns of ``table``: method, error, low, high.
    """
    places, centre = np.arange(len(table)), table.error.to_numpy()
    spread = [centre - table.low.to_numpy(), table.high.to_numpy() - centre]
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(5.5, 0.5 + 0.45 * len(table)))
        axes.barh(places, centre, color=[colour_of(m) for m in table.method], height=0.7)
        axes.errorbar(centre, places, xerr=spread, fmt="none", color="black", capsize=2, linewidth=1)
        axes.set_yticks(places, list(table.method))
        axes.set_ylim(len(table) - 0.4, -0.6)  # first row on top
        axes.set(title="Mean squared error of the benign clients", xlabel="squared Frobenius error")
    return figure
