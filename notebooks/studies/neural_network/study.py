"""Digits study (notebook 07): train and align clients, compare methods, and measure what each layer's updates share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from clairlib import CLAIR, ClairResult
from clairlib.baselines import AGGREGATORS
from clairlib.core.seeds import derive
from clairlib.linalg.low_rank import as_dense
from clairlib.reproduce.sweep import Rows, sweep
from studies.common.intervals import mean_interval, rate_interval
from studies.common.rules import OWN, TOLD_RANK, is_common, oracle_updates, server_updates
from studies.common.verdicts import angle_rows, detection_rows, verdict_row
from studies.neural_network.task import (
    LAYERS,
    SIDE,
    SLANT,
    Federation,
    examination,
    make_federation,
    predictions,
    pretrained,
    slanted,
    train_clients,
    with_patch,
)

DEEP = "all layers"
SETTINGS: dict[str, dict[str, Any]] = {
    "output layer": {"layers": ("output",)},
    "output layer, LoRA": {"layers": ("output",), "rank": 8},
    DEEP: {"layers": LAYERS},
    "all layers, LoRA": {"layers": LAYERS, "rank": 8},
}
"""Layers that clients train, as full matrices or as LoRA adapters."""

CELL = ["setting", "kind", "examples", "places"]  # columns that identify a cell
MAIN: dict[str, Any] = {"setting": "output layer", "kind": "permuted_labels", "examples": 100, "places": 2}
SHARE = 0.3  # fraction of contaminated clients
SHARED = {1: 4, 2: 5}  # digits of a number -> size of the set S that benign clients permute
LEFT_OUT = ("CAF",)  # its filter, as implemented, may stall where the farthest client has zero weight
SLOW = ("entrywise RPCA", "entrywise RPCA, personal")  # they take most of the time; run in the main setting only
HELD_OUT = 500  # test pictures of every client


def digits_cell(setting: str, kind: str, examples: int, places: int, clients: int, seed: int) -> dict[str, Rows]:
    """Run one federation: benign clients' accuracy under every rule, CLAIR's verdict, and what the layers share.

    Rules are told the part of the truth that they need; CLAIR is told nothing.
    """
    contaminated = 0 if kind == "none" else round(SHARE * clients)
    size: dict[str, Any] = {"clients": clients, "contaminated": contaminated, "examples": examples}
    federation = make_federation(seed, kind, **size, places=places, shared=SHARED[places])
    updates = train_clients(federation, **SETTINGS[setting], seed=seed)
    result = CLAIR().fit(updates)
    held = server_updates(updates, federation.benign, federation.rank, rules_for(updates))
    held |= {TOLD_RANK: oracle_updates(as_dense(updates), federation.benign, federation.rank), "CLAIR": result.refined}
    methods = {name: as_dense(own) for name, own in held.items()}
    tables = {"accuracy": judge(federation, methods, seed=seed), "verdicts": [judged(result, federation)]}
    tables["scores"] = detection_rows(result, federation.benign)
    tables |= layer_rows(result, methods["local"], federation, seed=seed)
    if kind == "backdoor":
        tables["backdoor"] = backdoor_rows(federation, methods, seed=seed)
    return tables


def rules_for(updates: Mapping[str, Any]) -> list[str]:
    """Return the aggregation rules without ``LEFT_OUT``; ``SLOW`` ones only for full matrices of one layer."""
    is_main = len(updates) == 1 and all(isinstance(own, Tensor) for own in updates.values())
    return [name for name in AGGREGATORS if name not in LEFT_OUT and (is_main or name not in SLOW)]


def judge(federation: Federation, methods: Mapping[str, Mapping[str, Tensor]], *, seed: int) -> Rows:
    """Measure every benign client's accuracy under every method's update for it, on held-out pictures.

    ``on_shared`` is the accuracy on the numbers S that benign clients permute, ``off_shared`` that on all other
    numbers.
    """
    test = examination(federation, HELD_OUT, seed=seed)
    right = federation.answers[:, test.numbers]  # (K, n)
    shared = torch.isin(test.numbers, federation.shared)
    rows: Rows = []
    for method, updates in methods.items():
        correct = (predictions_of(method, federation, updates, test.pictures) == right).double()
        for k in federation.benign.nonzero().flatten().tolist():
            row = {"method": method, "client": k, "accuracy": correct[k].mean().item()}
            row |= {"on_shared": correct[k, shared].mean().item(), "off_shared": correct[k, ~shared].mean().item()}
            rows.append(row)
    return rows


def predictions_of(method: str, federation: Federation, updates: Mapping[str, Tensor], pictures: Tensor) -> Tensor:
    """Return predictions (K, n) under a method's updates; a rule with one update for all clients is run once."""
    if is_common(method):
        updates = {name: own[:1] for name, own in updates.items()}
    return predictions(federation.task, updates, pictures).expand(len(federation.benign), -1)


