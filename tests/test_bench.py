"""The benchmark against cvxpy: same objective on both sides, one row an instance."""

import sys

import pytest
import torch

from clairlib import bench


def test_rows_reach_the_same_objective():
    pytest.importorskip("cvxpy")
    rows = bench.convex(instances=3, repeats=1, generator=torch.Generator().manual_seed(0))
    assert [row["p"] for row in rows] == [30, 20, 12] and [row["nu"] > 0 for row in rows] == [
        False,
        True,
        False,
    ]
    for row in rows:
        assert row["ours_error"] <= bench.SAME_OBJECTIVE and row["scs_error"] <= bench.SAME_OBJECTIVE
        assert row["speed"] == pytest.approx(row["cvxpy_seconds"] / row["ours_seconds"])
    assert bench.speed_ratio(rows) == sorted(row["speed"] for row in rows)[1]


def test_missing_cvxpy_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    with pytest.raises(ModuleNotFoundError, match=r"clairlib\[test\]"):
        bench.convex(instances=1, generator=torch.Generator())
