"""Tables of the text-copying study: means with intervals over seeds, paired differences, verdicts."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from studies.common.intervals import mean_interval
from studies.common.verdicts import verdict

CELL = ["setting", "label_noise"]
ABLATION = "entrywise RPCA, personal"  # this project's own, unlike the other competitors


def summarise_accuracy(accuracy: pd.DataFrame) -> pd.DataFrame:
    """Benign accuracy by setting, label noise and method: mean over seeds, 95 % t interval, worst client, its parts.

    ``worst_client``: mean over seeds of the worst one. ``on_symbols``, ``off_symbols``: on the dialects' symbols and
    elsewhere; ``free_running``: copying from own output.
    """
    rows = []
    for (setting, level, method), table in accuracy.groupby([*CELL, "method"], sort=False):
        each = table.groupby("seed").accuracy
        mean, low, high = mean_interval(each.mean())
        row = {"setting": setting, "label_noise": level, "method": method, "accuracy": mean, "low": low, "high": high}
        row["worst_client"] = float(each.min().mean())
        for part in ("on_symbols", "off_symbols", "free_running"):
            row[part] = float(table[part].mean())
        rows.append(row)
    return pd.DataFrame(rows)


def paired_differences(accuracy: pd.DataFrame, over: str = "seed", method: str = "CLAIR") -> pd.DataFrame:
    """Method minus each other method: paired 95 % t interval over seeds (benign mean of each), or over clients.

    ``over="client"`` takes each client of each seed for a draw of its own, which is all a single seed allows.
    """
    unit = {"seed": ["seed"], "client": ["seed", "client"]}[over]
    rows = []
    for (setting, level), cell in accuracy.groupby(CELL, sort=False):
        means = cell.groupby([*unit, "method"], sort=False).accuracy.mean().unstack("method")
        for other in means:
            if other != method:
                mean, low, high = mean_interval(means[method] - means[other])
                row = {"setting": setting, "label_noise": level, "against": other, "difference": mean}
                rows.append(row | {"low": low, "high": high})
    return pd.DataFrame(rows)


def against(differences: pd.DataFrame, method: str, setting: str, label_noise: float) -> tuple[float, float, float]:
    """CLAIR minus one method in one cell: difference, and the ends of its interval."""
    here = (differences.setting == setting) & (differences.label_noise == label_noise)
    row = differences[here & (differences.against == method)].iloc[0]
    return float(row.difference), float(row.low), float(row.high)


def closest(
    differences: pd.DataFrame, setting: str, label_noise: float, leave_out: Sequence[str] = ()
) -> tuple[str, float, float, float]:
    """The competitor over which CLAIR's lead is least certain: its name, the difference, the ends of its interval.

    Other forms of CLAIR are no competitors.
    """
    here = (differences.setting == setting) & (differences.label_noise == label_noise)
    competes = ~differences.against.isin(leave_out) & ~differences.against.str.startswith("CLAIR")
    rows = differences[here & competes]
    name = str(rows.loc[rows.low.idxmin()].against)
    return name, *against(differences, name, setting, label_noise)


def summarise_detection(detection: pd.DataFrame) -> pd.DataFrame:
    """The verdict on the contaminated clients by setting, label noise and seed.

    ``wrong``: clients on the wrong side; ``auc``: chance that a contaminated client scores above a benign one;
    ``precision`` NaN where nobody is flagged.
    """
    rows = []
    for (setting, level, seed), table in detection.groupby([*CELL, "seed"], sort=False):
        row = {"setting": setting, "label_noise": level, "seed": seed}
        rows.append(row | verdict(table))
    return pd.DataFrame(rows)


def detection_table(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Verdicts over seeds: share of exact sets, clients on the wrong side, mean precision, recall and AUC."""
    by = verdicts.groupby(CELL, sort=False)
    means = by[["precision", "recall", "auc", "exact"]].mean()
    return means.assign(wrong_median=by.wrong.median(), wrong_most=by.wrong.max()).reset_index()


def leverage_picks_symbols(leverage: pd.DataFrame) -> pd.DataFrame:
    """For every run: are the tokens of highest leverage, as many as there are symbols, exactly the symbols?"""
    rows = []
    for (setting, level, seed), table in leverage.groupby([*CELL, "seed"], sort=False):
        top = table.nlargest(int(table.symbol.sum()), "leverage")
        rows.append({"setting": setting, "label_noise": level, "seed": seed, "picked": bool(top.symbol.all())})
    return pd.DataFrame(rows)
