"""Names of the methods that tables and figures compare, and the updates that aggregation rules and oracles return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clairlib.baselines import AGGREGATORS, aggregate
from clairlib.linalg.low_rank import LowRank, as_dense
from clairlib.linalg.refined_factors import exact_update
from clairlib.recovery.frame import fit_frame
from clairlib.recovery.refinement import refined_core
from clairlib.recovery.result import ClairResult

Held = Mapping[str, Sequence[Any] | Tensor]  # module name -> one update per client

STOPPED, UNTRUNCATED = "local, early-stopped", "CLAIR, not truncated"
TOLD_RANK, TOLD_SUBSPACE = "CLAIR, told S and r", "CLAIR, told S and P"
OWN = "contaminated, own update"  # a contaminated client under its own trained update
FACTOR_RULES = ("FedAvg, factors", "FedSA")  # rules that need adapter factors
ABLATION = "entrywise RPCA, personal"  # this project's own ablation, not a published rule
TOLD_NOTHING = [name for name, rule in AGGREGATORS.items() if not rule.told and name != ABLATION]


def told(benign: Tensor, rank: int | None) -> dict[str, Any]:
    """Return the ground truth as arguments of `aggregate`; each rule uses only what it must be told."""
    return {"contaminated": int((~benign).sum()), "benign": benign, "rank": rank}


def server_updates(
    updates: Held, benign: Tensor, rank: int | None = None, rules: Sequence[str] = tuple(AGGREGATORS)
) -> dict[str, Held]:
    """Return the updates that each rule sends to the clients, by method name and module name.

    ``updates``: module name -> K updates, dense (K, p, q) or LowRank. The method ``base`` is the base model without an
    update. Rules that need adapter factors are left out where all updates are dense. ``benign`` (K,) and ``rank`` are
    passed to the rules that must be told them.
    """
    dense = all(isinstance(own, Tensor) for own in updates.values())
    truth = told(benign, rank)
    methods: dict[str, Held] = {"base": {name: 0 * own for name, own in as_dense(updates).items()}}
    for rule in rules:
        if not (dense and rule in FACTOR_RULES):
            methods[rule] = aggregate(rule, updates, **truth)
    return methods


def oracle_updates(dense: Mapping[str, Tensor], benign: Tensor, rank: int) -> dict[str, Tensor]:
    """Return the refined updates (K, p, q), by module, of an oracle that is told the benign clients and the rank."""
    ones = torch.ones(len(benign), dtype=torch.float64)
    return {name: refined_core(X, fit_frame(X, ones, benign, rank)) for name, X in dense.items()}


def before_truncation(result: ClairResult, updates: Mapping[str, Sequence[LowRank]]) -> dict[str, list[LowRank]]:
    """Return CLAIR's refined updates by module before truncation; clients that keep their own have these."""
    benign = result.benign.tolist()
    return {
        name: [
            exact_update(module.basis, module.common_part, own, size) if ok and module.is_refined else own
            for own, ok, size in zip(updates[name], benign, module.sizes.tolist(), strict=True)
        ]
        for name, module in result.modules.items()
    }


def is_common(method: str) -> bool:
    """Return whether a method gives every client the same update."""
    return method == "base" or (method in AGGREGATORS and not AGGREGATORS[method].personal)
