"""Refinement gain (Statement 4): measured errors against the closed forms, the boundary, and what the rule decides.

``noise`` is that of a row of an update: the standard deviation of an entry is noise / sqrt(q). ``ratio`` is the benign
heterogeneity h over sigma sqrt((p - r) q), the h at which refinement stops paying to first order. Statement 4 is this
project's reconstruction (notebook 05), not the paper's (arXiv:2605.21217).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from clairlib import CLAIR
from clairlib.core.seeds import derive
from clairlib.recovery.frame import Frame, fit_frame
from clairlib.recovery.refinement import refined_core
from clairlib.reproduce.sweep import Cell, Rows, grid, sweep
from clairlib.simulate import Planted, planted
from clairlib.simulate.attacks import random_frame
from clairlib.theory import refinement_gain as oracle_gain
from clairlib.theory.refinement_gain import Terms, measured_terms, stein_error
from studies.common.intervals import mean_interval, rate_interval
from studies.common.verdicts import benign_error

ROWS = 50  # p
SHAPE: dict[str, Any] = {"K": 24, "share": 0.3, "q": 10, "r": 3}
FEW, VECTORS = {"K": 6, "share": 0.0}, {"q": 1, "share": 0.0}
VARIANTS: tuple[dict[str, Any], ...] = ({}, {"share": 0.6}, FEW, VECTORS, {"r": 1}, {"q": 4, "r": 6})
SMALL = 0.05  # (sigma^2 + tau^2) q up to which the second order is claimed: the noise of a row against its signal
TERMS = ("inside", "off_subspace", "heterogeneity", "subspace_cost", "total")
AROUND = (0.9, 1.0, 1.1)  # of the predicted boundary
METHODS = ("local", "FedAvg", "CLAIR", "CLAIR, told S and r", "told S and P")
SIZE = ["K", "share", "q", "r", "noise"]


def sizes(K: int, share: float, q: int, r: int, noise: float, ratio: float | None = None) -> dict[str, Any]:
    """A cell's arguments for the closed forms: entry noise, p, q, r, s, and h where a ratio is given."""
    size = {"noise": noise / q**0.5, "p": ROWS, "q": q, "r": r, "s": K - round(share * K)}
    return size if ratio is None else size | {"heterogeneity": ratio * noise * (ROWS - r) ** 0.5}


def draw(
    name: str, seed: int, K: int, share: float, q: int, r: int, noise: float, ratio: float = 0.0, **options: Any
) -> Planted:
    """Planted clients of the study. The same name and seed give the same directions at every noise and ratio."""
    h, generator = ratio * noise * (ROWS - r) ** 0.5, derive(seed, "gain", name, K, str(share), q, r)
    entry = noise / q**0.5
    return planted(
        share=share, K=K, p=ROWS, q=q, r=r, noise_std=entry, heterogeneity=h, generator=generator, **options
    )


def oracle_frame(truth: Planted, weights: Tensor | None = None) -> Frame:
    """The frame fitted to the benign clients at the true rank."""
    w = torch.ones(len(truth.updates), dtype=torch.float64) if weights is None else weights
    return fit_frame(truth.updates, w, truth.benign, truth.rank)


def terms_cell(
    K: int, share: float, q: int, r: int, noise: float, ratio: float, draws: int, seed: int, basis: str = "true"
) -> dict[str, Rows]:
    """Measured terms of every draw, told S and P and told S and r; ``basis`` "random" replaces U by a random one."""
    rows = []
    for d in range(seed, seed + draws):
        truth = draw(f"terms {noise} {ratio}", d, K, share, q, r, noise, ratio)
        frame, U = oracle_frame(truth), truth.basis
        if basis == "random":
            U = random_frame(ROWS, r, generator=derive(d, "gain", "random basis"))
        for told, used in (("P", replace(frame, basis=U)), ("r", frame)):
            errors = (refined_core(truth.updates, used) - truth.targets)[truth.benign]
            terms = measured_terms(errors, truth.targets[truth.benign], truth.basis)
            rows.append({"told": told, "local": benign_error(truth.updates, truth), **_row(terms)})
    return {"terms": rows}


