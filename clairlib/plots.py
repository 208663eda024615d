"""The overview figure of a result, and the colours and style that all figures share."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clairlib.recovery.result import ClairResult, ModuleResult

STYLE = Path(__file__).with_name("plots.mplstyle")
BENIGN, CONTAMINATED, NEUTRAL = "#0072b2", "#d55e00", "#8c8c8c"
PALE = "#c9c9c9"  # values shown for comparison only
COLOURS = {
    "base": "#bdbdbd",
    "local": "#8c8c8c",
    "local, early-stopped": "#595959",
    "FedAvg": "#e69f00",
    "FedAvg, factors": "#f0c36d",
    "FedAvg, benign only": "#cc79a7",
    "MultiKrum": "#a6611a",
    "geometric median": "#b8860b",
    "Subspace-Median": "#d4b800",
    "PCA": "#fdae61",
    "block FMS": "#c51b7d",
    "spectral": "#8c510a",
    "norm filter": "#fee090",
    "Krum distance": "#bf812d",
    "geometric median distance": "#dfc27d",
    "CLAIR": "#0072b2",
    "CLAIR, not truncated": "#56b4e9",
    "CLAIR, no weights": "#9ecae1",
    "CLAIR, pooled": "#08306b",
    "CLAIR, told r": "#7a5cb8",
    "CLAIR, told r, pooled": "#54278f",
    "CLAIR, told S and r": "#009e73",
    "CLAIR, told S and r, pooled": "#66c2a4",
    "CLAIR, told S and P": "#004d38",
    "told P, M, sigma: energy": "#000000",
    "told P, M, sigma: filtered": "#737373",
}
"""Colour of each method, the same in every figure: blue for CLAIR, green for oracles, warm colours for other rules."""
OTHER = "#4d4d4d"  # methods without a colour of their own
SHOWN = 30  # most singular values drawn
MAX_HEAT = 60  # most modules drawn, the first ones


def colour_of(method: str) -> str:
    """Return the colour of a method; methods that are not in ``COLOURS`` share one."""
    return COLOURS.get(method, OTHER)


def overview(result: ClairResult) -> Figure:
    """Draw spectrum, verdict and gain of a result in one figure.

    With several modules, a heat map of scores by module and client replaces the spectrum.
    """
    modules = list(result.modules.values())
    with plt.style.context(STYLE):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8), width_ratios=(1.1, 1.3, 0.9))
        _verdict(middle, result)
        if len(modules) == 1:
            _spectrum(left, modules[0])
            _error_terms(right, modules[0])
        else:
            _heat(left, result)
            _gains(right, modules[:MAX_HEAT])
    return figure


def _spectrum(axes: Axes, module: ModuleResult) -> None:
    values = np.asarray(module.spectrum)[:SHOWN]
    inside = np.arange(len(values)) < module.rank
    axes.bar(np.arange(1, len(values) + 1), values, color=np.where(inside, BENIGN, PALE))
    axes.set(title=f"Spectrum of the benign clients: rank {module.rank}", xlabel="direction", ylabel="singular value")


def _heat(axes: Axes, result: ClairResult) -> None:
    modules = list(result.modules.values())[:MAX_HEAT]
    order = np.argsort(np.asarray(result.scores))
    scores = np.stack([np.asarray(m.scores)[order] for m in modules])
    image = axes.imshow(scores, aspect="auto", cmap="RdBu_r", vmin=-10, vmax=10, interpolation="nearest")
    axes.grid(False)
    axes.set(title="Score by module", xlabel="client, by pooled score", ylabel="module")
    if len(modules) <= 16:
        axes.set_yticks(range(len(modules)), [_short(m.name) for m in modules], fontsize=7)
    axes.figure.colorbar(image, ax=axes, label="standard deviations", shrink=0.9)


def _verdict(axes: Axes, result: ClairResult) -> None:
    scores, benign = np.asarray(result.scores), np.asarray(result.benign)
    order = np.argsort(scores)
    places = np.arange(len(scores))
    for wanted, colour, label in ((True, BENIGN, "benign"), (False, CONTAMINATED, "contaminated")):
        chosen = benign[order] == wanted
        axes.plot(places[chosen], scores[order][chosen], "o", color=colour, label=f"{label} ({chosen.sum()})")
    if len(scores) <= 40:
        axes.set_xticks(places, [_short(result.names[k]) for k in order], rotation=90, fontsize=7)
    axes.axhline(0, color=NEUTRAL, linewidth=0.8)
    axes.set_yscale("symlog", linthresh=5)
    axes.set(title="Score of each client", ylabel="standard deviations above benign")
    axes.legend(loc="upper left")


def _error_terms(axes: Axes, module: ModuleResult) -> None:
    terms = module.gain_terms
    parts = {
        "noise inside": (terms.inside, terms.inside),
        "noise outside": (terms.local - terms.inside, terms.off_subspace),
        "heterogeneity": (0.0, terms.heterogeneity),
        "subspace cost": (0.0, terms.subspace_cost),
    }
    bottom = np.zeros(2)
    for (label, heights), colour in zip(parts.items(), (BENIGN, "#9ecae1", CONTAMINATED, "#e69f00"), strict=True):
        axes.bar(["local", "refined"], heights, bottom=bottom, color=colour, label=label, width=0.6)
        bottom = bottom + np.array(heights)
    outcome = "" if module.is_refined else ", refused"
    axes.set(title=f"Estimated error: {module.gain:.0%} removed{outcome}", ylabel="squared error of a client")
    axes.legend(fontsize=8)


def _gains(axes: Axes, shown: list[ModuleResult]) -> None:
    colours = [BENIGN if m.is_refined else NEUTRAL for m in shown]
    places = np.arange(len(shown))
    axes.barh(places, [100 * max(m.gain, -1.0) for m in shown], color=colours)
    if len(shown) <= 16:
        axes.set_yticks(places, [_short(m.name) for m in shown], fontsize=7)
    else:
        axes.set_ylabel("module")
    axes.invert_yaxis()
    axes.set(title="Estimated gain", xlabel="local squared error removed, %")


def _short(name: str, length: int = 22) -> str:
    plain = name.replace("$", r"\$")
    return plain if len(plain) <= length else "…" + plain[-length + 1 :]
