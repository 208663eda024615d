"""Tables that compare methods: the benign clients' results, the best method, and whether CLAIR makes them worse.

Functions here take tables of draws and return one row per cell. A table of draws has the columns ``draw``, ``method``,
``value`` (mean over the benign clients; higher is better) and ``worst`` (value of the worst benign client), and the
columns that identify its cell.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from studies.common.intervals import mean_interval
from studies.common.rules import TOLD_RANK

REFERENCES = ["base", TOLD_RANK]  # shown, but never marked as the best


def draws(accuracy: pd.DataFrame, cell: list[str], over: str = "seed", value: str = "accuracy") -> pd.DataFrame:
    """Make a table of draws from one row per client, method and seed.

    A draw's value is the benign clients' mean of ``value`` in one seed. ``cell`` lists the columns that identify a
    cell. With ``over="client"`` each client of each seed is a draw of its own; use this where there is a single seed.
    """
    unit = {"seed": ["seed"], "client": ["seed", "client"]}[over]
    each = accuracy.groupby([*cell, *unit, "method"], sort=False)[value]
    table = each.agg(value="mean", worst="min").reset_index()
    return table.assign(draw=table[unit].astype(str).agg(" ".join, axis=1))


def stress_table(draws: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Summarise each cell and method: mean over draws, 95 % t interval, gain over local, and CLAIR's lead.

    ``lead`` is CLAIR's mean value less the method's, paired over draws. ``best`` is true for the method with the
    highest mean, and for every method whose deficit to it has a paired 95 % interval that reaches zero. Aggregation
    rules of the registry that are told the benign set compete for ``best``; ``REFERENCES`` do not.
    """
    rows = []
    for key, cell in draws.groupby(by, sort=False):
        wide = cell.pivot(index="draw", columns="method", values="value")[list(dict.fromkeys(cell.method))]
        top = wide.drop(columns=REFERENCES, errors="ignore").mean().idxmax()
        for method in wide:
            mean, low, high = mean_interval(wide[method])
            lead, lead_low, lead_high = mean_interval(wide["CLAIR"] - wide[method])
            row = dict(zip(by, key, strict=True)) | {"method": method, "value": mean, "low": low, "high": high}
            row |= {"gain": float((wide[method] - wide["local"]).mean())}
            row |= {"lead": lead, "lead_low": lead_low, "lead_high": lead_high}
            behind = mean_interval(wide[top] - wide[method])[1]
            row["best"] = method not in REFERENCES and (method == top or bool(behind <= 0))
            rows.append(row)
    return pd.DataFrame(rows)


def as_relative_error(stress: pd.DataFrame) -> pd.DataFrame:
    """Convert the stress table of planted clients: values become error over local error (geometric mean over draws)."""
    return stress.assign(value=np.exp(-stress.value), low=np.exp(-stress.high), high=np.exp(-stress.low))


def outcomes(draws: pd.DataFrame, verdicts: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Summarise each cell: CLAIR's gain over local, whether benign clients are worse off, and the detection results.

    ``not_worse``: the mean gain over local is at least minus one standard error (paired over draws). ``worst`` and
    ``worst_local``: the worst client of all draws under CLAIR and under local. The other columns are means over runs:
    rate of exact sets, precision (over runs with at least one flagged client), recall, fraction of benign clients that
    are flagged, fraction of runs in which CLAIR refined, AUC.
    """
    rows = []
    for key, cell in draws.groupby(by, sort=False):
        wide = cell.pivot(index="draw", columns="method", values=["value", "worst"])
        gain = wide["value", "CLAIR"] - wide["value", "local"]
        mean, low, high = mean_interval(gain)
        row = dict(zip(by, key, strict=True)) | {"gain": mean, "low": low, "high": high}
        row |= {"standard_error": float(gain.sem()), "not_worse": bool(mean >= -gain.sem())}
        row |= {"worst": wide["worst", "CLAIR"].min(), "worst_local": wide["worst", "local"].min()}
        rows.append(row)
    scores = [name for name in verdicts if name.startswith("auc")]
    columns = ["exact", "precision", "recall", "benign_flagged", "refined", *scores]
    means = verdicts.astype({"exact": float, "refined": float}).groupby(by, sort=False)[columns].mean()
    return pd.DataFrame(rows).merge(means.reset_index(), on=by)


def nearest(stress: pd.DataFrame, by: list[str], rules: list[str]) -> pd.DataFrame:
    """Return, for every cell, the rule over which CLAIR leads least, and that lead with its paired 95 % interval."""
    chosen = stress[stress.method.isin(rules)]
    rows = chosen.loc[chosen.groupby(by, sort=False).lead.idxmin()]
    return rows[[*by, "method", "lead", "lead_low", "lead_high"]].reset_index(drop=True)


def change_of_clients(accuracy: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Compare each benign client's accuracy under CLAIR with that under its own update.

    ``worst``: the smallest change. ``lose_a_point``: fraction of clients that lose more than one percentage point.
    """
    wide = accuracy.pivot(index=[*by, "seed", "client"], columns="method", values="accuracy")
    change = (wide["CLAIR"] - wide["local"]).groupby(by, sort=False)
    return change.agg(worst="min", lose_a_point=lambda x: (x < -0.01).mean()).reset_index()


def harmed(*outcomes: pd.DataFrame) -> pd.DataFrame:
    """Return the cells in which the benign clients are worse off by more than one standard error."""
    return pd.concat([table[~table.not_worse] for table in outcomes], ignore_index=True)


def share_swapped(verdicts: pd.DataFrame) -> float:
    """Return the fraction of runs in which CLAIR flags exactly the benign clients."""
    return float(((verdicts.benign_flagged == 1) & (verdicts.recall == 0)).mean())


def success_rates(backdoor: pd.DataFrame) -> pd.DataFrame:
    """Summarise the backdoor success rate of every method: mean over seeds with its 95 % t interval.

    ``added`` is the mean difference to local's success rate.
    """
    means = backdoor.groupby(["seed", "method"]).success.mean().unstack("method")
    rows = []
    for method in dict.fromkeys(backdoor.method):
        mean, low, high = mean_interval(means[method])
        row = {"method": method, "success": mean, "low": low, "high": high}
        rows.append(row | {"added": float((means[method] - means["local"]).mean())})
    return pd.DataFrame(rows)
