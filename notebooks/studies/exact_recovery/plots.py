"""Figures of notebook 02: phase diagrams of exact recovery, and the certificates behind them."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from clairlib.plots import BENIGN, CONTAMINATED, NEUTRAL, STYLE

OUTLINE = [withStroke(linewidth=4.2, foreground="black")]


def phase_diagram(
    summary: pd.DataFrame, limits: pd.DataFrame, identifiable: dict[str, float], methods: Sequence[str] | None = None
) -> Figure:
    """Draw the rate of exact draws by rank and contaminated fraction; a row of panels per kind, a column per method.

    ``summary`` columns: contamination, share, rank, method, exact. ``limits`` columns: contamination, rank, certified
    (contaminated fraction at which the median certificate fails). ``identifiable``: kind -> fraction at which
    identifiability ends.
    """
    with plt.style.context(STYLE):
        kinds = list(dict.fromkeys(summary.contamination))
        methods = list(dict.fromkeys(summary.method)) if methods is None else list(methods)
        figure, panels = plt.subplots(
            len(kinds), len(methods), figsize=(1.45 * len(methods) + 1.2, 1.25 * len(kinds) + 1.4), squeeze=False
        )
        for row, kind in zip(panels, kinds, strict=True):
            part = summary[summary.contamination == kind]
            shares, ranks = sorted(part.share.unique()), sorted(part["rank"].unique())
            for axes, method in zip(row, methods, strict=True):
                rates = part[part.method == method].pivot(index="rank", columns="share", values="exact")
                image = axes.imshow(rates, origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=1)
                shown = (limits.contamination == kind) & method.startswith("convex")  # the others have no certificate
                _limits(axes, limits[shown], shares, ranks, identifiable[kind])
                axes.set_yticks(range(len(ranks)), [str(r) for r in ranks])
                axes.tick_params(labelleft=axes is row[0], length=2)
                axes.set_xticks(range(len(shares)), [f"{s:g}"[1:] for s in shares], fontsize=7)
            row[0].set_ylabel(f"{kind}\nrank")
        for axes, method in zip(panels[0], methods, strict=True):
            axes.set_title(method.replace(", ", "\n").replace("outlier pursuit", "outl. pursuit"), fontsize=9)
        figure.supxlabel("contaminated share", fontsize=10)
        window = Line2D([], [], color="white", linewidth=2.2, path_effects=OUTLINE)
        end = Line2D([], [], color=CONTAMINATED, linewidth=2.2)
        lines = ["median certificate of the convex program fails", "identifiability ends (coalition: half)"]
        figure.legend([window, end], lines, loc="outside upper left", ncols=2, fontsize=9)
        figure.colorbar(image, ax=panels, label="exact draws", shrink=0.8, pad=0.01)
    return figure


def _limits(axes: Axes, limits: pd.DataFrame, shares: list[float], ranks: list[int], end: float) -> None:
    """Draw limits: white, where each rank's median certificate fails; red, where identifiability ends."""
    axes.grid(False)
    for limit in limits.itertuples():
        if np.isfinite(limit.certified):
            x, y = _place(limit.certified, shares), ranks.index(limit.rank)
            line = axes.plot([x, x], [y - 0.5, y + 0.5], color="white", linewidth=2.2, path_effects=OUTLINE)
            line[0].set_solid_capstyle("butt")
    if end < shares[-1]:
        axes.axvline(_place(end, shares), color=CONTAMINATED, linewidth=2.2)
    axes.set(xlim=(-0.5, len(shares) - 0.5), ylim=(-0.5, len(ranks) - 0.5))


def _place(share: float, shares: list[float]) -> float:
    """Return the position of a contaminated fraction on an axis with ``shares`` at 0, 1, .."""
    return float(np.interp(share, shares, np.arange(len(shares))))


def certificate_map(weights: pd.DataFrame) -> Figure:
    """Draw every solve of a weight sweep at the two numbers of its certificate, coloured by the result.

    ``weights`` columns: contamination, spectral, block, exact, exact_set.
    """
    with plt.style.context(STYLE):
        kinds = list(dict.fromkeys(weights.contamination))
        figure, panels = plt.subplots(1, len(kinds), figsize=(3.4 * len(kinds), 3.4), sharey=True, squeeze=False)
        outcomes = {
            "exact": (weights.exact, BENIGN, "o"),
            "set right, subspace not": (~weights.exact & weights.exact_set, "#e69f00", "^"),
            "set wrong": (~weights.exact_set.astype(bool), CONTAMINATED, "x"),
        }
        for axes, kind in zip(panels[0], kinds, strict=True):
            for label, (chosen, colour, marker) in outcomes.items():
                rows = weights[chosen & (weights.contamination == kind)]
                axes.plot(rows.spectral, rows.block, marker, color=colour, label=label, markersize=4, alpha=0.6)
            axes.axvline(1, color="black", linewidth=1)
            axes.axhline(1, color="black", linewidth=1)
            axes.set(title=kind, xscale="log", yscale="log", xlabel="spectral")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(plt.FixedLocator([0.5, 0.7, 1, 1.4, 2, 3]))
                axis.set_major_formatter("{x:g}")
                axis.set_minor_locator(plt.NullLocator())
        panels[0][0].set_ylabel("block")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=9)
    return figure


