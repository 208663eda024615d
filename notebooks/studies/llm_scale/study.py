"""Alignment at the size of language models: time and memory against the lower bound, exactness, verdicts (notebook 11).

Everything here is this project's own; the paper's abstract (arXiv:2605.21217) says nothing about cost.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from clairlib import CLAIR, LowRank
from clairlib.adapters import open_adapters
from clairlib.adapters.config import CONFIG
from clairlib.adapters.folder import write_lora
from clairlib.bench.alignment import apart, measure_planted, run_alignment
from clairlib.linalg.refined_factors import exact_update
from clairlib.linalg.subspace import project_out
from clairlib.recovery.frame import fit_frame
from clairlib.recovery.scores import SCORED_DIRECTIONS_PER_RANK
from clairlib.reproduce.sweep import Rows, sweep
from clairlib.simulate import Plan, synthesise
from clairlib.simulate.adapters import CLIENTS, module_shapes
from clairlib.theory.collaborative_set import energy_separation, filtered_separation
from studies.common.intervals import slope_interval

SHARED_RANK = 2  # shared rank where adapters have low rank
BAD = 1 / 8  # contaminated fraction where the verdict is not studied; each such client has its own subspace
VERDICTS: list[dict[str, Any]] = [
    {"kind": "stealth", "share": 1 / 8, "in_common": False, "times": 1.0},
    {"kind": "stealth", "share": 1 / 8, "in_common": True, "times": 1.0},
    {"kind": "stealth", "share": 1 / 8, "in_common": True, "times": 3.0},
    {"kind": "stealth", "share": 1 / 8, "in_common": True, "times": 6.0},
    {"kind": "coalition", "share": 25 / 64, "in_common": True, "times": 1.0},
]
"""Contamination in the section on verdicts; a stealth step has ``times`` the norm of `promised_distance`."""
LEVEL = 0.95


def promised_distance(plan: Plan, p: int) -> float:
    """Return the norm of an off-subspace step that notebook 04's detectors find.

    From this norm on, the detectors find the exact set with probability .99, told P, M and sigma. It is the larger of
    their two separations. An adapter's noise fills rho columns of p - r rows.
    """
    rows, columns, K = p - plan.shared_rank, plan.rank, plan.clients
    scored = SCORED_DIRECTIONS_PER_RANK * plan.shared_rank
    told = energy_separation(rows, columns, K), filtered_separation(rows, columns, scored, K)
    return max(told) * plan.noise / (rows * columns) ** 0.5


def bench_cell(
    clients: int, rank: int, sizes: dict[str, Any], processes: list[int], seed: int, scratch: str
) -> dict[str, Rows]:
    """Run `clairlib.bench.alignment.measure_planted`, with an eighth of the clients contaminated.

    Each contaminated client takes a stealth step of its own.
    """
    p = min(shape[0] for shape in _shapes(sizes).values())
    plan = Plan(clients, rank, kind="stealth", contaminated=round(BAD * clients), in_common=False, seed=seed)
    plan = replace(plan, distance=promised_distance(plan, p))
    table = measure_planted(plan, scratch=Path(scratch), jobs=processes, **sizes)
    return {"bench": table.to_dict("records")}


def growth_cell(along: str, clients: int, rank: int, p: int, modules: int, seed: int, scratch: str) -> dict[str, Rows]:
    """Measure seconds and peak memory of one alignment in its own process; ``along``: the growing parameter."""
    plan = Plan(clients, rank, SHARED_RANK, contaminated=round(BAD * clients), seed=seed)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        truth = synthesise(Path(folder) / "planted", plan, shape=(p, p), layers=modules)
        own, memory = apart(run_alignment, Path(folder) / "planted" / CLIENTS, Path(folder) / "out")
    exact = own["contaminated"] == ", ".join(truth["contaminated"])
    seconds = {name: own[name] for name in ("align_seconds", "search_seconds")}
    return {"growth": [{**seconds, "memory_gb": memory / 1e9, "gb": truth["bytes"] / 1e9, "exact": exact}]}


def verdict_cell(
    kind: str, share: float, in_common: bool, times: float, clients: int, rank: int, sizes: dict[str, Any], seed: int,
    scratch: str,
) -> dict[str, Rows]:  # fmt: skip
    """Check whether CLAIR finds the contaminated set exactly from adapter files; scores are pooled over the modules."""
    p = min(shape[0] for shape in _shapes(sizes).values())
    plan = Plan(clients, rank, kind=kind, contaminated=round(share * clients), in_common=in_common, seed=seed)
    plan = replace(plan, distance=times * promised_distance(plan, p))
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        truth = synthesise(Path(folder) / "planted", plan, **sizes)
        adapters = open_adapters([Path(folder) / "planted" / CLIENTS])
        updates = adapters.load()
    result = CLAIR(seed=seed).fit(updates, names=adapters.names)
    bad = torch.tensor([name in truth["contaminated"] for name in adapters.names])
    row = {"contaminated": int(bad.sum()), "distance": plan.distance if kind == "stealth" else None}
    row |= {"exact": result.contaminated == truth["contaminated"], "flagged": len(result.contaminated)}
    row |= {"least_bad": float(result.scores[bad].min()), "most_benign": float(result.scores[~bad].max())}
    return {"verdicts": [row | {"rank": max(result.rank.values())}]}


def promised(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Select the kinds that should be found: coalitions, and stealth steps that differ from client to client."""
    return verdicts[(verdicts.kind != "stealth") | ~verdicts.in_common]