def _row(terms: Terms) -> dict[str, float]:
    return dict(zip(TERMS, (*astuple(terms), terms.total), strict=True))


def summarise_terms(draws: pd.DataFrame, order: int = 2) -> pd.DataFrame:
    """A row per cell, oracle and term: measured mean, standard error, formula, z; ``small`` where the order is claimed.

    A term without variation (a heterogeneity or subspace cost of exactly zero) has no z.
    """
    rows = []
    for (*cell, told), group in draws.groupby([*SIZE, "ratio", "told"], sort=False):
        known = dict(zip([*SIZE, "ratio"], cell, strict=True))
        size, local = sizes(**known), group.local.mean()
        closed = oracle_gain.oracle_terms(**size) if told == "P" else oracle_gain.estimated_terms(**size, order=order)
        small = told == "P" or known["noise"] ** 2 * (1 + known["ratio"] ** 2) <= SMALL
        for term, formula in _row(closed).items():
            mean, error = group[term].mean(), group[term].std() / len(group) ** 0.5
            z = (mean - formula) / error if error > 1e-9 * local else np.nan
            row = {"term": term, "measured": mean, "error": error, "formula": formula, "z": z}
            rows.append({**known, "told": told, "draws": len(group), "small": small, "local": local, **row})
    return pd.DataFrame(rows)


def boundary_cell(
    K: int, share: float, q: int, r: int, noise: float, axis: str, draws: int, seed: int
) -> dict[str, Rows]:
    """Gain of every draw (told S and r) at x times the first-order boundary, as h grows or as the sample size n does.

    ``axis`` "heterogeneity": h = x h*. "samples": h = h* for the noise of n = 1, sigma^2 = sigma_1^2 / n with n = x.
    """
    rows = []
    for d in range(seed, seed + draws):
        for x in AROUND:
            scale, ratio = (1.0, x) if axis == "heterogeneity" else (x**-0.5, x**0.5)
            truth = draw(f"boundary {axis} {noise}", d, K, share, q, r, noise * scale, ratio)
            local, refined = benign_error(truth.updates, truth), refined_core(truth.updates, oracle_frame(truth))
            rows.append({"draw": d, "x": x, "gain": 1 - benign_error(refined, truth) / local})
    return {"boundary": rows}


def summarise_clients(table: pd.DataFrame) -> pd.DataFrame:
    """Mean gain over the local error with its interval by number of clients s (of "terms", told S and r, q = 1).

    ``formula`` to first order; ``enough`` where s exceeds 1 + r / q. With fewer, refined is local.
    """
    rows = []
    for cell, group in table[table.told == "r"].groupby([*SIZE, "ratio"], sort=False):
        ratio, size = cell[-1], sizes(**dict(zip([*SIZE, "ratio"], cell, strict=True)))
        mean, low, high = mean_interval(1 - group.total / group.local)
        formula = oracle_gain.gain(**size, order=1) / oracle_gain.local_error(size["noise"], ROWS, size["q"])
        enough = size["s"] > oracle_gain.fewest_clients(size["q"], size["r"])
        row = {"s": size["s"], "ratio": ratio, "gain": mean, "low": low, "high": high, "enough": enough}
        rows.append(row | {"formula": formula if enough else 0.0})
    return pd.DataFrame(rows)


def summarise_boundary(table: pd.DataFrame) -> pd.DataFrame:
    """A row per cell: where the mean gain crosses zero with its interval, and the second-order root; over the first."""
    rows = []
    for (*cell, axis), group in table.groupby([*SIZE, "axis"], sort=False):
        size, power = sizes(*cell), 2.0 if axis == "heterogeneity" else 1.0  # the gain is linear in h^2, nearly so in n
        first = oracle_gain.boundary_heterogeneity(**size, order=1)
        second = oracle_gain.boundary_heterogeneity(**size) / first
        if axis == "samples":
            second = oracle_gain.boundary_samples(**size, heterogeneity=first)
        wide = group.pivot(index="draw", columns="x", values="gain")
        at, error = oracle_gain.crossing(wide.columns.to_numpy() ** power, wide.to_numpy())
        x, error = at ** (1 / power), error * at ** (1 / power - 1) / power
        row = {"crossing": x, "low": x - 1.96 * error, "high": x + 1.96 * error, "second": second}
        known = dict(zip([*SIZE, "axis"], (*cell, axis), strict=True))
        rows.append({**known, "draws": len(wide), **row, "z": (x - second) / error})
    return pd.DataFrame(rows)


