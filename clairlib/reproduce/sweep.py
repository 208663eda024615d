"""Parameter grids to tidy tables: every cell a cached file, resumable, in parallel processes."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from clairlib.core import provenance
from clairlib.core.code import module_digest
from clairlib.core.files import write_atomically
from clairlib.core.processes import workers

Rows = list[dict[str, Any]]
Cell = Callable[..., Mapping[str, Rows]]


def grid(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """Return every combination of the values, in order: grid(seed=[0, 1], noise=[.1]) has two cells."""
    return [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]


def sweep(
    cell: Cell,
    cells: Iterable[Mapping[str, Any]],
    *,
    shared: Mapping[str, Any] | None = None,
    cache: Path | str | None = None,
    jobs: int = 1,
) -> dict[str, pd.DataFrame]:
    """Run a cell function over parameter sets, and join its rows into one tidy table per name.

    Parameters
    ----------
    cell : function of keyword arguments -> {table name: rows}
        Defined in a module, so that worker processes find it; a function of its arguments alone.
    cells, shared : parameter sets of JSON values, which become columns; further arguments of every cell, which do not
        The shared ones must not change what a cell computes: a folder to work in, say.
    cache : folder, optional
        A finished cell is kept there under a hash of its parameters, its module with all of this project that it
        imports, and the versions under it. So a change of a plot runs no cell again, and a change of a solver all that
        depend on it. A cell that failed or was interrupted leaves nothing.
    jobs : int
        Number of worker processes; they are spawned, one thread each.
    """
    todo = [dict(c) for c in cells]
    kept = None
    if cache is not None:  # a cached result must be made with the cell's code, all it imports, and these versions
        made_with = [module_digest(cell.__module__, Path(inspect.getfile(cell))), provenance.versions()]
        kept = Path(cache) / f"{cell.__module__}.{cell.__name__}", _digest(made_with)
    bar: dict[str, Any] = {"desc": cell.__name__, "mininterval": 1, "file": sys.stdout}  # stderr shows red in notebooks
    if jobs > 1 and len(todo) > 1:
        with workers(min(jobs, len(todo))) as pool:
            results = pool.map(_run, *map(itertools.repeat, (cell, shared or {})), todo, itertools.repeat(kept))
            done = list(tqdm(results, total=len(todo), **bar))
    else:
        done = [_run(cell, shared or {}, c, kept) for c in tqdm(todo, **bar)]
    tables: dict[str, Rows] = {}
    for parameters, result in zip(todo, done, strict=True):
        for name, rows in result.items():
            tables.setdefault(name, []).extend({**parameters, **row} for row in rows)
    return {name: pd.DataFrame(rows) for name, rows in tables.items()}


def _run(
    cell: Cell, shared: Mapping[str, Any], parameters: dict[str, Any], kept: tuple[Path, str] | None
) -> Mapping[str, Rows]:
    """Run one cell, or read it from the cache; it is there under its name only when it is whole."""
    torch.set_num_threads(1)
    if kept is None:
        return cell(**parameters, **shared)
    folder, code = kept
    path = folder / f"{_digest([parameters, code])[:24]}.json"
    if path.exists():
        return json.loads(path.read_text())
    result = cell(**parameters, **shared)
    folder.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as partial:
        partial.write_text(json.dumps(result))
    return json.loads(path.read_text())


def _digest(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
