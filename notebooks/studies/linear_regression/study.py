"""Linear regression: CLAIR on least-squares fits, for published designs and real data (notebook 06).

A cell is one draw of the clients' data. It returns every method's error on the benign clients, and CLAIR's verdict.
CLAIR is told nothing but the noise weights that the fits themselves give. Rivals are told the rank, and whatever else
their names say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from clairlib import CLAIR, ClairResult
from clairlib.baselines import aggregate
from clairlib.baselines.subspaces import block_fms, pca
from clairlib.baselines.weights import geometric_median
from clairlib.core.seeds import derive
from clairlib.linalg.subspace import project_out
from clairlib.recovery.frame import Frame, fit_frame
from clairlib.recovery.refinement import refined_core
from clairlib.reproduce.sweep import Cell, Rows, sweep
from clairlib.theory.refinement_gain import weighted_oracle_terms
from studies.common.intervals import mean_interval
from studies.common.verdicts import wrong_sides
from studies.linear_regression import designs as clients
from studies.linear_regression.designs import Split, Tasks
from studies.linear_regression.least_squares import Fits, least_squares, oracle_terms, pool, spectral, within

SINGLE, CLAIR_ALONE, POOLED = "single-task", "CLAIR", "CLAIR, pooled"
TOLD_RANK, ORACLE, ORACLE_POOLED = "CLAIR, told r, pooled", "CLAIR, told S and r", "CLAIR, told S and r, pooled"
AS_PUBLISHED = "single-task, 500 steps"
DESCENT, STEP = 500, 0.02  # number and length of the gradient steps of the published single-task fits
RULES = ["FedAvg", "coordinate median", "trimmed mean", "geometric median"]
ALL_DATA, ALL_BENIGN_DATA = "one regression, all data", "one regression, benign data"

CELL = ["q", "spread", "correlation", "share"]  # columns that identify a cell of the multi-response design
VERDICT = ["exact", "missed", "false_alarms", "rank", "refined", "shared_structure"]
AFTER = [ORACLE, CLAIR_ALONE, ORACLE_POOLED, POOLED]

PUBLISHED: Rows = [
    {"share": 0.0, "off": 0.0, "ARMUL": 0.309, "single-task": 0.716, "plain low-rank": 0.308},
    {"share": 0.2, "off": 0.0, "ARMUL": 0.346, "single-task": 0.712, "plain low-rank": 0.354},
    {"share": 0.2, "off": 0.5, "ARMUL": 0.498, "single-task": 0.712, "plain low-rank": 0.614},
]
"""Results of Duan and Wang (arXiv:2202.05250): largest l2 error of an inlier task, averaged over their 100 seeds.

They are computed from the results of every seed that are kept beside their code (github.com/kw2934/ARMUL). All their
methods are told the rank (their K = 3).
"""

TIAN = {"small": {"n": 100, "p": 50, "r": 5}, "large": {"n": 150, "p": 80, "r": 10}}
"""Designs of Tian, Gu, Feng (arXiv:2303.17765), each with 100 tasks."""


def armul_cell(share: float, off: float, run: int) -> dict[str, Rows]:
    """Run one published seed of the design of Duan and Wang: largest error of an inlier task, by method."""
    tasks = clients.armul(share, off, clients.armul_seed(run))
    fits = least_squares(tasks.X, tasks.Y)
    methods = peers(tasks, fits) | {AS_PUBLISHED: descent(tasks)}
    told = CLAIR(rank=tasks.rank).fit(fits.estimates, weights=fits.weights, expected_sq_error=fits.errors)
    methods[TOLD_RANK] = pooled(fits, told)
    return _judged(tasks, fits, methods)


def tian_cell(design: str, share: float, seed: int) -> dict[str, Rows]:
    """Run one draw of a design of Tian, Gu, Feng: largest error of an inlier task, by method."""
    draw = derive(seed, "regression", design, str(share))
    tasks = clients.tian_gu_feng(**TIAN[design], share=share, generator=draw)
    fits = least_squares(tasks.X, tasks.Y)
    return _judged(tasks, fits, peers(tasks, fits))


def peers(tasks: Tasks, fits: Fits) -> dict[str, Tensor]:
    """Compute coefficients (K, p, 1) by methods that are told the rank, but not which clients are benign.

    ``spectral`` is also told the contaminated fraction. For PCA and block FMS, every client is refitted to its own data
    within the estimated subspace.
    """
    X, share = fits.estimates, float((~tasks.benign).double().mean())
    centres = {"PCA": (pca(X, tasks.rank), X.mean(dim=0)), "block FMS": (block_fms(X, tasks.rank), geometric_median(X))}
    methods = {name: within(fits, U, project_out(U, centre)) for name, (U, centre) in centres.items()}
    return {SINGLE: X, **methods, "spectral": spectral(fits, tasks.samples, tasks.rank, share)}


def pooled(fits: Fits, result: ClairResult) -> Tensor:
    """Return the coefficients of ``pool``, started from CLAIR's benign set and rank."""
    return pool(fits, result.benign, result.rank).coefficients