def clair_cell(
    K: int, share: float, q: int, r: int, noise: float, ratio: float, rank: int | None, draws: int, seed: int
) -> dict[str, Rows]:
    """Errors by method, nothing told to CLAIR, and its decision to refine; ``rank`` that of every H_k.

    ``would_gain``: local error less the error refined, whatever was decided, over the local error.
    """
    rows = []
    for d in range(seed, seed + draws):
        truth = draw(f"clair {noise} {ratio} {rank}", d, K, share, q, r, noise, ratio, heterogeneity_rank=rank)
        X, frame, result = truth.updates, oracle_frame(truth), CLAIR().fit(truth.updates)
        anyway = result.basis @ (result.basis.T @ X) + result.common_part
        told = (refined_core(X, frame), refined_core(X, replace(frame, basis=truth.basis)))
        updates = (X, X.mean(dim=0).expand_as(X), result.refined, *told)
        row: dict[str, Any] = {m: benign_error(u, truth) for m, u in zip(METHODS, updates, strict=True)}
        row |= {"would_gain": 1 - benign_error(anyway, truth) / row["local"], "estimated_gain": result.gain}
        row |= {"refines": result.modules["update"].is_refined, "exact": bool(torch.equal(result.benign, truth.benign))}
        rows.append(row)
    return {"clair": rows}


def summarise_methods(table: pd.DataFrame) -> pd.DataFrame:
    """A row per cell and method: mean error with interval, over the local error that the closed form gives.

    ``over_other``, with its interval: CLAIR's error over the smaller one of local and FedAvg, draw by draw.
    """
    rows = []
    for cell, group in table.groupby([*SIZE, "ratio"], sort=False):
        known = dict(zip([*SIZE, "ratio"], cell, strict=True))
        local = oracle_gain.local_error(known["noise"] / known["q"] ** 0.5, ROWS, known["q"])
        other, lowest, highest = mean_interval(group.CLAIR / group[["local", "FedAvg"]].min(axis=1))
        known |= {"formula": oracle_gain.estimated_terms(**sizes(**known)).total / local, "over_other": other}
        known |= {"over_other_low": lowest, "over_other_high": highest}
        for method in METHODS:
            mean, low, high = mean_interval(group[method] / local)
            rows.append({**known, "method": method, "error": mean, "low": low, "high": high})
    return pd.DataFrame(rows)


def readings_cell(
    K: int, share: float, q: int, r: int, noise: float, ratio: float, draws: int, seed: int
) -> dict[str, Rows]:
    """The same updates in two readings (``oracle_gain.two_readings``): what CLAIR decides, and whether it was right.

    ``told_refines``: what Stein's estimate decides, told S, r and the noise of the reading.
    """
    rows, sigma = [], noise / q**0.5
    shape: dict[str, Any] = {"K": K, "share": share, "p": ROWS, "q": q, "r": r}
    for d in range(seed, seed + draws):
        generator = derive(d, "gain", f"readings {noise} {ratio}", K, str(share), q, r)
        both = oracle_gain.two_readings(noise=sigma, spread=ratio * sigma, generator=generator, **shape)
        X, result = both.updates, CLAIR().fit(both.updates)
        frame = fit_frame(X, torch.ones(K, dtype=torch.float64), both.benign, r)
        anyway, refines = result.basis @ (result.basis.T @ X) + result.common_part, result.modules["update"].is_refined
        readings = (("different", both.different, both.noise), ("alike", both.alike, both.noise_alike))
        for reading, targets, level in readings:
            local, error = (float((u - targets)[both.benign].square().sum()) for u in (X, anyway))
            told = stein_error(frame, level) < oracle_gain.local_error(level, ROWS, q)
            rows.append({"reading": reading, "refines": refines, "would_gain": 1 - error / local, "told_refines": told})
    return {"readings": rows}