def exactness_cell(
    ranks: list[int], rslora: bool, dtype: str, clients: int, p: int, q: int, seed: int, scratch: str
) -> dict[str, Rows]:
    """Compare refined updates of adapters from files, before truncation, with P Theta_k + P_perp M of dense updates.

    Client k has adapter rank ranks[k mod n]; every third client has another rank in the second module. With ``rslora``
    every second client states its scale as rsLoRA does. ``error``: largest relative Frobenius error of a benign client.
    ``rounding``: the same error if subspace and common part are computed in float64 from the files' values and rounded
    to ``dtype`` at the end. Modules in which refinement is refused are left out.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        plan = Plan(clients, max(ranks), SHARED_RANK, dtype=dtype, seed=seed)
        truth = _mixed_clients(Path(folder), plan, ranks, (p, q))
        (Path(folder) / "mixed").mkdir()
        for k, name in enumerate(truth):
            write_lora(Path(folder) / "mixed" / name, {"base_model_name_or_path": "planted"}, truth[name])
            if rslora and k % 2:
                state_as_rslora(Path(folder) / "mixed" / name / CONFIG)
        adapters = open_adapters([Path(folder) / "mixed"])
        loaded = adapters.load()
    held = {m: [_double(truth[name][m]) for name in adapters.names] for m in adapters.modules}
    read, exact = CLAIR(seed=seed).fit(loaded), CLAIR(seed=seed).fit(held)
    rows = []
    for module, updates in held.items():
        if not exact.modules[module].is_refined:
            continue
        dense = dense_refined(torch.stack([u.dense() for u in updates]), exact.benign, exact.modules[module].rank)
        own, best = read.modules[module], exact.modules[module]
        rounded = LowRank(_as(best.common_part.B, dtype), _as(best.common_part.A, dtype))
        found = [exact_update(own.basis, own.common_part, _double(u), a) for u, a in zip(loaded[module], own.sizes.tolist(), strict=True)]
        expected = [exact_update(_as(best.basis, dtype), rounded, u, a) for u, a in zip(updates, best.sizes.tolist(), strict=True)]
        errors = [_largest_error(refined, dense, exact.benign) for refined in (found, expected)]
        rows.append({"module": module, "error": errors[0], "rounding": errors[1]})
    return {"exactness": rows}


def dense_refined(X: Tensor, benign: Tensor, rank: int) -> Tensor:
    """Return P X_k + P_perp M (K, p, q), from the eigenvectors of the dense scatter matrix of the benign clients."""
    frame = fit_frame(X, torch.ones(len(X), dtype=X.dtype), benign, rank)
    return X - project_out(frame.basis, X - frame.mean)


def _largest_error(refined: Sequence[LowRank], dense: Tensor, benign: Tensor) -> float:
    own = torch.stack([update.dense() for update in refined])
    return float((torch.linalg.matrix_norm(own - dense) / torch.linalg.matrix_norm(dense))[benign].max())


def _mixed_clients(folder: Path, plan: Plan, ranks: Sequence[int], shape: tuple[int, int]) -> dict[str, dict[str, Any]]:
    """Return client -> module -> update, in the files' dtype.

    All clients are planted once at every rank; each update of a client is taken at one of these ranks.
    """
    by_rank = {}
    for rank in ranks:
        place = folder / f"rank_{rank}"
        synthesise(place, replace(plan, rank=rank), shape=shape, layers=2)
        by_rank[rank] = open_adapters([place / CLIENTS]).load()
    clients: dict[str, dict[str, Any]] = {}
    for k, name in enumerate(plan.names()):
        for i, module in enumerate(by_rank[ranks[0]]):
            rank = ranks[(k + (i if k % 3 == 0 else 0)) % len(ranks)]
            clients.setdefault(name, {})[module] = by_rank[rank][module][k]
    return clients


def state_as_rslora(path: Path) -> None:
    """Rewrite an adapter config so that rsLoRA's scale alpha / sqrt(rho) equals the old scale."""
    config = json.loads(path.read_text())
    own = {key: config["rank_pattern"].get(key, config["r"]) for key in config["alpha_pattern"]}
    config["alpha_pattern"] = {key: config["alpha_pattern"][key] / rank**0.5 for key, rank in own.items()}
    config |= {"use_rslora": True, "lora_alpha": config["lora_alpha"] / config["r"] ** 0.5}
    path.write_text(json.dumps(config))