def oracle_frame(tasks: Tasks, fits: Fits) -> Frame:
    """Fit the frame to the benign clients at the true rank."""
    return fit_frame(fits.estimates, fits.weights / fits.weights.mean(), tasks.benign, tasks.rank)


def pooled_from(fits: Fits, frame: Frame) -> Tensor:
    """Return the coefficients of ``pool``, started from a frame's members and rank."""
    return pool(fits, frame.members, frame.rank).coefficients


def _judged(tasks: Tasks, fits: Fits, methods: dict[str, Tensor]) -> dict[str, Rows]:
    """Return a draw's rows: an inlier's largest l2 error by method, CLAIR and its oracles included; and the verdict."""
    result = CLAIR().fit(fits.estimates, weights=fits.weights, expected_sq_error=fits.errors)
    frame = oracle_frame(tasks, fits)
    methods = methods | {CLAIR_ALONE: result.refined, POOLED: pooled(fits, result)}
    methods |= {ORACLE: refined_core(fits.estimates, frame), ORACLE_POOLED: pooled_from(fits, frame)}
    errors = {name: torch.linalg.matrix_norm(B - tasks.targets)[tasks.benign] for name, B in methods.items()}
    rows = [{"method": name, "error": float(error.max())} for name, error in errors.items()]
    return {"errors": rows, "verdicts": [_verdict(result, tasks.benign)]}


def _verdict(result: ClairResult, benign: Tensor) -> dict[str, Any]:
    (module,) = result.modules.values()
    return wrong_sides(result, benign) | {"rank": module.rank, "refined": module.is_refined,
            "shared_structure": module.shared_structure}


def descent(tasks: Tasks) -> Tensor:
    """Compute single-task fits as published: 500 gradient steps from zero, features scaled by root mean square."""
    X, Y = torch.stack(tasks.X), torch.stack(tasks.Y)
    X = X / X.square().mean(dim=(0, 1)).sqrt()
    gram, moments = X.mT @ X / X.shape[1], X.mT @ Y / X.shape[1]
    B = torch.zeros_like(moments)
    for _ in range(DESCENT):
        B = B - STEP * (gram @ B - moments)
    return B


def responses_cell(q: int, spread: float, correlation: float, share: float, seed: int) -> dict[str, Rows]:
    """Run one draw with q responses: benign mean squared errors, and Statement 4 for an oracle told P and S.

    ``exact`` is the formula with the estimators' actual covariance. ``isotropic`` is the formula with sigma^2 / (n_k -
    p - 1), the mean for white features, in place of sigma^2 (X_k'X_k)^-1.
    """
    draw, noise = derive(seed, "regression", q, str(spread), str(correlation), str(share)), 0.5
    tasks = clients.responses(q, spread, correlation, share, noise=noise, generator=draw)
    fits, benign, p = least_squares(tasks.X, tasks.Y), tasks.benign, tasks.targets.shape[1]
    frame, known, basis = oracle_frame(tasks, fits), tasks.samples.double() - p - 1, true_basis(tasks)
    mean = fit_frame(fits.estimates, known, benign, tasks.rank).mean
    told_P = fits.estimates - project_out(basis, fits.estimates - mean)
    result = CLAIR().fit(fits.estimates, weights=fits.weights, expected_sq_error=fits.errors)
    methods = {SINGLE: fits.estimates, "told S and P": told_P, ORACLE: refined_core(fits.estimates, frame)}
    methods |= {CLAIR_ALONE: result.refined, POOLED: pooled(fits, result), ORACLE_POOLED: pooled_from(fits, frame)}
    errors = {name: (B - tasks.targets)[benign].square().sum(dim=(1, 2)) for name, B in methods.items()}
    row: dict[str, Any] = {name: float(error.mean()) for name, error in errors.items()}
    variances = torch.full((int(benign.sum()),), noise**2, dtype=torch.float64)
    exact = oracle_terms(torch.stack([x.T @ x for x in tasks.X])[benign], variances, basis, known[benign], q)
    size: dict[str, Any] = {"noise": noise, "p": p, "q": q, "r": tasks.rank, "weights": known[benign].tolist()}
    row |= {"exact": exact.total, "isotropic": weighted_oracle_terms(**size).total}
    return {"responses": [row | {"found": _verdict(result, benign)["exact"]}]}