def dual_certificates(values: pd.DataFrame, summary: pd.DataFrame) -> Figure:
    """Draw the multiplier's singular values (top) and block norms over lam (bottom); one column of panels per case.

    ``values`` columns: case, part ("singular value" or "block norm"), value, benign. ``summary`` columns: case, share,
    sine, exact_set.
    """
    with plt.style.context(STYLE):
        figure, panels = plt.subplots(2, len(summary), figsize=(3 * len(summary), 4.6), sharey="row", squeeze=False)
        for (above, below), row in zip(panels.T, summary.itertuples(), strict=True):
            case = values[values.case == row.case]
            spectrum, blocks = case[case.part == "singular value"], case[case.part == "block norm"]
            colours = np.where(spectrum.value > 1 - 1e-4, BENIGN, "#c9c9c9")
            above.bar(range(1, len(spectrum) + 1), spectrum.value, color=colours)
            verdict = "set exact" if row.exact_set else "set wrong"
            above.set_title(f"{row.case}, share {row.share:g}\nsine {row.sine:.0e}, {verdict}", fontsize=9)
            above.set_xlabel("direction")
            for wanted, colour, label in ((True, BENIGN, "benign"), (False, CONTAMINATED, "contaminated")):
                chosen = blocks[blocks.benign.astype(bool) == wanted].sort_values("value")
                below.plot(range(len(chosen)), chosen.value, "o", color=colour, label=label)
            below.axhline(1, color=NEUTRAL, linewidth=0.8)
            below.set_xlabel("client, sorted within its group")
        panels[0][0].set_ylabel("singular value of Y")
        panels[1][0].set_ylabel(r"$||Y_k||_F\ /\ \lambda$")
        panels[1][0].legend(loc="lower right", fontsize=8)
    return figure


READINGS = {"client blocks": BENIGN, "pair blocks": "#e69f00"}


def reading_rates(summary: pd.DataFrame) -> Figure:
    """Draw rates of exact draws and of exact sets by contaminated fraction, one line per reading and rank.

    A row of panels per outcome and norm of the common part, a column per kind. ``summary`` columns: contamination,
    share, rank, common, reading, exact, exact_set. The bars are Wilson intervals (low, high), for ``exact`` alone.
    """
    with plt.style.context(STYLE):
        kinds, commons = (list(dict.fromkeys(summary[name])) for name in ("contamination", "common"))
        rows = [(common, outcome) for common in commons for outcome in ("exact", "exact_set")]
        size = (2.9 * len(kinds) + 0.6, 1.5 * len(rows) + 0.9)
        figure, panels = plt.subplots(len(rows), len(kinds), figsize=size, sharex="col", sharey=True, squeeze=False)
        for line, (common, outcome) in zip(panels, rows, strict=True):
            for axes, kind in zip(line, kinds, strict=True):
                part = summary[(summary.contamination == kind) & (summary.common == common)]
                _reading_lines(axes, part, outcome)
            name = "subspace and set" if outcome == "exact" else "set"
            line[0].set_ylabel(f"{name}\n$||M||_F$ = {common:g}", fontsize=9)
        for axes, kind in zip(panels[0], kinds, strict=True):
            axes.set_title(kind)
        figure.supxlabel("contaminated share", fontsize=10)
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=9)
    return figure


def _reading_lines(axes: Axes, part: pd.DataFrame, outcome: str) -> None:
    for (name, rank), rows in part.groupby(["reading", "rank"], sort=False):
        rows = rows.sort_values("share")
        size = 7 if name == "client blocks" else 4  # equal rates lie on each other
        style = "o-" if rank == min(part["rank"]) else "o--"
        label = f"{name}, rank {rank}"
        axes.plot(rows.share, rows[outcome], style, color=READINGS[name], markersize=size, label=label)
        if outcome == "exact":
            axes.vlines(rows.share, rows.low, rows.high, color=READINGS[name], linewidth=0.8, alpha=0.5)
    axes.set_ylim(-0.06, 1.06)


def weight_windows(windows: pd.DataFrame) -> Figure:
    """Draw windows of the weight lam over the certified weight, a bar per kind, contaminated fraction and reading.

    Wide bar: where the certificate holds in the median draw. Line: weights tried between the first and the last at
    which every draw is exact. Ticks: ends of the closed form. A window that is closed is not drawn. ``windows`` is a
    table of ``pairwise.windows``.
    """
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(7.5, 1.1 + 0.3 * len(windows)))
        for place, row in enumerate(windows.itertuples()):
            colour = READINGS[row.reading]
            if row.proved_width > 1:
                width = row.proved_high - row.proved_low
                axes.barh(place, width, left=row.proved_low, height=0.7, color=colour, alpha=0.4)
            axes.plot([row.found_low, row.found_high], [place, place], "o-", color=colour, markersize=4)
            if row.low < row.high:
                axes.plot([row.low, row.high], [place, place], "|", color="black", markersize=12)
        labels = [f"{row.contamination} {row.share:g}" for row in windows.itertuples()]
        axes.set_yticks(range(len(windows)), labels, fontsize=8)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(plt.FixedLocator([0.5, 0.6, 0.7, 0.8, 1, 1.2, 1.4, 1.7, 2]))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(plt.NullLocator())
        axes.set(xlabel="weight over the certified weight", ylim=(len(windows) - 0.4, -0.6))
        bars = [Line2D([], [], color=colour, linewidth=6, alpha=0.4) for colour in READINGS.values()]
        ticks = Line2D([], [], color="black", marker="|", markersize=12, linestyle="")
        found = Line2D([], [], color=NEUTRAL, marker="o", markersize=4)
        names = [f"{name}: proved" for name in READINGS]
        handles, names = [*bars, found, ticks], [*names, "found, every draw exact", "closed form"]
        figure.legend(handles, names, loc="outside upper center", ncols=2, fontsize=8)
    return figure