def _double(update: LowRank) -> LowRank:
    return replace(update, B=update.B.double(), A=update.A.double())


def _as(values: Tensor, dtype: str) -> Tensor:
    return values.to(getattr(torch, dtype))


def _shapes(sizes: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    return module_shapes(*(sizes.get(name) for name in ("model", "shape", "modules", "layers")))


def bench_study(*, seed: int, scratch: Path, cache: Path | None = None, **setting: Any) -> pd.DataFrame:
    """Run ``bench_cell`` for one setting; one row per device and number of processes."""
    cells = [{**setting, "seed": seed}]
    return sweep(bench_cell, cells, shared={"scratch": str(scratch)}, cache=cache)["bench"].drop(columns=list(cells[0]))


def verdict_study(setting: Mapping[str, Any], draws: int, *, seed: int, scratch: Path, **how: Any) -> pd.DataFrame:
    """Run ``verdict_cell`` for ``VERDICTS`` over seeds; ``how`` goes to ``sweep``, here and below: cache, jobs."""
    cells = [{**point, **setting, "seed": s} for point in VERDICTS for s in range(seed, seed + draws)]
    return sweep(verdict_cell, cells, shared={"scratch": str(scratch)}, **how)["verdicts"]


def exactness_study(
    ranks: Sequence[Sequence[int]], setting: Mapping[str, Any], draws: int, *, seed: int, scratch: Path, **how: Any
) -> pd.DataFrame:
    """Run ``exactness_cell`` for lists of ranks, without and with rsLoRA, in float64 and bfloat16, over seeds."""
    kinds = itertools.product(map(list, ranks), (False, True), ("float64", "bfloat16"), range(seed, seed + draws))
    cells = [{"ranks": own, "rslora": rs, "dtype": dtype, **setting, "seed": s} for own, rs, dtype, s in kinds]
    return sweep(exactness_cell, cells, shared={"scratch": str(scratch)}, **how)["exactness"]


def growth_study(
    points: Mapping[str, Iterable[int]], base: Mapping[str, int], repeats: int, *, seed: int, scratch: Path, **how: Any
) -> pd.DataFrame:
    """Run ``growth_cell`` with each parameter of ``base`` at its ``points`` and the others as in ``base``."""
    cells = [
        {"along": name, **base, name: value, "seed": s}
        for name, values in points.items()
        for value in sorted({*values, base[name]})
        for s in range(seed, seed + repeats)
    ]
    return sweep(growth_cell, cells, shared={"scratch": str(scratch)}, **how)["growth"]


def exponents(growth: pd.DataFrame) -> pd.DataFrame:
    """Fit the slope of log seconds and of log memory on the log of the growing parameter.

    The fit is ordinary least squares; each slope has its interval.
    """
    rows = []
    for along, part in growth.groupby("along", sort=False):
        for of in ("align_seconds", "memory_gb"):
            slope, low, high = slope_interval(part[along], part[of], LEVEL)
            rows.append({"along": along, "of": of, "exponent": slope, "low": low, "high": high})
    return pd.DataFrame(rows)


def summary_of_verdicts(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Summarise each kind: rate of exact sets, least contaminated score and largest benign score."""
    by = verdicts.groupby(["kind", "share", "in_common", "times"], sort=False)
    how = {"draws": ("exact", "size"), "exact": ("exact", "mean"), "contaminated": ("contaminated", "first")}
    how |= {"distance": ("distance", "first"), "flagged": ("flagged", "mean"), "least_bad": ("least_bad", "min")}
    return by.agg(**how, most_benign=("most_benign", "max"), rank=("rank", "max")).reset_index()