def true_basis(tasks: Tasks) -> Tensor:
    """Return a basis (p, r) of the benign targets' differences."""
    own = tasks.targets[tasks.benign]
    wide = (own - own.mean(dim=0)).permute(1, 0, 2).flatten(1)
    return torch.linalg.svd(wide, full_matrices=False).U[:, : tasks.rank]


def real_cell(data: str, kind: str, share: float, seed: int) -> dict[str, Rows]:
    """Run one split of a real data set: the benign clients' mean squared held-out error by method, and the verdict."""
    split = clients.DATA_SETS[data](kind, share, seed)
    fits, bad = least_squares(split.X, split.Y), int((~split.benign).sum())
    X, result = fits.estimates, CLAIR().fit(fits.estimates, weights=fits.weights, expected_sq_error=fits.errors)
    told = fit_frame(X, fits.weights / fits.weights.mean(), split.benign)
    methods = {SINGLE: X} | {rule: torch.stack(aggregate(rule, X, contaminated=bad)) for rule in RULES}
    methods |= {ALL_DATA: one_regression(fits, torch.ones_like(split.benign)), CLAIR_ALONE: result.refined}
    methods |= {POOLED: pooled(fits, result), "CLAIR, told S, pooled": pooled_from(fits, told)}
    methods[ALL_BENIGN_DATA] = one_regression(fits, split.benign)
    rows = [{"method": name, "error": held_out_error(split, B)} for name, B in methods.items()]
    return {"errors": rows, "verdicts": [_verdict(result, split.benign)]}


def one_regression(fits: Fits, members: Tensor) -> Tensor:
    """Fit one regression to all members' data, and return it for every client (K, p, q)."""
    return torch.linalg.solve(fits.gram[members].sum(dim=0), fits.moments[members].sum(dim=0)).expand_as(fits.estimates)


def held_out_error(split: Split, coefficients: Tensor) -> float:
    """Return the mean squared error of a held-out response, averaged over the benign clients."""
    pairs = zip(split.held_X, split.held_Y, coefficients, strict=True)
    errors = torch.stack([(Y - X @ B).square().mean() for X, Y, B in pairs])
    return float(errors[split.benign].mean())


def study(
    part: str,
    points: Iterable[Mapping[str, Any]],
    seeds: int,
    *,
    seed: int = 0,
    cache: Path | None = None,
    jobs: int = 1,
) -> dict[str, pd.DataFrame]:
    """Run one part, a key of ``CELLS``, at points over seeds, and return its tables.

    Part "armul" takes the published seeds in order.
    """
    name = "run" if part == "armul" else "seed"
    first = 0 if part == "armul" else seed
    cells = [{**point, name: s} for point in points for s in range(first, first + seeds)]
    return sweep(CELLS[part], cells, cache=cache, jobs=jobs)


CELLS: dict[str, Cell] = {
    "armul": armul_cell,
    "tian": tian_cell,
    "responses": responses_cell,
    "real": real_cell,
}