def backdoor_rows(federation: Federation, methods: Mapping[str, Mapping[str, Tensor]], *, seed: int) -> Rows:
    """Measure how often a client's model gives the backdoor's answer to a held-out picture with the patch.

    Pictures for which this answer is right are left out. Benign clients are measured under every method; contaminated
    clients, which were taught the backdoor, under their own update (method ``OWN``).
    """
    test = examination(federation, HELD_OUT, seed=seed)
    pictures, answers = with_patch(test.pictures), federation.answers[:, test.numbers]
    rows: Rows = []
    for method, updates in methods.items():
        fooled = predictions_of(method, federation, updates, pictures) == federation.target
        for k, ok in enumerate(federation.benign.tolist()):
            if ok or method == "local":
                success = fooled[k, answers[k] != federation.target].double().mean().item()
                rows.append({"method": method if ok else OWN, "client": k, "success": success})
    return rows


def judged(result: ClairResult, federation: Federation) -> dict[str, Any]:
    """Compare CLAIR's verdict with the truth, and add the fraction of modules that it refined."""
    refined = [module.is_refined for module in result.modules.values()]
    return verdict_row(result, federation.benign) | {"refined": sum(refined) / len(refined)}


def layer_rows(
    result: ClairResult, updates: Mapping[str, Tensor], federation: Federation, *, seed: int
) -> dict[str, Rows]:
    """Measure what the clients' updates of each layer share.

    Table ``layers``: CLAIR's measures, told nothing. The other two tables use the truth. ``angles``: principal angles
    between the clients' own column spaces of m - 1 dimensions, after subtraction of the benign mean. ``spectrum``:
    singular values of the benign clients' centred updates side by side, over the square root of their number.
    """
    benign, rank = federation.benign, federation.rank
    layers: Rows = []
    angles: Rows = []
    spectrum: Rows = []
    for name, module in result.modules.items():
        row = {"layer": name, "shared_structure": module.shared_structure, "rank": module.rank}
        layers.append(row | {"refined": module.is_refined, "estimated_gain": module.gain})
        X = updates[name] - updates[name][benign].mean(dim=0)
        angles += [{"layer": name, **row} for row in angle_rows(X, benign, rank, seed=seed)]
        values = torch.linalg.svdvals(torch.cat(list(X[benign]), dim=1)) / int(benign.sum()) ** 0.5
        spectrum += [{"layer": name, "direction": i + 1, "singular_value": x} for i, x in enumerate(values.tolist())]
    return {"layers": layers, "angles": angles, "spectrum": spectrum}


def digits_study(
    points: Iterable[Mapping[str, Any]], seeds: int, *, clients: int = 20, seed: int = 0, cache: Path, jobs: int = 1
) -> dict[str, pd.DataFrame]:
    """Run ``digits_cell`` at points over seeds, and return its tables; missing parameters are taken from ``MAIN``.

    Cells of one seed are adjacent, because they use the same pretrained network.
    """
    points = [{**MAIN, **point, "clients": clients} for point in points]
    cells = [{**point, "seed": s} for s in range(seed, seed + seeds) for point in points]
    return sweep(digits_cell, cells, cache=cache, jobs=jobs)


