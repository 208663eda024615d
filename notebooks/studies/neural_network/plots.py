"""Figures of notebook 07; each function takes tables of `studies.neural_network.study` and returns a Figure."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from clairlib.plots import BENIGN, STYLE, colour_of
from studies.common.plots import PAIRS

LINES = ("local", "FedAvg", "FedAvg, benign only", "CLAIR", "CLAIR, told S and r")
SHOWN = 12  # singular values drawn


def pictures(rows: Mapping[str, Tensor]) -> Figure:
    """Draw real images as the clients have them: a row of pictures (n, height, width) under each name."""
    with plt.style.context(STYLE):
        columns = min(len(images) for images in rows.values())
        figure, panels = plt.subplots(len(rows), columns, figsize=(1.1 * columns, 0.95 * len(rows)), squeeze=False)
        for line, (name, images) in zip(panels, rows.items(), strict=True):
            for axes, image in zip(line, images, strict=False):
                axes.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
                axes.set_axis_off()
            line[0].set_title(name, loc="left", fontsize=8)
    return figure


def layers(structure: pd.DataFrame, angles: pd.DataFrame, spectrum: pd.DataFrame) -> Figure:
    """Draw for each layer of one setting: the benign clients' spectrum (top) and principal angles (bottom).

    ``structure`` columns: layer, shared_structure; ``angles``: layer, pair, angle, degrees, spread; ``spectrum``:
    layer, direction, singular_value. Values are means over seeds. An error bar is one standard deviation over pairs.
    """
    with plt.style.context(STYLE):
        names = list(structure.layer)
        figure, panels = plt.subplots(2, len(names), figsize=(3.1 * len(names), 5), sharey="row", squeeze=False)
        for top, bottom, (_, row) in zip(*panels, structure.iterrows(), strict=True):
            _spectrum(top, spectrum[spectrum.layer == row.layer])
            _angles(bottom, angles[angles.layer == row.layer])
            top.set_title(f"{row.layer}: shared structure {row.shared_structure:.2f}")
        panels[0][0].set_ylabel("singular value, of the largest")
        panels[1][0].set_ylabel("degrees")
        handles, labels = panels[1][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    return figure


def _spectrum(axes: Axes, rows: pd.DataFrame) -> None:
    values = rows.groupby("direction").singular_value.mean().head(SHOWN)
    axes.plot(values.index, values / values.max(), "o-", color=BENIGN)
    axes.set(xlabel="direction", ylim=(0, 1.05))


def _angles(axes: Axes, rows: pd.DataFrame) -> None:
    mean = rows.groupby(["pair", "angle"], as_index=False)[["degrees", "spread"]].mean()
    for place, (pair, colour) in enumerate(PAIRS.items()):
        own = mean[mean.pair == pair]
        beside = own.angle + 0.06 * (place - 1.5)  # shifted, so that the error bars do not overlap
        axes.errorbar(beside, own.degrees, own.spread, fmt="o-", color=colour, label=pair, capsize=2)
    axes.set_xticks(sorted(mean.angle.unique()))
    axes.set(xlabel="principal angle", ylim=(0, 95))


def along_examples(table: pd.DataFrame) -> Figure:
    """Draw benign accuracy against examples per client; ``table`` columns: examples, method, value, low, high."""
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(5.5, 3.4))
        for method in LINES:
            rows = table[table.method == method].sort_values("examples")
            spread = np.abs([rows.value - rows.low, rows.high - rows.value])
            colour = colour_of(method)
            axes.errorbar(rows.examples, rows.value, spread, fmt="o-", color=colour, label=method, markersize=4)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="examples a client", ylabel="benign accuracy")
        axes.legend(fontsize=8)
    return figure
