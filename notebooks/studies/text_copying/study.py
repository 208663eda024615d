"""Main table of text copying (notebook 08): train adapters, align them from disk, load them back, compare methods.

A cell is one federation of one seed. Other studies reuse ``dense_server_updates``, ``oracle_methods`` and ``judge``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from clairlib import CLAIR, ClairResult
from clairlib.alignment.align import align
from clairlib.linalg.low_rank import as_dense
from clairlib.recovery.frame import fit_frame
from clairlib.recovery.refinement import refined_core
from clairlib.reproduce.sweep import Rows, sweep
from clairlib.training import save_adapters
from studies.common.rules import (
    STOPPED,
    TOLD_RANK,
    TOLD_SUBSPACE,
    UNTRUNCATED,
    before_truncation,
    oracle_updates,
    server_updates,
)
from studies.common.verdicts import angle_rows, detection_rows
from studies.text_copying.base_model import Base, unembedding
from studies.text_copying.clients import (
    Recipe,
    TrainedFederation,
    Updates,
    evaluate,
    evaluate_free_running,
    load_updates,
    train_federation,
)
from studies.text_copying.dialects import Federation, vocabulary_leverage

SETTINGS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "LoRA, all writers": {"targets": "output"},
    "full matrix": {"rank": None},
}
"""Settings of the main table, as changes of `Recipe`."""

FREE_RUNNING = ("local", "FedAvg", "CLAIR")  # methods that are also evaluated on their own output, which takes longer


def copying_cell(
    seed: int, setting: str, label_noise: float, clients: int, contaminated: int, sequences: int, base_cache: str
) -> dict[str, Rows]:
    """Run one federation: train clients, get CLAIR's verdict, every method's accuracy, and the figures' data.

    The base model is trained for the seed, or read from ``base_cache``. In the setting LoRA, verdict and refined
    adapters come from adapter folders through the code of ``clair align``, and peft loads the adapters back. In the
    other settings ``CLAIR().fit`` takes the updates from memory.
    """
    how = {"label_noise": label_noise, "sequences": sequences, **SETTINGS[setting]}
    who: dict[str, Any] = {"clients": clients, "contaminated": contaminated, "cache": base_cache}
    run = train_federation(seed, Recipe(**how), **who)
    stopped = train_federation(seed, Recipe(**how, held_out=sequences // 4), **who)
    facts: dict[str, Any] = {"in_distribution": run.base.in_distribution}
    facts |= {"out_of_distribution": run.base.out_of_distribution}
    if setting == "LoRA":
        result, refined, more = _aligned(run)
        facts |= more
    else:
        result = CLAIR().fit(run.updates, names=run.names)
        refined = {"CLAIR": as_dense(result.refined)}
    methods = dense_server_updates(run.updates, run.federation) | refined
    methods |= oracle_methods(run.base, run.federation, run.dense)
    first = {"base": methods["base"], "local": methods["local"], STOPPED: stopped.dense}
    free_running = FREE_RUNNING if setting == "LoRA" else ()
    tables = {"detection": detection_rows(result, run.federation.benign), "run": [facts]}
    if len(result.modules) == 1:
        tables |= _pictures(result, run, seed)
    tables["accuracy"] = judge(run.base, run.federation, first | methods, seed=seed, free_running=free_running)
    return tables


def dense_server_updates(updates: Mapping[str, Any], federation: Federation) -> dict[str, Updates]:
    """Return `server_updates` as dense matrices (K, p, q) by module; ``updates`` as in `TrainedFederation.updates`."""
    methods = server_updates(updates, federation.benign, federation.rank)
    return {name: as_dense(own) for name, own in methods.items()}


def oracle_methods(base: Base, federation: Federation, updates: Updates) -> dict[str, Updates]:
    """Return the refined updates of two oracles that are told the benign set S.

    One is also told the rank m - 1 of every module. The other is also told P, the span of the differences of the
    symbols' unembedding rows; it exists only where the last output projection is the only module.
    """
    told: dict[str, Updates] = {TOLD_RANK: oracle_updates(updates, federation.benign, federation.rank)}
    if len(updates) == 1:
        ((name, X),) = updates.items()
        frame = fit_frame(X, torch.ones(len(X), dtype=torch.float64), federation.benign, federation.rank)
        rows = unembedding(base)[federation.symbols].double()
        P = torch.linalg.svd(rows - rows.mean(dim=0), full_matrices=False).Vh[: federation.rank].T  # (hidden, m - 1)
        told[TOLD_SUBSPACE] = {name: refined_core(X, replace(frame, basis=P))}
    return told


def _aligned(run: TrainedFederation) -> tuple[ClairResult, dict[str, Updates], dict[str, Any]]:
    """Return the verdict, the refined updates, and facts of an alignment through adapter folders.

    Refined updates are returned as written, at the clients' own rank, and before truncation.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_adapters(run.base.model, run.trained, folder / "clients")
        aligned = align([folder / "clients"], folder / "aligned", keep_contaminated=True)
        written = load_updates(run.base, [aligned.output / name for name in run.names])
    (module,) = aligned.report["modules"]
    result = CLAIR().fit(run.updates, names=run.names)
    if result.contaminated != aligned.result.contaminated:
        raise RuntimeError("the verdict on adapter folders differs from the one on the same updates in memory")
    refined: dict[str, Updates] = {"CLAIR": written, UNTRUNCATED: as_dense(before_truncation(result, run.updates))}
    return result, refined, {"rank": module["rank"], "truncation_error": module["truncation_error"]["mean"]}


