"""Tables of methods compared: what each gives the benign clients, which is best, and whether CLAIR ever does harm.

Draws in, one row a cell out. A table of draws has columns ``draw``, ``method``, ``value`` (higher is better) and
``worst`` (that of the worst client) beside the columns that name its cell.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from studies.common.intervals import mean_interval
from studies.common.rules import TOLD_RANK

REFERENCES = ["base", TOLD_RANK]  # shown, but not among those of which the best is in bold


def draws(accuracy: pd.DataFrame, cell: list[str], over: str = "seed", value: str = "accuracy") -> pd.DataFrame:
    """A table of draws from a row per client, method and seed: the benign clients' mean of ``value`` in a seed.

    ``cell`` are the columns that name a cell. ``over="client"`` takes each client of each seed for a draw of its own,
    which is all a single seed allows.
    """
    unit = {"seed": ["seed"], "client": ["seed", "client"]}[over]
    each = accuracy.groupby([*cell, *unit, "method"], sort=False)[value]
    table = each.agg(value="mean", worst="min").reset_index()
    return table.assign(draw=table[unit].astype(str).agg(" ".join, axis=1))


def stress_table(draws: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """A row per cell and method: mean over draws with its 95 % t interval, gain over local, CLAIR's lead over it.

    ``best``: has the highest mean, or the paired 95 % interval of what it lacks to that holds zero. Oracles of the
    benign set that the registry lists compete; ``REFERENCES`` do not.
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
    """The stress table of planted clients with values as error over local error (geometric mean over draws)."""
    return stress.assign(value=np.exp(-stress.value), low=np.exp(-stress.high), high=np.exp(-stress.low))


def outcomes(draws: pd.DataFrame, verdicts: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """A row per cell: CLAIR's gain over local, whether anybody is worse off, and the verdict.

    ``not_worse``: the mean gain over local is at least minus one standard error (paired, over draws). ``worst``: the
    worst client of all draws under CLAIR, ``worst_local`` under local. The rest are means over runs: share of exact
    sets, precision (of runs in which anybody is flagged), recall, share of benign clients flagged, of runs in which
    CLAIR refined, AUC.
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
    """For every cell the one of the rules that is best, and CLAIR's lead over it with its paired 95 % interval."""
    chosen = stress[stress.method.isin(rules)]
    rows = chosen.loc[chosen.groupby(by, sort=False).lead.idxmin()]
    return rows[[*by, "method", "lead", "lead_low", "lead_high"]].reset_index(drop=True)


def change_of_clients(accuracy: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Accuracy of single benign clients under CLAIR less that of their own update: worst, and how many lose a point."""
    wide = accuracy.pivot(index=[*by, "seed", "client"], columns="method", values="accuracy")
    change = (wide["CLAIR"] - wide["local"]).groupby(by, sort=False)
    return change.agg(worst="min", lose_a_point=lambda x: (x < -0.01).mean()).reset_index()


def harmed(*outcomes: pd.DataFrame) -> pd.DataFrame:
    """The cells in which benign clients are worse off by more than one standard error."""
    return pd.concat([table[~table.not_worse] for table in outcomes], ignore_index=True)


def share_swapped(verdicts: pd.DataFrame) -> float:
    """Share of runs in which the sides have changed roles: exactly the benign clients are flagged."""
    return float(((verdicts.benign_flagged == 1) & (verdicts.recall == 0)).mean())


def success_rates(backdoor: pd.DataFrame) -> pd.DataFrame:
    """Backdoor success rate by method over seeds: mean with its 95 % t interval, and what is added to local's."""
    means = backdoor.groupby(["seed", "method"]).success.mean().unstack("method")
    rows = []
    for method in dict.fromkeys(backdoor.method):
        mean, low, high = mean_interval(means[method])
        row = {"method": method, "success": mean, "low": low, "high": high}
        rows.append(row | {"added": float((means[method] - means["local"]).mean())})
    return pd.DataFrame(rows)
