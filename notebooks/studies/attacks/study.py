"""Every attack against every aggregation rule, on planted clients and on adapters of the text-copying task.

A cell is one kind of contamination in one draw: what every rule gives the benign clients, and CLAIR's verdict. Rules
are told the truth that they must be told; CLAIR is told nothing. Tables are summarised in `studies.attacks.tables`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from clairlib import CLAIR, ClairResult
from clairlib.baselines.scores import CLIENT_SCORES
from clairlib.core.seeds import derive
from clairlib.linalg.low_rank import as_dense
from clairlib.reproduce.sweep import Rows, sweep
from clairlib.simulate import ATTACKS, Planted, attack, planted
from clairlib.simulate.attacks import as_adapter
from clairlib.theory.identifiability import attacked
from studies.common.rules import OWN, TOLD_RANK, oracle_updates
from studies.common.verdicts import auc, verdict_row
from studies.text_copying.clients import Recipe, TrainedFederation, Updates, backdoor_success, train_federation
from studies.text_copying.dialects import make_federation
from studies.text_copying.study import dense_server_updates, judge, oracle_methods, server_updates

PLANTED = ["noise", "share", "kind"]  # what names a cell
COPYING = ["kind", "share", "strength", "sequences"]
COLUMNS = 10  # q of planted clients
MODULE = "update"  # name of their one module
INSIDE, NOTHING_SHARED = "inside", "nothing_shared"  # kinds of the section on limits, beside those of the registries
INSIDE_SIZE = 10.0  # of an attack inside the subspace, in sizes of an honest update
MAIN: dict[str, Any] = {"share": 0.4, "strength": 1.0, "sequences": 32}
PLANTED_LIMITS: list[dict[str, Any]] = [
    {"kind": INSIDE, "share": 0.3, "noise": 0.3},
    {"kind": "sign_flip", "share": 0.45, "noise": 0.6},
    *({"kind": NOTHING_SHARED, "share": 0.0, "noise": noise} for noise in (0.05, 0.1, 0.3)),
]
COPYING_LIMITS: list[dict[str, Any]] = [
    {"kind": NOTHING_SHARED, "share": 0.0},
    {"kind": "free_rider", "share": 0.2},
    {"kind": "shared_wrong_symbols", "share": 0.6},
]
"""Where CLAIR has no gain to offer, or does not find who is contaminated; also ``PLANTED_LIMITS``."""


def planted_cell(kind: str, share: float, noise: float, seed: int) -> dict[str, Rows]:
    """One draw of planted clients, ``planted``'s defaults: error under every rule, and the verdict.

    ``gain`` = log(local error / error), errors mean squared over the benign clients; ``worst`` the same for the largest
    error of a client against the mean local one. ``noise`` is that of a row: of an entry it is noise / sqrt(q).
    """
    truth = draw_planted(kind, share, noise / COLUMNS**0.5, seed)
    X, benign = truth.updates, truth.benign
    result = CLAIR().fit(X)
    sent = server_updates({MODULE: X}, benign, truth.rank)
    methods = {name: as_dense(own)[MODULE] for name, own in sent.items() if name != "base"} | {"CLAIR": result.refined}
    methods |= {TOLD_RANK: oracle_updates({MODULE: X}, benign, truth.rank)[MODULE]}
    errors = {name: (own - truth.targets)[benign].square().sum(dim=(1, 2)) for name, own in methods.items()}
    local = errors["local"].mean()
    rows = [
        {"method": name, "gain": float((local / e.mean()).log()), "worst": float((local / e.max()).log())}
        for name, e in errors.items()
    ]
    return {"gain": rows, "verdicts": [judged(result, benign, X)]}


def draw_planted(kind: str, share: float, noise: float, seed: int) -> Planted:
    """Planted clients; beside the kinds of ATTACKS, attackers ``INSIDE`` the subspace, and benign ones without any."""
    draw = derive(seed, "attacks", kind, str(share), str(noise))
    if kind == NOTHING_SHARED:
        strangers = planted("unstructured", share=0.99, noise_std=noise, q=COLUMNS, generator=draw)  # all 24
        return replace(strangers, benign=~strangers.benign)
    if kind != INSIDE:
        return planted(kind, share=share, noise_std=noise, q=COLUMNS, generator=draw)
    honest = planted(share=0.0, noise_std=noise, q=COLUMNS, generator=draw)
    attackers = round(share * len(honest.updates))
    truth = attacked(honest, "spread", attackers, INSIDE_SIZE, generator=draw)
    return replace(truth, benign=torch.arange(len(truth.updates)) >= attackers)


def copying_cell(
    kind: str, share: float, strength: float, sequences: int, seed: int, clients: int, base_cache: str
) -> dict[str, Rows]:
    """One federation with LoRA on the last output projection: accuracies under every rule, and the verdict.

    ``CLAIR().fit`` takes the adapters from memory, and its refined updates are not truncated. ``backdoor``: success
    rate on the benign clients under every rule, and on the contaminated ones under their own update, where they have
    one.
    """
    run = trained_federation(kind, share, strength, sequences, seed, clients, base_cache)
    result = CLAIR().fit(run.updates, names=run.names)
    methods = dense_server_updates(run.updates, run.federation) | {"CLAIR": as_dense(result.refined)}
    methods[TOLD_RANK] = oracle_methods(run.base, run.federation, run.dense)[TOLD_RANK]
    (X,) = run.dense.values()
    tables = {"accuracy": judge(run.base, run.federation, methods, seed=seed)}
    tables["verdicts"] = [judged(result, run.federation.benign, X)]
    if kind == "backdoor":
        tables["backdoor"] = _backdoor_rows(run, methods, seed)
    return tables


def trained_federation(
    kind: str, share: float, strength: float, sequences: int, seed: int, clients: int, base_cache: str
) -> TrainedFederation:
    """Trained clients, a share of them contaminated: in their training data, or in what they send once trained.

    ``strength``: part of the way from the honest update to the attack's that is sent; only attacks on updates have one.
    """
    size: dict[str, Any] = {"clients": clients, "cache": base_cache}
    contaminated, recipe = round(share * clients), Recipe(sequences=sequences)
    if kind in ATTACKS:
        honest = _honest(seed, sequences, clients, base_cache)
        return send(honest, kind, contaminated, strength, seed=seed)
    if kind != NOTHING_SHARED:
        return train_federation(seed, recipe, contaminated=contaminated, kind=kind, **size)
    run = train_federation(seed, recipe, contaminated=clients, **size)  # each with symbols of its own
    return _mark(run, torch.zeros(clients, dtype=torch.bool))


@lru_cache(maxsize=1)
def _honest(seed: int, sequences: int, clients: int, base_cache: str) -> TrainedFederation:
    """Honest clients, trained once for all attacks on their updates."""
    return train_federation(seed, Recipe(sequences=sequences), clients=clients, contaminated=0, cache=base_cache)


def send(
    honest: TrainedFederation, kind: str, contaminated: int, strength: float = 1.0, *, seed: int
) -> TrainedFederation:
    """The federation in which some clients attack, the same ones as in a federation of contaminated training data."""
    bad = ~make_federation(len(honest.names), contaminated, seed=seed).benign
    ((module, X),) = honest.dense.items()
    full = torch.as_tensor(attack(kind, X, bad, rank=honest.federation.rank, generator=derive(seed, "attacks", kind)))
    sent, own = torch.lerp(X, full, strength), honest.updates[module]
    trained = [
        replace(client, updates={module: as_adapter(sent[k], like=own[k])}) if bad[k] else client
        for k, client in enumerate(honest.trained)
    ]
    return _mark(replace(honest, trained=trained), bad)


def _mark(run: TrainedFederation, contaminated: Tensor) -> TrainedFederation:
    """The same updates, the clients named in the mask (K,) contaminated and no others."""
    pairs = zip(run.federation.clients, contaminated.tolist(), strict=True)
    clients = [replace(client, contaminated=wrong) for client, wrong in pairs]
    return replace(run, federation=replace(run.federation, clients=clients))


def judged(result: ClairResult, benign: Tensor, X: Tensor) -> dict[str, Any]:
    """CLAIR's verdict against the truth, whether it refined, and the AUC of scores by distance, told the number."""
    (module,) = result.modules.values()
    row, contaminated = verdict_row(result, benign) | {"refined": module.is_refined}, int((~benign).sum())
    if contaminated:
        scores = {name: score(X, contaminated) for name, score in CLIENT_SCORES.items()}
        scores["trimming"] = trimming_score(X, contaminated)
        row |= {f"auc, {name}": auc(x[benign].numpy(), x[~benign].numpy()) for name, x in scores.items()}
    return row


