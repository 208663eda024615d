"""Every attack against every aggregation rule (notebook 09), on planted clients and on text-copying adapters.

A cell is one draw of one kind of contamination. It returns every rule's result for the benign clients, and CLAIR's
verdict. Rules are told the part of the truth that they need; CLAIR is told nothing. `studies.common.tables` summarises
the results.
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

PLANTED = ["noise", "share", "kind"]  # columns that identify a cell
COPYING = ["kind", "share", "strength", "sequences"]
COLUMNS = 10  # q of planted clients
MODULE = "update"  # name of the planted clients' only module
INSIDE, NOTHING_SHARED = "inside", "nothing_shared"  # kinds of the section on limits, in no registry
INSIDE_SIZE = 10.0  # size of an attack inside the subspace, relative to an honest update
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
"""Cases in which CLAIR has no gain to offer or does not find the contaminated clients; also ``PLANTED_LIMITS``."""


def planted_cell(kind: str, share: float, noise: float, seed: int) -> dict[str, Rows]:
    """Run one draw of planted clients with the defaults of ``planted``: error under every rule, and the verdict.

    ``gain`` = log(local error / error), with errors averaged over the benign clients. ``worst`` is the log of the mean
    local error over the largest error of a benign client. ``noise`` is the noise of one row: an entry's standard
    deviation is noise / sqrt(q).
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
    """Draw planted clients; ``noise`` is an entry's standard deviation.

    In addition to the kinds of ATTACKS, ``INSIDE`` has attackers inside the subspace, and ``NOTHING_SHARED`` has benign
    clients without a shared subspace.
    """
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
    """Run one federation with LoRA on the last output projection: accuracy under every rule, and the verdict.

    ``CLAIR().fit`` takes the adapters from memory, and truncates refined updates to their rank. Table ``backdoor`` has
    the success rate on the benign clients under every rule, and on the contaminated clients under their own update. It
    exists for kind "backdoor" only.
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
    """Train clients, a fraction ``share`` of them contaminated in their training data or in the updates that they send.

    ``strength`` applies to attacks on updates only: the sent update lies this fraction of the way from the honest
    update to the attack's update.
    """
    size: dict[str, Any] = {"clients": clients, "cache": base_cache}
    contaminated, recipe = round(share * clients), Recipe(sequences=sequences)
    if kind in ATTACKS:
        honest = _honest(seed, sequences, clients, base_cache)
        return send(honest, kind, contaminated, strength, seed=seed)
    if kind != NOTHING_SHARED:
        return train_federation(seed, recipe, contaminated=contaminated, kind=kind, **size)
    run = train_federation(seed, recipe, contaminated=clients, **size)  # every client has its own symbols
    return _mark(run, torch.zeros(clients, dtype=torch.bool))


@lru_cache(maxsize=1)
def _honest(seed: int, sequences: int, clients: int, base_cache: str) -> TrainedFederation:
    """Train honest clients once for all attacks on their updates."""
    return train_federation(seed, Recipe(sequences=sequences), clients=clients, contaminated=0, cache=base_cache)


def send(
    honest: TrainedFederation, kind: str, contaminated: int, strength: float = 1.0, *, seed: int
) -> TrainedFederation:
    """Return the federation with some clients' updates replaced by an attack.

    The attackers are the clients that `make_federation` makes contaminated for the same seed. ``strength`` is explained
    in `trained_federation`.
    """
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
    """Return the same updates with exactly the clients in the mask (K,) marked as contaminated."""
    pairs = zip(run.federation.clients, contaminated.tolist(), strict=True)
    clients = [replace(client, contaminated=wrong) for client, wrong in pairs]
    return replace(run, federation=replace(run.federation, clients=clients))


def judged(result: ClairResult, benign: Tensor, X: Tensor) -> dict[str, Any]:
    """Compare CLAIR's verdict with the truth; add whether it refined, and the AUC of distance-based client scores.

    The distance-based scores are told the number of contaminated clients.
    """
    (module,) = result.modules.values()
    row, contaminated = verdict_row(result, benign) | {"refined": module.is_refined}, int((~benign).sum())
    if contaminated:
        scores = {name: score(X, contaminated) for name, score in CLIENT_SCORES.items()}
        scores["trimming"] = trimming_score(X, contaminated)
        row |= {f"auc, {name}": auc(x[benign].numpy(), x[~benign].numpy()) for name, x in scores.items()}
    return row


def trimming_score(updates: Tensor, trimmed: int) -> Tensor:
    """Return each client's distance (K,) from the mean of the clients that trimming keeps.

    Trimming drops the ``trimmed`` farthest clients and recomputes the mean, until a set of kept clients recurs.
    """
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
    """Run ``planted_cell`` at points {kind, share, noise} over seeds; return the tables gain and verdicts."""
    cells = [{**point, "seed": s} for point in points for s in range(seed, seed + seeds)]
    return sweep(planted_cell, cells, cache=cache, jobs=jobs)


def copying_study(
    points: Iterable[Mapping[str, Any]], seeds: int, *, clients: int = 20, seed: int = 0, cache: Path, jobs: int = 1
) -> dict[str, pd.DataFrame]:
    """Run ``copying_cell`` at points over seeds, and return its tables; missing parameters are taken from ``MAIN``.

    Cells of one seed are adjacent, because they use the same honest clients.
    """
    points = [{**MAIN, **point, "clients": clients} for point in points]
    cells = [{**point, "seed": s} for s in range(seed, seed + seeds) for point in points]
    return sweep(copying_cell, cells, shared={"base_cache": str(cache)}, cache=cache, jobs=jobs)


def planted_draws(gain: pd.DataFrame) -> pd.DataFrame:
    """Convert planted results to a table of draws (`studies.common.tables`) with value log(local error / error)."""
    return gain.rename(columns={"seed": "draw", "gain": "value"})
