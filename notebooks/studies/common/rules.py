"""Names of the methods that tables and figures compare, and what aggregation rules and oracles send back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clairlib.baselines import AGGREGATORS, aggregate
from clairlib.linalg.low_rank import as_dense
from clairlib.recovery.frame import fit_frame
from clairlib.recovery.refinement import refined_core

Held = Mapping[str, Sequence[Any] | Tensor]  # module name -> one update a client

STOPPED, UNTRUNCATED = "local, early-stopped", "CLAIR, not truncated"
TOLD_RANK, TOLD_SUBSPACE = "CLAIR, told S and r", "CLAIR, told S and P"
OWN = "contaminated, own update"  # a contaminated client that keeps what it has trained
FACTOR_RULES = ("FedAvg, factors", "FedSA")  # take adapters only
ABLATION = "entrywise RPCA, personal"  # this project's own, no published rule
TOLD_NOTHING = [name for name, rule in AGGREGATORS.items() if not rule.told and name != ABLATION]


def told(benign: Tensor, rank: int | None) -> dict[str, Any]:
    """The truth, as `aggregate` takes it: each rule uses what it must be told."""
    return {"contaminated": int((~benign).sum()), "benign": benign, "rank": rank}


def server_updates(
    updates: Held, benign: Tensor, rank: int | None = None, rules: Sequence[str] = tuple(AGGREGATORS)
) -> dict[str, Held]:
    """What each rule sends to every client, by module, and ``base``, which nobody has trained.

    ``updates``: module name -> K updates, dense (K, p, q) or LowRank. Rules that take factors are left out for dense
    ones. ``benign`` (K,) and ``rank`` are told to rules that must be told.
    """
    dense = all(isinstance(own, Tensor) for own in updates.values())
    truth = told(benign, rank)
    methods: dict[str, Held] = {"base": {name: 0 * own for name, own in as_dense(updates).items()}}
    for rule in rules:
        if not (dense and rule in FACTOR_RULES):
            methods[rule] = aggregate(rule, updates, **truth)
    return methods


def oracle_updates(dense: Mapping[str, Tensor], benign: Tensor, rank: int) -> dict[str, Tensor]:
    """Refined updates of an oracle that is told the benign clients and the rank of every module; (K, p, q) each."""
    ones = torch.ones(len(benign), dtype=torch.float64)
    return {name: refined_core(X, fit_frame(X, ones, benign, rank)) for name, X in dense.items()}


def is_common(method: str) -> bool:
    """Does every client get the same update?"""
    return method == "base" or (method in AGGREGATORS and not AGGREGATORS[method].personal)
