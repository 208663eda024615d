"""Text copying end to end: clients' PEFT adapters trained, aligned from disk, loaded back and judged."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from clairlib.alignment import Alignment, align
from clairlib.base import Base, BaseConfig, base_model, unembedding
from clairlib.copying_clients import (
    Recipe,
    adapted_module,
    adapter_update,
    evaluate_free_running,
    evaluate_update,
    train_clients,
    updated_model,
)
from clairlib.dialects import Federation, make_federation, vocabulary_leverage
from clairlib.experiments import Rows, mean_interval, sweep
from clairlib.frames import fit_frame
from clairlib.refinement import refined_core

RANK_KEPT = 24  # adapter rank at which hardly anything of a refined update is cut off
METHODS = ["base", "local", "FedAvg", "FedAvg, factors", "FedAvg, benign only", "CLAIR", "CLAIR, rank kept"]
METHODS += ["CLAIR, told S and r"]
FREE_RUNNING = ("local", "FedAvg", "CLAIR")  # also judged copying from their own output, which takes longer


def copying_cell(
    seed: int, label_noise: float, clients: int, contaminated: int, sequences: int, base_cache: str
) -> dict[str, Rows]:
    """One federation: base model, clients' adapters, ``clair align`` on their folders, accuracies, leverage.

    The base model is trained for the seed, or read from ``base_cache``. The verdict and the refined adapters come from
    the folders through the code path of the command line, and are loaded back with peft.
    """
    base = base_model(BaseConfig(seed=seed), cache=base_cache)
    federation = make_federation(clients, contaminated, seed=seed)
    recipe = Recipe(label_noise=label_noise, sequences=sequences)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        folders = train_clients(base, federation.clients, folder / "clients", seed=seed, recipe=recipe)
        aligned = align([folder / "clients"], folder / "aligned", adapter_rank=None)
        wide = align([folder / "clients"], folder / "wide", adapter_rank=RANK_KEPT)
        accuracy = _accuracies(base, federation, folders, [aligned, wide], seed)
    detection = _detection(aligned, federation)
    leverage = _leverage(aligned, base, federation)
    facts = {"in_distribution": base.in_distribution, "out_of_distribution": base.out_of_distribution}
    facts |= {"rank": next(iter(aligned.result.modules.values())).rank}
    facts |= {"truncation_error": aligned.report["modules"][0]["truncation_error"]["mean"]}
    facts |= {"truncation_error_kept": wide.report["modules"][0]["truncation_error"]["mean"]}
    return {"accuracy": accuracy, "detection": detection, "leverage": leverage, "run": [facts]}


def _accuracies(
    base: Base, federation: Federation, folders: list[Path], aligned: list[Alignment], seed: int
) -> Rows:
    """Accuracy of every benign client under every method."""
    models = [updated_model(base, folder) for folder in folders]
    local = torch.stack([adapter_update(model) for model in models])
    benign = federation.benign
    oracle = _oracle(local, benign, len(federation.symbols) - 1)
    shared: dict[str, Tensor | None] = {
        "base": None,
        "FedAvg": local.mean(dim=0),
        "FedAvg, factors": _factor_mean(models),
        "FedAvg, benign only": local[benign].mean(dim=0),
    }
    rows: Rows = []
    for k, client in enumerate(federation.clients):
        if not benign[k]:
            continue
        updates: dict[str, Any] = {**shared, "local": local[k], "CLAIR, told S and r": oracle[k]}
        for method, alignment in zip(("CLAIR", "CLAIR, rank kept"), aligned, strict=True):
            written = alignment.output / client.name
            updates[method] = written if written.exists() else folders[k]  # a client held contaminated keeps its own
        for method in METHODS:
            a = evaluate_update(base, updates[method], client, seed=seed)
            row = {"client": client.name, "method": method, "accuracy": a.overall}
            row |= {"on_symbols": a.on_symbols, "off_symbols": a.off_symbols}
            if method in FREE_RUNNING:
                row["free_running"] = evaluate_free_running(base, updates[method], client, seed=seed)
            rows.append(row)
    return rows


def _oracle(local: Tensor, benign: Tensor, rank: int) -> Tensor:
    """Refined updates when the benign clients and the rank are told."""
    X = local.double()
    return refined_core(X, fit_frame(X, torch.ones(len(X), dtype=X.dtype), benign, rank)).float()


def _factor_mean(models: list[Any]) -> Tensor:
    """The common but wrong average: mean of B times mean of A, times the scale."""
    layers = [adapted_module(model) for model in models]
    B = torch.stack([layer.lora_B["default"].weight for layer in layers]).mean(dim=0)
    A = torch.stack([layer.lora_A["default"].weight for layer in layers]).mean(dim=0)
    return (layers[0].scaling["default"] * B @ A).detach()


def _detection(aligned: Alignment, federation: Federation) -> Rows:
    truth = dict(zip([c.name for c in federation.clients], (~federation.benign).tolist(), strict=True))
    return [
        {
            "client": client["name"],
            "score": client["score"],
            "flagged": client["contaminated"],
            "contaminated": truth[client["name"]],
        }
        for client in aligned.report["clients"]
    ]


def _leverage(aligned: Alignment, base: Base, federation: Federation) -> Rows:
    basis = next(iter(aligned.result.modules.values())).basis
    leverage = vocabulary_leverage(basis, unembedding(base))
    symbols = set(federation.symbols.tolist())
    return [{"token": v, "leverage": x, "symbol": v in symbols} for v, x in enumerate(leverage.tolist())]


def copying_study(
    seeds: int,
    label_noises: list[float],
    *,
    seed: int = 0,
    clients: int = 20,
    contaminated: int = 8,
    sequences: int = 32,
    cache: Path,
    jobs: int = 1,
) -> dict[str, pd.DataFrame]:
    """``copying_cell`` over seeds and label noises: tables accuracy, detection, leverage and run."""
    cells = [
        {
            "seed": seed + s,
            "label_noise": level,
            "clients": clients,
            "contaminated": contaminated,
            "sequences": sequences,
        }
        for s in range(seeds)
        for level in label_noises
    ]
    return sweep(copying_cell, cells, shared={"base_cache": str(cache)}, cache=cache, jobs=jobs)


def summarise_accuracy(accuracy: pd.DataFrame) -> pd.DataFrame:
    """Benign accuracy by label noise and method: mean over seeds with 95 % t interval, worst client, and its parts.

    ``on_symbols``, ``off_symbols``: on the dialects' symbols and elsewhere; ``free_running``: copying from own output.
    """
    rows = []
    for level, noise_rows in accuracy.groupby("label_noise"):
        for method in METHODS:
            each = noise_rows[noise_rows.method == method].groupby("seed").accuracy
            mean, low, high = mean_interval(each.mean())
            row = {"label_noise": level, "method": method, "accuracy": mean, "low": low, "high": high}
            row["worst_client"] = float(each.min().mean())
            for part in ("on_symbols", "off_symbols", "free_running"):
                row[part] = float(noise_rows[noise_rows.method == method][part].mean())
            rows.append(row)
    return pd.DataFrame(rows)


def paired_differences(accuracy: pd.DataFrame, over: str = "seed", method: str = "CLAIR") -> pd.DataFrame:
    """Method minus each other method: paired 95 % t interval over seeds (benign mean of each), or over clients.

    ``over="client"`` takes each client of each seed for a draw of its own, which is all a single seed allows.
    """
    unit = {"seed": ["seed"], "client": ["seed", "client"]}[over]
    means = accuracy.groupby(["label_noise", *unit, "method"]).accuracy.mean().unstack("method")
    rows = []
    for level, table in means.groupby("label_noise"):
        for other in METHODS:
            if other != method:
                mean, low, high = mean_interval(table[method] - table[other])
                rows.append({"label_noise": level, "against": other, "difference": mean, "low": low, "high": high})
    return pd.DataFrame(rows)


def summarise_detection(detection: pd.DataFrame) -> pd.DataFrame:
    """Precision, recall and exactness of the contaminated set by label noise and seed."""
    rows = []
    for (level, seed), table in detection.groupby(["label_noise", "seed"]):
        hits = int((table.flagged & table.contaminated).sum())
        row = {"label_noise": level, "seed": seed, "flagged": int(table.flagged.sum()), "hits": hits}
        row["precision"] = hits / row["flagged"] if row["flagged"] else float("nan")
        row["recall"] = hits / int(table.contaminated.sum())
        rows.append({**row, "exact": bool((table.flagged == table.contaminated).all())})
    return pd.DataFrame(rows)


def against(differences: pd.DataFrame, method: str, label_noise: float) -> dict[str, float]:
    """CLAIR minus one method at one label noise: difference, low, high."""
    row = differences[(differences.against == method) & (differences.label_noise == label_noise)].iloc[0]
    return {name: float(row[name]) for name in ("difference", "low", "high")}


def leverage_picks_symbols(leverage: pd.DataFrame) -> pd.DataFrame:
    """For every run: are the tokens of highest leverage, as many as there are symbols, exactly the symbols?"""
    rows = []
    for (level, seed), table in leverage.groupby(["label_noise", "seed"]):
        top = table.nlargest(int(table.symbol.sum()), "leverage")
        rows.append({"label_noise": level, "seed": seed, "picked": bool(top.symbol.all())})
    return pd.DataFrame(rows)
