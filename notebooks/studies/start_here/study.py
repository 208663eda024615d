"""Recovery study of notebook 00: CLAIR on planted clients beside an oracle told the benign clients and the rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from clairlib import CLAIR
from clairlib.core.seeds import derive
from clairlib.linalg.subspace import sin_theta
from clairlib.recovery.frame import fit_frame
from clairlib.recovery.refinement import refined_core
from clairlib.reproduce.sweep import Rows, sweep
from clairlib.simulate import Planted, planted
from studies.common.intervals import mean_interval, rate_interval
from studies.common.verdicts import benign_error, wrong_sides

COLUMNS = 10  # q
SHARES = {
    "unstructured": (0.0, 0.2, 0.45, 0.6, 0.75),
    "dense": (0.0, 0.2, 0.45, 0.6, 0.75),
    "coalition": (0.2, 0.4, 0.45),
    "sign_flip": (0.2, 0.4, 0.45),
}


def recovery_cell(contamination: str, share: float, noise: float, seed: int) -> dict[str, Rows]:
    """Run CLAIR, told nothing, and the oracle on one draw of planted clients with the defaults of ``planted``.

    ``share`` is the fraction of contaminated clients. ``noise`` is the noise of one row of an update: an entry's
    standard deviation is noise / sqrt(q).
    """
    draw = derive(seed, "planted", contamination, str(share), str(noise))
    truth = planted(contamination, share=share, noise_std=noise / COLUMNS**0.5, q=COLUMNS, generator=draw)
    result = CLAIR().fit(truth.updates)
    oracle = fit_frame(truth.updates, torch.ones(len(truth.updates), dtype=torch.float64), truth.benign, truth.rank)
    row = wrong_sides(result, truth.benign) | {
        "exact_rank": result.rank == truth.rank,
        "sin_theta": sin_theta(result.basis, truth.basis),
        "oracle_sin_theta": sin_theta(oracle.basis, truth.basis),
        "local_error": benign_error(truth.updates, truth),
        "error": benign_error(result.refined, truth),
        "oracle_error": benign_error(refined_core(truth.updates, oracle), truth),
        "estimated_gain": result.gain,
    }
    return {"recovery": [row]}


def recovery_study(
    kinds: list[str], noises: list[float], seeds: int, *, seed: int = 0, cache: Path | None = None, jobs: int = 1
) -> pd.DataFrame:
    """Run ``recovery_cell`` over kinds, their contaminated fractions in ``SHARES``, noise levels and seeds."""
    cells = [
        {"contamination": kind, "share": share, "noise": noise, "seed": seed + s}
        for kind in kinds
        for share in SHARES[kind]
        for noise in noises
        for s in range(seeds)
    ]
    return sweep(recovery_cell, cells, cache=cache, jobs=jobs)["recovery"]


def summarise_recovery(draws: pd.DataFrame) -> pd.DataFrame:
    """Summarise each cell: rate of exact sets (Wilson interval) and of exact ranks, and median ratios to the oracle."""
    rows = []
    for (kind, share, noise), cell in draws.groupby(["contamination", "share", "noise"], sort=False):
        rate, low, high = rate_interval(int(cell.exact.sum()), len(cell))
        row: dict[str, Any] = {"contamination": kind, "share": share, "noise": noise, "draws": len(cell)}
        row |= {"exact": rate, "low": low, "high": high, "exact_rank": float(cell.exact_rank.mean())}
        row["exact_both"] = float((cell.exact & cell.exact_rank).mean())
        row["sin_theta_ratio"] = (cell.sin_theta / cell.oracle_sin_theta).median()
        row["error_ratio"] = (cell.error / cell.oracle_error).median()
        row["refined_over_local"] = (cell.error / cell.local_error).median()
        rows.append(row)
    return pd.DataFrame(rows)


def error_table(truth: Planted, refined: Tensor) -> pd.DataFrame:
    """Tabulate the benign clients' squared error by method for one draw, with t intervals over the clients."""
    everybody = truth.updates.mean(dim=0).expand_as(truth.updates)
    rows = []
    for method, updates in (("local", truth.updates), ("FedAvg", everybody), ("CLAIR", refined)):
        each = (updates - truth.targets)[truth.benign].square().sum(dim=(1, 2))
        mean, low, high = mean_interval(each.tolist())
        rows.append({"method": method, "error": mean, "low": low, "high": high})
    return pd.DataFrame(rows)
