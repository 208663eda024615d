"""What is asked of a verdict, told the truth; angles between clients; the error of the benign."""

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
    """Precision, recall, AUC and exactness of one verdict; columns score, flagged, contaminated."""
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
    """Chance that a contaminated client (``high``) scores above a benign one (``low``); ties count one half."""
    return float(stats.mannwhitneyu(high, low).statistic) / (len(low) * len(high))


def angle_rows(X: Tensor, benign: Tensor, rank: int, *, seed: int) -> Rows:
    """Principal angles, degrees, between the leading column spaces of two clients' own updates, by kind of pair.

    Column spaces of ``rank`` directions each; "random" are as many subspaces with nothing in common. A row a kind and
    angle: mean and standard deviation over pairs.
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
    """Principal angles (K, K, rank), ascending; from cosines, as none between different clients is near zero."""
    U = torch.linalg.svd(X, full_matrices=False).U[..., :rank]  # (K, p, rank)
    cosines = torch.linalg.svdvals(torch.einsum("jpa,kpb->jkab", U, U))
    return cosines.clamp(max=1.0).acos().rad2deg()


def benign_error(updates: Tensor, truth: Planted) -> float:
    """Mean squared Frobenius error of the benign clients' updates against their targets."""
    return float((updates - truth.targets)[truth.benign].square().sum(dim=(1, 2)).mean())


def verdict_row(result: ClairResult, benign: Tensor) -> dict[str, Any]:
    """`verdict` on a result, told who is benign (K,), and the share of benign clients that it flags."""
    row = verdict(pd.DataFrame({"score": result.scores, "flagged": ~result.benign, "contaminated": ~benign}))
    return row | {"benign_flagged": float((~result.benign)[benign].double().mean())}


def detection_rows(result: ClairResult, benign: Tensor) -> Rows:
    """Score and verdict of every client beside the truth (K,)."""
    clients = zip(result.names, result.scores.tolist(), result.benign.tolist(), benign.tolist(), strict=True)
    return [
        {"client": name, "score": score, "flagged": not found, "contaminated": not ok}
        for name, score, found, ok in clients
    ]


def wrong_sides(result: ClairResult, benign: Tensor) -> dict[str, Any]:
    """Contaminated clients missed, benign ones flagged, and whether the set is exact; told who is benign (K,)."""
    missed, flagged = int((result.benign & ~benign).sum()), int((~result.benign & benign).sum())
    return {"exact": missed + flagged == 0, "missed": missed, "false_alarms": flagged}
