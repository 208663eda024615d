"""Measures of a verdict against the truth, angles between clients' subspaces, and the error of the benign clients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from clairlib import ClairResult
from clairlib.core.seeds import derive
from clairlib.reproduce.sweep import Rows
from clairlib.simulate import Planted


def verdict(table: pd.DataFrame) -> dict[str, float]:
    """Compare one verdict with the truth: precision, recall, AUC and exactness.

    ``table`` has one row per client and the columns score, flagged, contaminated. Undefined values are NaN.
    """
    truth = table.contaminated.to_numpy(dtype=bool)
    flagged, scores = table.flagged.to_numpy(dtype=bool), table.score.to_numpy(dtype=float)
    hits, wrong = int((flagged & truth).sum()), int((flagged != truth).sum())
    return {
        "flagged": int(flagged.sum()),
        "hits": hits,
        "precision": hits / flagged.sum() if flagged.any() else float("nan"),
        "recall": hits / truth.sum() if truth.any() else float("nan"),
        "auc": auc(scores[~truth], scores[truth]) if truth.any() else float("nan"),
        "wrong": wrong,
        "exact": wrong == 0,
    }


def auc(low: np.ndarray, high: np.ndarray) -> float:
    """Return the probability that a contaminated client (``high``) scores above a benign one (``low``).

    Ties count one half.
    """
    return float(stats.mannwhitneyu(high, low).statistic) / (len(low) * len(high))


def angle_rows(X: Tensor, benign: Tensor, rank: int, *, seed: int) -> Rows:
    """Measure the principal angles, in degrees, between the leading column spaces of two clients' own updates.

    Each column space has ``rank`` dimensions. Pairs are grouped by kind; the kind "random" is pairs of independent
    random subspaces. One row per kind and angle: mean (``degrees``) and standard deviation (``spread``) over pairs.
    """
    noise = torch.randn(X.shape, generator=derive(seed, "random subspaces"), dtype=X.dtype)
    angles = {name: _angles(stack, rank) for name, stack in (("clients", X), ("random", noise))}  # (K, K, rank)
    apart = ~torch.eye(len(X), dtype=torch.bool)
    pairs = {
        "benign, benign": angles["clients"][benign[:, None] & benign & apart],
        "benign, contaminated": angles["clients"][benign[:, None] & ~benign],
        "contaminated, contaminated": angles["clients"][~benign[:, None] & ~benign & apart],
        "random": angles["random"][apart],
    }
    return [
        {"pair": pair, "angle": i + 1, "degrees": values[:, i].mean().item(), "spread": values[:, i].std().item()}
        for pair, values in pairs.items()
        if len(values)
        for i in range(rank)
    ]

def _angles(X: Tensor, rank: int) -> Tensor:
    """Return principal angles (K, K, rank), ascending.

    They are computed from cosines, which is accurate enough because no angle between different clients is near zero.
    """
    U = torch.linalg.svd(X, full_matrices=False).U[..., :rank]  # (K, p, rank)
    cosines = torch.linalg.svdvals(torch.einsum("jpa,kpb->jkab", U, U))
    return cosines.clamp(max=1.0).acos().rad2deg()


def benign_error(updates: Tensor, truth: Planted) -> float:
    """Return the mean squared Frobenius error of the benign clients' updates against their targets."""
    return float((updates - truth.targets)[truth.benign].square().sum(dim=(1, 2)).mean())


def verdict_row(result: ClairResult, benign: Tensor) -> dict[str, Any]:
    """Apply `verdict` to a result and add the fraction of benign clients flagged; ``benign`` (K,) is the truth."""
    row = verdict(pd.DataFrame({"score": result.scores, "flagged": ~result.benign, "contaminated": ~benign}))
    return row | {"benign_flagged": float((~result.benign)[benign].double().mean())}


def detection_rows(result: ClairResult, benign: Tensor) -> Rows:
    """Return one row per client: its score, the verdict, and the truth ``benign`` (K,)."""
    clients = zip(result.names, result.scores.tolist(), result.benign.tolist(), benign.tolist(), strict=True)
    return [
        {"client": name, "score": score, "flagged": not found, "contaminated": not ok}
        for name, score, found, ok in clients
    ]


def wrong_sides(result: ClairResult, benign: Tensor) -> dict[str, Any]:
    """Count missed contaminated clients and flagged benign ones, and check whether the set is exact.

    ``benign`` (K,) is the truth.
    """
    missed, flagged = int((result.benign & ~benign).sum()), int((~result.benign & benign).sum())
    return {"exact": missed + flagged == 0, "missed": missed, "false_alarms": flagged}
