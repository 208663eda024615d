"""Refinement gain (Statement 4): measured errors against closed forms, the boundary of gain, and CLAIR's decisions.

``noise`` is the noise of one row of an update: an entry's standard deviation is noise / sqrt(q). ``ratio`` is the
benign heterogeneity h over sigma sqrt((p - r) q), the h at which refinement stops paying to first order. Statement 4 is
this project's reconstruction (notebook 05), not the paper's (arXiv:2605.21217).
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
SMALL = 0.05  # largest (sigma^2 + tau^2) q for which the second order is claimed; a signal row has norm 1
TERMS = ("inside", "off_subspace", "heterogeneity", "subspace_cost", "total")
AROUND = (0.9, 1.0, 1.1)  # multiples of the predicted boundary
METHODS = ("local", "FedAvg", "CLAIR", "CLAIR, told S and r", "told S and P")
SIZE = ["K", "share", "q", "r", "noise"]


def sizes(K: int, share: float, q: int, r: int, noise: float, ratio: float | None = None) -> dict[str, Any]:
    """Return a cell's arguments for the closed forms: entry noise, p, q, r, s, and h where a ratio is given."""
    size = {"noise": noise / q**0.5, "p": ROWS, "q": q, "r": r, "s": K - round(share * K)}
    return size if ratio is None else size | {"heterogeneity": ratio * noise * (ROWS - r) ** 0.5}


def draw(
    name: str, seed: int, K: int, share: float, q: int, r: int, noise: float, ratio: float = 0.0, **options: Any
) -> Planted:
    """Draw planted clients of the study; equal name and seed give equal directions at every noise level and ratio."""
    h, generator = ratio * noise * (ROWS - r) ** 0.5, derive(seed, "gain", name, K, str(share), q, r)
    entry = noise / q**0.5
    return planted(
        share=share, K=K, p=ROWS, q=q, r=r, noise_std=entry, heterogeneity=h, generator=generator, **options
    )


def oracle_frame(truth: Planted, weights: Tensor | None = None) -> Frame:
    """Fit the frame to the benign clients at the true rank."""
    w = torch.ones(len(truth.updates), dtype=torch.float64) if weights is None else weights
    return fit_frame(truth.updates, w, truth.benign, truth.rank)


def terms_cell(
    K: int, share: float, q: int, r: int, noise: float, ratio: float, draws: int, seed: int, basis: str = "true"
) -> dict[str, Rows]:
    """Measure every draw's error terms, for an oracle told S and P and for one told S and r.

    ``basis`` "random" replaces the true U by a random one.
    """
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
    """Compare each cell, oracle and term with its formula: measured mean, standard error, formula and z score.

    ``small`` is true where the order of the formula is claimed to suffice. z is NaN for a term without variation, such
    as a heterogeneity or subspace cost of exactly zero.
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
    """Measure every draw's gain, told S and r, at multiples x of the first-order boundary, along h or n.

    ``axis`` "heterogeneity": h = x h*. ``axis`` "samples": the sample size is n = x and sigma^2 = sigma_1^2 / n, with h
    equal to h* at n = 1.
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
    """Average the gain over the local error, with its interval, by number of benign clients s.

    ``table`` is the table "terms" with q = 1; rows told S and r are used. ``formula`` is the gain to first order.
    ``enough`` is true where s exceeds 1 + r / q; with fewer clients the refined update equals the local one.
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
    """Find in each cell where the mean gain crosses zero, with its interval, and compare with the second-order root.

    Both are in units of the first-order root.
    """
    rows = []
    for (*cell, axis), group in table.groupby([*SIZE, "axis"], sort=False):
        size, power = sizes(*cell), 2.0 if axis == "heterogeneity" else 1.0  # gain is linear in h^2, nearly linear in n
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
    """Measure the errors of all methods, with CLAIR told nothing, and CLAIR's decision to refine.

    ``rank`` is the rank of every H_k. ``would_gain``: local error less the refined error, over the local error; the
    refined error counts even where CLAIR refuses to refine.
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
    """Summarise each cell and method: mean error with interval, over the local error of the closed form.

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
    """Check CLAIR's decision on the same updates under two readings of their truth (``oracle_gain.two_readings``).

    ``told_refines``: decision by Stein's estimate, told S, r and the noise level of the reading.
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
    """Summarise each cell: mean true gain, and how often the rule decides correctly.

    ``away``: the mean gain differs from zero by more than 3 standard errors. ``right``: proportion of draws with a
    correct decision (Wilson interval).
    """
    rows = []
    for cell, group in table.groupby(list(by), sort=False, dropna=False):
        gain, error = group.would_gain.mean(), group.would_gain.std() / len(group) ** 0.5
        count = int((group[rule] == (group.would_gain > 0)).sum())  # truth: this draw's gain
        right, low, high = rate_interval(count, len(group))
        row = {"draws": len(group), "gain": gain, "error": error, "away": abs(gain) > 3 * error}
        row |= {"refines": group[rule].mean(), "right": right, "low": low, "high": high, "count": count}
        rows.append({**dict(zip(by, cell, strict=True)), **row})
        rows[-1]["small"] = rows[-1]["noise"] ** 2 * (1 + rows[-1]["ratio"] ** 2) <= SMALL
    return pd.DataFrame(rows)


def weights_cell(spread: float, noise: float, draws: int, seed: int) -> dict[str, Rows]:
    """Measure errors with unequal sample sizes, told the weights and not told them.

    The largest sample size is ``spread`` times the smallest. ``oracle`` is told P and S, and ``formula`` is its closed
    form. ``clair`` is told nothing but the weights.
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
    """Summarise each cell: mean errors told and not told the weights, and z of the oracle against its formula."""
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
    """Return every variant of the shape with every combination of the values."""
    return [{**SHAPE, **variant, **cell} for variant in VARIANTS for cell in grid(**values)]


def gain_study(
    part: str, cells: Sequence[dict[str, Any]], draws: int, *, seed: int = 0, cache: Path | None = None, jobs: int = 1
) -> pd.DataFrame:
    """Run one part of the study, a key of ``CELLS``, over parameter sets (``shapes`` or ``grid``)."""
    fixed = {"draws": draws, "seed": seed}
    return sweep(CELLS[part], [{**cell, **fixed} for cell in cells], cache=cache, jobs=jobs)[part]