def summarise(errors: pd.DataFrame, by: list[str], against: str) -> pd.DataFrame:
    """Summarise each cell and method: mean error with its interval, and the ratio to another method's error.

    ``log_ratio``, with its interval and standard error: mean log of the error over that of ``against``, draw by draw.
    """
    draw = "run" if "run" in errors else "seed"
    rows = []
    for cell, group in errors.groupby(by, sort=False):
        wide = group.pivot(index=draw, columns="method", values="error")
        for method in dict.fromkeys(group.method):
            mean, low, high = mean_interval(wide[method])
            row = {**dict(zip(by, cell, strict=True)), "method": method, "error": mean, "low": low, "high": high}
            logs = np.log(wide[method] / wide[against])
            ratio, least, most = mean_interval(logs)
            row |= {"log_ratio": ratio, "ratio_low": least, "ratio_high": most}
            rows.append({**row, "ratio_error": logs.std() / len(logs) ** 0.5})
    return pd.DataFrame(rows)


def over_oracle(errors: pd.DataFrame, by: list[str], method: str = POOLED) -> pd.DataFrame:
    """Average a method's error over the oracle's, draw by draw, with its interval; one row per cell."""
    draw, rows = "run" if "run" in errors else "seed", []
    for cell, group in errors.groupby(by, sort=False):
        wide = group.pivot(index=draw, columns="method", values="error")
        ratio, low, high = mean_interval(wide[method] / wide[ORACLE_POOLED])
        rows.append({**dict(zip(by, cell, strict=True)), "method": method, "ratio": ratio, "low": low, "high": high})
    return pd.DataFrame(rows)


def published() -> pd.DataFrame:
    """Return ``PUBLISHED`` as a table."""
    return pd.DataFrame(PUBLISHED)


def beside_published(summary: pd.DataFrame) -> pd.DataFrame:
    """Join the published means with this project's means, for the cells that have both."""
    ours = summary.pivot(index=["share", "off"], columns="method", values="error")
    methods = [AS_PUBLISHED, SINGLE, CLAIR_ALONE, POOLED, ORACLE_POOLED]
    quoted = published().set_index(["share", "off"]).add_suffix(" (published)")
    return quoted.join(ours[methods], how="inner").reset_index()


def above_published(summary: pd.DataFrame) -> pd.DataFrame:
    """Subtract ARMUL's published mean from this project's means, by row and method, with the latter's interval."""
    rows = summary.merge(published()[["share", "off", "ARMUL"]], on=["share", "off"])
    named = {"error": "excess", "low": "excess_low", "high": "excess_high"}
    excess = rows[list(named)].sub(rows.ARMUL, axis=0).rename(columns=named)
    return rows[["share", "off", "method"]].join(excess)


def half_and_more(armul: pd.DataFrame, tian: pd.DataFrame) -> pd.DataFrame:
    """Compute ``over_oracle`` where half or more of the tasks are contaminated.

    At 70 % of the 30 tasks of the ARMUL design, CLAIR told the rank is included.
    """
    by = ["share", "off"]
    many, most = armul[armul.share >= 0.5], armul[armul.share == 0.7]
    parts = [over_oracle(most, by, TOLD_RANK), over_oracle(many, by)]
    if bool((tian.share >= 0.5).any()):
        parts.append(over_oracle(tian[tian.share >= 0.5], ["design", "share"]))
    table = pd.concat(parts, ignore_index=True)
    table["design"] = table["design"].fillna("armul") if "design" in table else "armul"
    return table


def rates(verdicts: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Average the verdicts by cell."""
    return verdicts.groupby(by, sort=False)[VERDICT].mean().reset_index()


def summarise_responses(table: pd.DataFrame) -> pd.DataFrame:
    """Summarise each cell: mean errors, and z of the error told S and P against the exact and the isotropic formula."""
    rows = []
    for cell, group in table.groupby(CELL, sort=False):
        row: dict[str, Any] = {**dict(zip(CELL, cell, strict=True)), "draws": len(group)}
        for formula in ("exact", "isotropic"):
            off = group["told S and P"] - group[formula]
            row[f"z_{formula}"] = off.mean() / (off.std() / len(off) ** 0.5)
        row |= {name: group[name].mean() for name in (SINGLE, "told S and P", "exact", "isotropic", *AFTER, "found")}
        rows.append(row)
    return pd.DataFrame(rows)


def harmed(summary: pd.DataFrame, method: str = POOLED) -> pd.DataFrame:
    """Return the cells in which a method is worse than its comparison by more than one standard error."""
    rows = summary[summary.method == method]
    return rows[rows.log_ratio > rows.ratio_error]