def judge(
    base: Base,
    federation: Federation,
    methods: Mapping[str, Updates],
    *,
    seed: int,
    count: int = 200,
    free_running: Sequence[str] = (),
) -> Rows:
    """Measure every benign client's accuracy under every method's update for it, on ``count`` sequences per client.

    ``methods``: name -> dense updates (K, p, q) by module, one per client; all methods of one call update the same
    modules. The methods in ``free_running`` are also evaluated on their own output.
    """
    rows: Rows = []
    for k, client in enumerate(federation.clients):
        if client.contaminated:
            continue
        own = _stack(methods, list(methods), k)
        for method, a in zip(methods, evaluate(base, client, own, seed=seed, count=count), strict=True):
            row = {"client": client.name, "method": method, "accuracy": a.overall}
            rows.append(row | {"on_symbols": a.on_symbols, "off_symbols": a.off_symbols})
        if free_running:
            copied = evaluate_free_running(base, client, _stack(methods, free_running, k), seed=seed)
            values = dict(zip(free_running, copied, strict=True))
            for new in rows[-len(methods) :]:
                new["free_running"] = values.get(new["method"])
    return rows


def _stack(methods: Mapping[str, Updates], chosen: Sequence[str], k: int) -> dict[str, Tensor]:
    """Stack client k's updates under the chosen methods, (M, p, q) by module."""
    modules = next(iter(methods.values()))
    return {module: torch.stack([methods[name][module][k].double() for name in chosen]) for module in modules}


def _pictures(result: ClairResult, run: TrainedFederation, seed: int) -> dict[str, Rows]:
    """Return the figures' data for one module: leverage of every token, joint spectrum, angles between clients."""
    module = next(iter(result.modules.values()))
    X, benign = next(iter(run.dense.values())), run.federation.benign
    leverage = vocabulary_leverage(module.basis, unembedding(run.base)).tolist()
    symbols = set(run.federation.symbols.tolist())
    stacks = {"clients CLAIR keeps": X[result.benign], "everybody": X}
    return {
        "leverage": [{"token": v, "leverage": x, "symbol": v in symbols} for v, x in enumerate(leverage)],
        "spectrum": [
            {"clients": name, "direction": i + 1, "singular_value": value}
            for name, stack in stacks.items()
            for i, value in enumerate(_joint_spectrum(stack))
        ],
        "angles": angle_rows(X, benign, run.federation.rank, seed=seed),
    }


def _joint_spectrum(X: Tensor) -> list[float]:
    """Return the singular values of the centred updates (K, p, q) side by side, over the square root of K."""
    blocks = torch.cat(list(X - X.mean(dim=0)), dim=1)  # (p, K*q)
    return (torch.linalg.svdvals(blocks) / len(X) ** 0.5).tolist()


def copying_study(
    settings: Mapping[str, Sequence[float]],
    seeds: int,
    *,
    seed: int = 0,
    clients: int = 20,
    contaminated: int = 8,
    sequences: int = 32,
    cache: Path,
    jobs: int = 1,
) -> dict[str, pd.DataFrame]:
    """Run ``copying_cell`` over seeds, settings and each setting's label noise levels; return its tables."""
    size = {"clients": clients, "contaminated": contaminated, "sequences": sequences}
    cells = [
        {"seed": seed + s, "setting": setting, "label_noise": noise, **size}
        for setting, noises in settings.items()
        for noise in noises
        for s in range(seeds)
    ]
    return sweep(copying_cell, cells, shared={"base_cache": str(cache)}, cache=cache, jobs=jobs)
