"""Tables of the text-copying study: means with intervals over seeds, paired differences, and verdicts."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from studies.common.intervals import mean_interval
from studies.common.verdicts import verdict

CELL = ["setting", "label_noise"]
ABLATION = "entrywise RPCA, personal"  # this project's own ablation, not a published competitor


def summarise_accuracy(accuracy: pd.DataFrame) -> pd.DataFrame:
    """Summarise benign accuracy by setting, label noise and method: mean over seeds and 95 % t interval.

    ``worst_client``: mean over seeds of the worst client's accuracy. ``on_symbols`` and ``off_symbols``: accuracy on
    the dialects' symbols and on other tokens. ``free_running``: accuracy when the model copies from its own output.
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
    """Subtract each other method's accuracy from one method's: paired 95 % t interval over seeds or over clients.

    Over seeds, a seed's value is the mean over benign clients. With ``over="client"`` each client of each seed is a
    draw of its own; use this where there is a single seed.
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
    """Return CLAIR's accuracy minus one method's in one cell: the difference and the ends of its interval."""
    here = (differences.setting == setting) & (differences.label_noise == label_noise)
    row = differences[here & (differences.against == method)].iloc[0]
    return float(row.difference), float(row.low), float(row.high)


def closest(
    differences: pd.DataFrame, setting: str, label_noise: float, leave_out: Sequence[str] = ()
) -> tuple[str, float, float, float]:
    """Return the competitor over which CLAIR's lead is least certain: name, difference, ends of its interval.

    Other forms of CLAIR are not competitors.
    """
    here = (differences.setting == setting) & (differences.label_noise == label_noise)
    competes = ~differences.against.isin(leave_out) & ~differences.against.str.startswith("CLAIR")
    rows = differences[here & competes]
    name = str(rows.loc[rows.low.idxmin()].against)
    return name, *against(differences, name, setting, label_noise)


def summarise_detection(detection: pd.DataFrame) -> pd.DataFrame:
    """Measure the verdict on the contaminated clients by setting, label noise and seed.

    ``wrong``: number of clients on the wrong side. ``auc``: probability that a contaminated client scores above a
    benign one. ``precision`` is NaN where no client is flagged.
    """
    rows = []
    for (setting, level, seed), table in detection.groupby([*CELL, "seed"], sort=False):
        row = {"setting": setting, "label_noise": level, "seed": seed}
        rows.append(row | verdict(table))
    return pd.DataFrame(rows)


def detection_table(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Summarise verdicts over seeds: rate of exact sets, clients on the wrong side, mean precision, recall and AUC."""
    by = verdicts.groupby(CELL, sort=False)
    means = by[["precision", "recall", "auc", "exact"]].mean()
    return means.assign(wrong_median=by.wrong.median(), wrong_most=by.wrong.max()).reset_index()


def leverage_picks_symbols(leverage: pd.DataFrame) -> pd.DataFrame:
    """Check for every run whether the m tokens of highest leverage are exactly the m symbols."""
    rows = []
    for (setting, level, seed), table in leverage.groupby([*CELL, "seed"], sort=False):
        top = table.nlargest(int(table.symbol.sum()), "leverage")
        rows.append({"setting": setting, "label_noise": level, "seed": seed, "picked": bool(top.symbol.all())})
    return pd.DataFrame(rows)
