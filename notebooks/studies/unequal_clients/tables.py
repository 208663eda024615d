"""Tables of notebook 12: one row a cell, from one row a draw."""

from __future__ import annotations

from typing import Any

import pandas as pd

from studies.common.intervals import mean_interval, rate_interval

SETTING = ["design", "condition"]


def false_alarms(runs: pd.DataFrame, by: list[str] = SETTING) -> pd.DataFrame:
    """Summarise honest clients alone.

    Columns: share of draws in which anybody is flagged (Wilson interval), share of clients flagged, refined over local
    error, the largest such ratio of one client in any draw, and whether the cell is `claimed` (`honest_study`).
    """
    return _rows(runs, by, _of_honest)


def _of_honest(cell: pd.DataFrame) -> dict[str, Any]:
    rates = _rate(cell, "anybody") | {"honest_flagged": cell.honest_flagged.mean(), "ratio": cell.ratio.mean()}
    return rates | {"worst": cell.worst.max(), "claimed": bool(cell.claimed.all())}


def contamination(runs: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Summarise contaminated clients beside honest ones.

    Columns: share of draws with the exact set (Wilson interval), share of contaminated and of honest clients flagged,
    refined over local error of the honest.
    """
    means = ["recall", "honest_flagged", "ratio"]
    return _rows(runs, by, lambda cell: _rate(cell, "exact") | cell[means].mean().to_dict())


def recall(runs: pd.DataFrame) -> pd.DataFrame:
    """Summarise weak attackers: share found with its t interval over draws, and share of honest clients flagged."""
    return _rows(runs, ["kind", "energy", "method"], _of_weak)


def _of_weak(cell: pd.DataFrame) -> dict[str, Any]:
    value, low, high = mean_interval(cell.recall)
    honest = cell.honest_flagged.mean()
    return {"recall": value, "low": max(low, 0.0), "high": min(high, 1.0), "honest_flagged": honest}


def modules(runs: pd.DataFrame) -> pd.DataFrame:
    """Summarise attacks in single modules: shares of attackers found and shown, and of honest clients flagged."""
    means = ["recall", "shown", "honest_flagged", "ratio"]
    return _rows(runs, ["design", "placement", "times_noise"], lambda cell: cell[means].mean().to_dict())


def populations(runs: pd.DataFrame) -> pd.DataFrame:
    """Summarise two populations: draws in which both are reported as they are (Wilson interval), and both errors."""
    both = runs.assign(both=runs.exact & runs.reported)
    means = ["ratio", "other_ratio"]
    return _rows(both, ["condition"], lambda cell: _rate(cell, "both") | cell[means].mean().to_dict())


def seen(runs: pd.DataFrame) -> pd.DataFrame:
    """Summarise planted deviations: share found (Wilson interval) by multiple of the smallest that would be found."""
    by = ["condition", "factor"]
    return _rows(runs, by, lambda cell: _rate(cell, "found") | {"smallest": cell.smallest.median()})


def ablation(runs: pd.DataFrame) -> pd.DataFrame:
    """Summarise verdicts with a rule off, honest clients alone and beside contamination, as `contamination`.

    Without contamination a set is exact where nobody is flagged.
    """
    return contamination(runs, ["without", "kind", "condition"])


def _rows(runs: pd.DataFrame, by: list[str], of_cell: Any) -> pd.DataFrame:
    cells = runs.groupby(by, sort=False)
    return pd.DataFrame([dict(zip(by, key, strict=True)) | {"draws": len(c)} | of_cell(c) for key, c in cells])


def _rate(cell: pd.DataFrame, name: str) -> dict[str, float]:
    return dict(zip((name, "low", "high"), rate_interval(int(cell[name].sum()), len(cell)), strict=True))