def trimming_score(updates: Tensor, trimmed: int) -> Tensor:
    """Distance (K,) from the mean of the clients that trimming keeps: all but the farthest, until they stay."""
    kept = torch.ones(len(updates), dtype=torch.bool)
    seen: list[Tensor] = []
    while True:
        distance = torch.linalg.matrix_norm(updates - updates[kept].mean(dim=0))
        seen.append(kept)
        kept = torch.zeros_like(kept)
        kept[distance.argsort()[: len(updates) - trimmed]] = True
        if any(torch.equal(kept, before) for before in seen):
            return distance


def _backdoor_rows(run: TrainedFederation, methods: dict[str, Updates], seed: int) -> Rows:
    door, rows = run.federation.backdoor, []
    for k, client in enumerate(run.federation.clients):
        names = ["local"] if client.contaminated else list(methods)
        own = {module: torch.stack([methods[name][module][k].double() for name in names]) for module in run.dense}
        rates = backdoor_success(run.base, client, door, own, seed=seed)
        labels = [OWN] if client.contaminated else names
        rows += [{"method": m, "client": client.name, "success": r} for m, r in zip(labels, rates, strict=True)]
    return rows


def planted_study(
    points: Iterable[Mapping[str, Any]], seeds: int, *, seed: int = 0, cache: Path | None = None, jobs: int = 1
) -> dict[str, pd.DataFrame]:
    """``planted_cell`` at points {kind, share, noise}, over seeds: tables gain and verdicts."""
    cells = [{**point, "seed": s} for point in points for s in range(seed, seed + seeds)]
    return sweep(planted_cell, cells, cache=cache, jobs=jobs)


def copying_study(
    points: Iterable[Mapping[str, Any]], seeds: int, *, clients: int = 20, seed: int = 0, cache: Path, jobs: int = 1
) -> dict[str, pd.DataFrame]:
    """``copying_cell`` at points, what they leave out as in ``MAIN``, over seeds: its tables.

    A seed's cells follow one another, as they have the honest clients in common.
    """
    points = [{**MAIN, **point, "clients": clients} for point in points]
    cells = [{**point, "seed": s} for s in range(seed, seed + seeds) for point in points]
    return sweep(copying_cell, cells, shared={"base_cache": str(cache)}, cache=cache, jobs=jobs)


def planted_draws(gain: pd.DataFrame) -> pd.DataFrame:
    """Draws of planted clients, as `studies.common.tables.draws`: the value is log(local error / error)."""
    return gain.rename(columns={"seed": "draw", "gain": "value"})
