"""Parameter grids to tidy tables: every cell a cached file, resumable, in parallel processes."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from statsmodels.stats.proportion import proportion_confint
from tqdm import tqdm

from clairlib import provenance
from clairlib.processes import workers

Rows = list[dict[str, Any]]
Cell = Callable[..., Mapping[str, Rows]]


def grid(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination of the values, in order: grid(seed=[0, 1], noise=[.1]) has two cells."""
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def sweep(
    cell: Cell,
    cells: Iterable[Mapping[str, Any]],
    *,
    shared: Mapping[str, Any] | None = None,
    cache: Path | str | None = None,
    jobs: int = 1,
) -> dict[str, pd.DataFrame]:
    """Run a cell function over parameter sets and join what it returns into one tidy table a name.

    Parameters
    ----------
    cell : function of keyword arguments -> {table name: rows}
        Defined in a module, so that worker processes find it; a function of its arguments alone.
    cells : parameter sets, JSON values only; their items become columns of every table.
    shared : further arguments of every cell that do not change what it computes, a folder to work in, say; no columns.
    cache : folder, optional
        A finished cell is kept there under a hash of its parameters, of clairlib's code and of the versions it runs on,
        and read back later. A cell that failed or was interrupted leaves nothing.
    jobs : int
        Worker processes; they are spawned, one thread each.
    """
    todo = [dict(c) for c in cells]
    folder = None if cache is None else Path(cache) / f"{cell.__module__.rsplit('.', 1)[-1]}.{cell.__name__}"
    if jobs > 1 and len(todo) > 1:
        with workers(min(jobs, len(todo))) as pool:
            results = pool.map(_run, *map(itertools.repeat, (cell, shared or {})), todo, itertools.repeat(folder))
            done = list(tqdm(results, total=len(todo), desc=cell.__name__, mininterval=1))
    else:
        done = [_run(cell, shared or {}, c, folder) for c in tqdm(todo, desc=cell.__name__, mininterval=1)]
    tables: dict[str, Rows] = {}
    for parameters, result in zip(todo, done, strict=True):
        for name, rows in result.items():
            tables.setdefault(name, []).extend({**parameters, **row} for row in rows)
    return {name: pd.DataFrame(rows) for name, rows in tables.items()}


def _run(
    cell: Cell, shared: Mapping[str, Any], parameters: dict[str, Any], folder: Path | None
) -> Mapping[str, Rows]:
    """One cell, from the cache if it is there; under its name in the cache only once it is whole."""
    torch.set_num_threads(1)
    if folder is None:
        return cell(**parameters, **shared)
    key = hashlib.sha256(json.dumps([parameters, library_digest()], sort_keys=True).encode()).hexdigest()[:24]
    path = folder / f"{key}.json"
    if path.exists():
        return json.loads(path.read_text())
    result = cell(**parameters, **shared)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{key}.{os.getpid()}.partial"
    partial.write_text(json.dumps(result))
    os.replace(partial, path)
    return json.loads(path.read_text())


def library_digest() -> str:
    """sha256 of clairlib's code and of the versions under it: what a cached result must have been made with."""
    digest = hashlib.sha256(json.dumps(provenance.versions(), sort_keys=True).encode())
    for path in sorted(Path(__file__).parent.iterdir()):
        if path.suffix in {".py", ".mplstyle"}:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def mean_interval(values: Iterable[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean and its t interval; NaN ends for a single value."""
    x = np.asarray(list(values), dtype=float)
    if len(x) < 2:
        return float(x.mean()), float("nan"), float("nan")
    half = stats.t.ppf(0.5 + level / 2, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


def rate_interval(successes: int, trials: int, level: float = 0.95) -> tuple[float, float, float]:
    """Share of successes and its Wilson interval."""
    low, high = proportion_confint(successes, trials, 1 - level, method="wilson")
    return successes / trials, float(low), float(high)
