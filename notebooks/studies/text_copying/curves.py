"""Text copying away from the main setting: curves along which one parameter varies and all others stay fixed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from clairlib import CLAIR
from clairlib.baselines import aggregate
from clairlib.linalg.low_rank import as_dense
from clairlib.reproduce.sweep import Rows, sweep
from studies.common.intervals import mean_interval
from studies.common.rules import TOLD_RANK
from studies.common.verdicts import detection_rows, verdict
from studies.text_copying.clients import Recipe, Updates, train_federation
from studies.text_copying.study import judge, oracle_methods

MAIN: dict[str, Any] = {"sequences": 32, "share": 0.4, "label_noise": 0.1, "rank": 8, "clients": 20}
AVERAGES = ("local", "FedAvg", "FedAvg, benign only")


def curve_cell(
    seed: int, sequences: int, share: float, label_noise: float, rank: int, clients: int, base_cache: str
) -> dict[str, Rows]:
    """Run one federation with adapters on the last output projection: accuracies, verdict and estimated gain.

    Adapters keep the scale alpha / rank = 2. ``CLAIR().fit`` takes them from memory, and truncates refined updates to
    their rank. ``removed``: squared error that refinement is estimated to remove from a benign client's update.
    """
    recipe = Recipe(rank=rank, alpha=2 * rank, sequences=sequences, label_noise=label_noise)
    contaminated = round(share * clients)
    run = train_federation(seed, recipe, clients=clients, contaminated=contaminated, cache=base_cache)
    result = CLAIR().fit(run.updates, names=run.names)
    methods: dict[str, Updates] = {
        name: as_dense(aggregate(name, run.updates, benign=run.federation.benign)) for name in AVERAGES
    }
    told = oracle_methods(run.base, run.federation, run.dense)
    methods |= {"CLAIR": as_dense(result.refined), TOLD_RANK: told[TOLD_RANK]}
    (module,) = result.modules.values()
    terms = module.gain_terms
    facts = {"rank_found": module.rank, "refined": module.is_refined, "gain": module.gain}
    facts["removed"] = terms.local * module.gain
    facts |= verdict(pd.DataFrame(detection_rows(result, run.federation.benign)))
    return {"accuracy": judge(run.base, run.federation, methods, seed=seed), "run": [facts]}


def curve_study(
    curves: Mapping[str, Sequence[float]], seeds: int, *, seed: int = 0, cache: Path, jobs: int = 1
) -> dict[str, pd.DataFrame]:
    """Run ``curve_cell`` along each curve: name in MAIN -> values, in addition to the main setting's value.

    The tables accuracy and run have columns ``curve`` and ``value`` in place of the parameters. A cell on several
    curves is computed once.
    """
    points = {(name, v): {**MAIN, name: v} for name, values in curves.items() for v in sorted({*values, MAIN[name]})}
    cells = [{"seed": seed + s, **point} for point in _different(points.values()) for s in range(seeds)]
    tables = sweep(curve_cell, cells, shared={"base_cache": str(cache)}, cache=cache, jobs=jobs)
    return {name: _by_curve(table, points) for name, table in tables.items()}


def _different(points: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [dict(items) for items in dict.fromkeys(tuple(point.items()) for point in points)]


def _by_curve(table: pd.DataFrame, points: Mapping[tuple[str, float], dict[str, Any]]) -> pd.DataFrame:
    """Repeat the rows of every point of every curve, with the parameters replaced by curve and value."""
    parts = []
    for (name, value), point in points.items():
        rows = table[(table[list(point)] == pd.Series(point)).all(axis=1)].drop(columns=list(point))
        parts.append(rows.assign(curve=name, value=value))
    return pd.concat(parts, ignore_index=True)


def summarise_curves(accuracy: pd.DataFrame) -> pd.DataFrame:
    """Average benign accuracy over seeds by curve, value and method, with its 95 % t interval."""
    rows = []
    for (curve, value, method), table in accuracy.groupby(["curve", "value", "method"], sort=False):
        mean, low, high = mean_interval(table.groupby("seed").accuracy.mean())
        row = {"curve": curve, "value": value, "method": method, "accuracy": mean, "low": low, "high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def summarise_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """Average runs over seeds by curve and value: exact sets, clients on the wrong side, AUC, rank, estimated gain."""
    by = runs.groupby(["curve", "value"], sort=False)
    means = by[["exact", "wrong", "auc", "rank_found", "gain", "removed"]].mean()
    return means.assign(refined=by.refined.mean()).reset_index()


def gains(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Average the gain over local along each curve, over seeds, with its 95 % t interval.

    ``gain`` names the quantity. For CLAIR and for refinement told S and r it is accuracy less that of local, paired by
    seed. For ``removed`` it is the squared error that CLAIR estimates to remove.
    """
    rows = []
    for (curve, value), table in tables["accuracy"].groupby(["curve", "value"], sort=False):
        means = table.groupby(["seed", "method"]).accuracy.mean().unstack("method")
        run = tables["run"][(tables["run"].curve == curve) & (tables["run"].value == value)]
        seen = {name: means[name] - means["local"] for name in ("CLAIR", TOLD_RANK)} | {"removed": run.removed}
        for name, values in seen.items():
            mean, low, high = mean_interval(values)
            rows.append({"curve": curve, "value": value, "gain": name, "mean": mean, "low": low, "high": high})
    return pd.DataFrame(rows)


def exponent(gain: pd.DataFrame, curve: str, name: str) -> float:
    """Fit the slope of log gain on log value along a curve, by least squares on the means, all positive."""
    rows = gain[(gain.curve == curve) & (gain.gain == name)]
    return float(np.polyfit(np.log(rows.value), np.log(rows["mean"]), 1)[0])
