"""Figures of notebook 11; each function takes tables of `studies.llm_scale.study` and returns a Figure."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clairlib.plots import BENIGN, CONTAMINATED, NEUTRAL, STYLE

PARTS = {"read_seconds": ("reading", "#9ecae1"), "copy_seconds": ("copy", "#e69f00"), "gram_seconds": ("Gram", NEUTRAL)}
AXES = {"clients": "clients K", "rank": "adapter rank", "p": "p = q", "modules": "modules"}


def bench(table: pd.DataFrame) -> Figure:
    """Draw seconds of the lower bound (by part), of `clair align` and of dense computation.

    ``table`` is a result of `clairlib.bench.alignment.measure`; each row, a device and a number of processes, has a
    panel. The axis is logarithmic.
    """
    with plt.style.context(STYLE):
        figure, panels = plt.subplots(len(table), 1, figsize=(8, 0.6 + 1.5 * len(table)), sharex=True, squeeze=False)
        for axes, (_, row) in zip(panels[:, 0], table.iterrows(), strict=True):
            _bench_panel(axes, row)
        panels[0][0].legend(loc="upper right", fontsize=8)
        least = table[list(PARTS)].where(table[list(PARTS)] > 0).min().min()
        panels[-1][0].set(xlabel="seconds", xlim=(least / 2, 4 * table.dense_seconds.max()))
    return figure


def _bench_panel(axes: Axes, row: pd.Series) -> None:
    begin = 0.0
    for part, (label, colour) in PARTS.items():
        if row[part] > 0:
            axes.barh(2, row[part], left=begin, color=colour, label=label)
            begin += row[part]
    axes.barh(1, row.align_seconds, color=BENIGN, label="clair align")
    axes.barh(0, row.dense_seconds, color=CONTAMINATED, label="dense, scaled up")
    texts = (f"{row.dense_to_align:,.3g} x", f"{row.to_floor:.3g} x", "")
    for place, (seconds, text) in enumerate(zip((row.dense_seconds, row.align_seconds, begin), texts, strict=True)):
        axes.text(seconds, place, f" {text}", va="center", fontsize=8)
    axes.set_yticks((2, 1, 0), ("floor", "clair align", "dense route"))
    axes.set(xscale="log", title=f"{row.device}, {row.jobs} process{'es' if row.jobs > 1 else ''}")


def growth(table: pd.DataFrame, slopes: pd.DataFrame) -> Figure:
    """Draw seconds (top) and peak memory (bottom) of one alignment against each size, log-log.

    Titles show the fitted power. ``table`` columns: along, align_seconds, search_seconds, memory_gb and the growing
    parameters. ``slopes`` columns: along, of, exponent, low, high.
    """
    fits, names = slopes.set_index(["along", "of"]), list(dict.fromkeys(table.along))
    with plt.style.context(STYLE):
        size = (0.6 + 2.9 * len(names), 5.2)
        figure, panels = plt.subplots(2, len(names), figsize=size, sharex="col", sharey="row", squeeze=False)
        for top, bottom, along in zip(*panels, names, strict=True):
            rows = table[table.along == along].sort_values(along)
            top.loglog(rows[along], rows.align_seconds, "o", color=BENIGN, label="whole")
            top.loglog(rows[along], rows.search_seconds, "x", color=NEUTRAL, label="to the first module")
            bottom.loglog(rows[along], rows.memory_gb, "o", color=BENIGN)
            for axes, of in ((top, "align_seconds"), (bottom, "memory_gb")):
                fit = fits.loc[(along, of)]
                axes.set_title(f"power {fit.exponent:.2f} [{fit.low:.2f}, {fit.high:.2f}]", fontsize=9)
            levels = sorted(rows[along].unique())
            bottom.set_xticks(levels, [f"{level:,}" for level in levels])
            bottom.minorticks_off()
            bottom.set_xlabel(AXES[along])
        panels[0][0].set_ylabel("seconds")
        panels[1][0].set_ylabel("peak memory, GB")
        panels[0][0].legend(fontsize=8)
    return figure
