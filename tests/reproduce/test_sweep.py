"""Sweeps: tidy tables, cells kept whole, never served for other parameters or other code."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pandas as pd
import psutil
import pytest

from clairlib.reproduce.sweep import grid, sweep
from helpers.processes import HANG_SECONDS, Signals

RUNS: list[dict] = []


def cell(seed: int, size: int):
    RUNS.append({"seed": seed, "size": size})
    if seed == 99:
        raise RuntimeError("broken cell")
    return {"rows": [{"value": seed * 10 + i} for i in range(size)], "facts": [{"mean": seed}]}


@pytest.fixture(autouse=True)
def forget():
    RUNS.clear()


def test_grid_has_every_combination_in_order():
    assert grid(a=[1, 2], b=["x"]) == [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}]


def test_tables_are_tidy_and_a_finished_cell_is_not_run_again(tmp_path):
    first = sweep(cell, grid(seed=[1, 2], size=[2]), cache=tmp_path)
    assert first["rows"].to_dict("list") == {"seed": [1, 1, 2, 2], "size": [2] * 4, "value": [10, 11, 20, 21]}
    assert list(first["facts"]["mean"]) == [1, 2]
    again = sweep(cell, grid(seed=[1, 2, 3], size=[2]), cache=tmp_path)
    assert RUNS == [{"seed": 1, "size": 2}, {"seed": 2, "size": 2}, {"seed": 3, "size": 2}]
    pd.testing.assert_frame_equal(first["rows"], again["rows"][again["rows"].seed < 3])


def test_other_parameters_run_again(tmp_path):
    sweep(cell, grid(seed=[1], size=[2]), cache=tmp_path)
    sweep(cell, grid(seed=[1], size=[3]), cache=tmp_path)
    assert len(RUNS) == 2


MODULE = """
from solver import solve
RUNS = []
def cell(seed):
    RUNS.append(seed)
    return {"rows": [{"x": solve()}]}
"""


def test_a_change_of_a_solver_runs_its_cells_again_and_a_change_of_a_plot_does_not(tmp_path, monkeypatch):
    for name, text in {"cells": MODULE, "solver": "def solve():\n    return 1\n", "drawn": "import cells\n"}.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    cells = importlib.import_module("cells")
    for name, addition, runs in (("drawn", "", 1), ("drawn", "colour = 1\n", 1), ("solver", "other = 1\n", 2)):
        with (tmp_path / f"{name}.py").open("a") as file:
            file.write(addition)
        sweep(cells.cell, [{"seed": 1}], cache=tmp_path / "cache")
        assert len(cells.RUNS) == runs, (name, addition)
    for name in ("cells", "solver"):
        del sys.modules[name]


def test_a_failed_cell_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError, match="broken cell"):
        sweep(cell, grid(seed=[1, 99], size=[1]), cache=tmp_path)
    files = [p.name for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 1 and not files[0].startswith(".")
    assert json.loads(next(tmp_path.rglob("*.json")).read_text())["rows"] == [{"value": 10}]


def test_worker_processes_give_the_same_tables(tmp_path):
    from studies.start_here.study import recovery_cell

    cells = grid(contamination=["coalition"], share=[0.4], noise=[0.1], seed=[0, 1])
    alone, together = sweep(recovery_cell, cells), sweep(recovery_cell, cells, jobs=2, cache=tmp_path)
    pd.testing.assert_frame_equal(alone["recovery"], together["recovery"])


PAUSE = """
import os, signal
def cell(pipe):
    with open(pipe, "w") as file:
        print(os.getpid(), file=file)
    signal.pause()
"""


def test_workers_end_with_the_process_that_started_them(tmp_path):
    """Killed without a chance to clean up, a sweep leaves no process that computes on."""
    (tmp_path / "pause.py").write_text(PAUSE)
    begun = Signals(tmp_path / "begun")
    cells = [{"pipe": str(begun.path)}] * 2
    imports = "import pause\nfrom clairlib.reproduce.sweep import sweep"
    code = f"{imports}\nif __name__ == '__main__': sweep(pause.cell, {cells}, jobs=2)"
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, cwd=tmp_path)
    try:
        workers = [psutil.Process(int(begun.next(parent))) for _ in range(2)]
    finally:
        parent.kill()
        parent.communicate()
    _, alive = psutil.wait_procs(workers, HANG_SECONDS)
    assert not alive