def summarise_decisions(table: pd.DataFrame, by: Sequence[str], rule: str = "refines") -> pd.DataFrame:
    """A row per cell: mean true gain, is it 3 standard errors ``away`` from zero, how often the rule is right."""
    rows = []
    for cell, group in table.groupby(list(by), sort=False, dropna=False):
        gain, error = group.would_gain.mean(), group.would_gain.std() / len(group) ** 0.5
        count = int((group[rule] == (group.would_gain > 0)).sum())  # against the draw's own truth
        right, low, high = rate_interval(count, len(group))
        row = {"draws": len(group), "gain": gain, "error": error, "away": abs(gain) > 3 * error}
        row |= {"refines": group[rule].mean(), "right": right, "low": low, "high": high, "count": count}
        rows.append({**dict(zip(by, cell, strict=True)), **row})
        rows[-1]["small"] = rows[-1]["noise"] ** 2 * (1 + rows[-1]["ratio"] ** 2) <= SMALL
    return pd.DataFrame(rows)


def weights_cell(spread: float, noise: float, draws: int, seed: int) -> dict[str, Rows]:
    """Unequal sample sizes, the largest ``spread`` times the smallest: errors told the weights and not told.

    ``oracle`` is told P and S, ``formula`` its closed form, ``clair`` nothing but the weights.
    """
    K, q, r = SHAPE["K"], SHAPE["q"], SHAPE["r"]
    w = spread ** torch.linspace(-0.5, 0.5, K, dtype=torch.float64)
    rows = []
    for d in range(seed, seed + draws):
        truth = draw(f"weights {spread} {noise}", d, **SHAPE, noise=noise, weights=w)
        size: dict[str, Any] = {"noise": truth.noise_std, "p": ROWS, "q": q, "r": r}
        size["weights"] = w[truth.benign].tolist()
        for told, used in ((True, w), (False, torch.ones_like(w))):
            oracle = refined_core(truth.updates, replace(oracle_frame(truth, used), basis=truth.basis))
            result = CLAIR().fit(truth.updates, weights=used)
            row = {"told": told, "local": benign_error(truth.updates, truth), "oracle": benign_error(oracle, truth)}
            row |= {"formula": oracle_gain.weighted_oracle_terms(**size, told=told).total}
            row |= {"clair": benign_error(result.refined, truth)}
            rows.append({**row, "false_alarms": int((~result.benign & truth.benign).sum())})
    return {"weights": rows}


def summarise_weights(table: pd.DataFrame) -> pd.DataFrame:
    """A row per cell: mean errors told and not told the weights, and z of the oracle's error against its formula."""
    rows = []
    for (spread, noise, told), group in table.groupby(["spread", "noise", "told"], sort=False):
        off = group.oracle - group.formula
        ratio, low, high = mean_interval(group.clair / group.formula)
        row = {"draws": len(group), "z": off.mean() / (off.std() / len(off) ** 0.5)}
        row |= {name: group[name].mean() for name in ("local", "oracle", "formula", "clair", "false_alarms")}
        rows.append({"spread": spread, "noise": noise, "told": told, **row, "ratio": ratio, "low": low, "high": high})
    return pd.DataFrame(rows)


CELLS: dict[str, Cell] = {
    "terms": terms_cell,
    "boundary": boundary_cell,
    "clair": clair_cell,
    "readings": readings_cell,
    "weights": weights_cell,
}


def shapes(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """Every variant of the shape with every combination of the values."""
    return [{**SHAPE, **variant, **cell} for variant in VARIANTS for cell in grid(**values)]


def gain_study(
    part: str, cells: Sequence[dict[str, Any]], draws: int, *, seed: int = 0, cache: Path | None = None, jobs: int = 1
) -> pd.DataFrame:
    """A part of the study, a key of ``CELLS``, over parameter sets (``shapes`` or ``grid``); a row per draw or more."""
    fixed = {"draws": draws, "seed": seed}
    return sweep(CELLS[part], [{**cell, **fixed} for cell in cells], cache=cache, jobs=jobs)[part]