def example_pictures(seed: int, count: int = 7) -> dict[str, Tensor]:
    """Draw pictures (count, 8, 16) of the same numbers as in pretraining, as clients have them, and contaminated."""
    task = pretrained(seed, MAIN["places"])
    numbers = torch.randint(task.numbers, (count,), generator=derive(seed, "digits", "shown"))
    x = task.pool.of(numbers, task.places, generator=derive(seed, "digits", "shown images"))
    shuffled = x[:, torch.randperm(x.shape[1], generator=derive(seed, "digits", "shown order"))]
    rows = {"pretraining: slanted": slanted(x, SLANT), "clients": x, "shuffled_pixels": shuffled}
    return {name: own.unflatten(1, (SIDE, -1)) for name, own in (rows | {"backdoor": with_patch(x)}).items()}


def shared_by_layer(layers: pd.DataFrame) -> pd.DataFrame:
    """Average every layer's shared structure over seeds (95 % t interval), with median rank and fraction refined."""
    rows = []
    for (setting, kind, layer), table in layers.groupby(["setting", "kind", "layer"], sort=False):
        mean, low, high = mean_interval(table.shared_structure)
        row = {"setting": setting, "kind": kind, "layer": layer, "shared_structure": mean, "low": low, "high": high}
        rows.append(row | {"rank": table["rank"].median(), "refined": table.refined.astype(float).mean()})
    return pd.DataFrame(rows)


def fall_of_structure(layers: pd.DataFrame) -> tuple[float, tuple[float, float]]:
    """Return the least fall of shared structure from a layer to the one below it: mean over seeds and 95 % interval.

    Only the setting with full matrices of all layers is used.
    """
    wide = layers[layers.setting == DEEP].pivot(index="seed", columns="layer", values="shared_structure")
    falls = [mean_interval(wide[above] - wide[below]) for below, above in pairwise(LAYERS)]
    mean, low, high = min(falls)
    return mean, (low, high)


def by_setting(*accuracies: pd.DataFrame) -> pd.DataFrame:
    """Select the rows of permuted labels from several tables, and put the setting into the column ``kind``."""
    table = pd.concat(accuracies, ignore_index=True)
    return table[table.kind == MAIN["kind"]].assign(kind=lambda rows: rows.setting)


def parts(accuracy: pd.DataFrame) -> pd.DataFrame:
    """Average accuracy on the numbers S and elsewhere over clients and seeds, by setting, kind and method."""
    by = accuracy.groupby(["setting", "kind", "method"], sort=False)
    return by[["accuracy", "on_shared", "off_shared"]].mean().reset_index()


def worst_rate(verdicts: pd.DataFrame) -> tuple[float, tuple[float, float]]:
    """Return the rate of exact sets over seeds in the setting where it is least, with its 95 % Wilson interval."""
    rates = [rate_interval(int(own.exact.sum()), len(own)) for _, own in verdicts.groupby("setting")]
    rate, low, high = min(rates)
    return rate, (low, high)


def least_gain(*draws: pd.DataFrame, of: str = "value") -> tuple[float, tuple[float, float]]:
    """Return CLAIR's gain over local in the cell where it is least certain, with its interval.

    ``of`` is "value" for the mean over benign clients, "worst" for the worst benign client.
    """
    gains = []
    for _, cell in pd.concat(draws).groupby(CELL, sort=False):
        wide = cell.pivot(index="draw", columns="method", values=of)
        gains.append(mean_interval(wide["CLAIR"] - wide["local"]))
    mean, low, high = min(gains, key=lambda gain: gain[1] if gain[1] == gain[1] else gain[0])
    return mean, (low, high)
