"""Sweeps: tidy tables, cells kept whole, never served for other parameters or other code."""

from __future__ import annotations

import json
import math
import sys
import time

import numpy as np
import pandas as pd
import psutil
import pytest
from scipy import stats

from clairlib.reproduce import sweep as experiments
from clairlib.reproduce.sweep import grid, sweep
from studies.common.intervals import mean_interval, rate_interval

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


def test_other_code_or_other_parameters_run_again(tmp_path, monkeypatch):
    sweep(cell, grid(seed=[1], size=[2]), cache=tmp_path)
    sweep(cell, grid(seed=[1], size=[3]), cache=tmp_path)
    monkeypatch.setattr(experiments, "library_digest", lambda: "other code")
    sweep(cell, grid(seed=[1], size=[2]), cache=tmp_path)
    assert len(RUNS) == 3


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


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.1)


def test_workers_end_with_the_process_that_started_them():
    """Killed without a chance to clean up, a sweep leaves no process that computes on."""
    code = "import signal; from clairlib.reproduce.sweep import sweep; sweep(signal.pause, [{}, {}], jobs=2)"
    parent = psutil.Popen([sys.executable, "-c", f"if __name__ == '__main__': {code}"])
    workers = []
    try:
        while len(workers) < 2:
            time.sleep(0.1)
            workers = [child for child in parent.children() if any("spawn_main" in word for word in child.cmdline())]
        wait_for(lambda: all(worker.cpu_times().user > 1 for worker in workers))  # libraries are loaded
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in workers))


def test_intervals_are_those_of_the_textbook():
    x = np.array([1.0, 2.0, 4.0])
    mean, low, high = mean_interval(x)
    expected = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((x.mean(), expected.low, expected.high))
    assert math.isnan(mean_interval([1.0])[1])
    wilson = stats.binomtest(47, 50).proportion_ci(method="wilson")
    assert rate_interval(47, 50) == pytest.approx((0.94, wilson.low, wilson.high))
