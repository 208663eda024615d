"""Exact recovery without noise (notebook 02): success of every method, and where a proof guarantees it.

A method succeeds where it finds the subspace and, if it names contaminated clients, exactly these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from clairlib.baselines import subspaces as robust_subspace
from clairlib.core.seeds import derive
from clairlib.linalg.subspace import sin_theta
from clairlib.recovery.consensus import consensus
from clairlib.recovery.convex import Decomposition, decompose
from clairlib.reproduce.sweep import Rows, sweep
from clairlib.simulate import Planted, planted
from clairlib.theory import exact_recovery as theory
from studies.common.intervals import rate_interval

GAP = 1e-8  # relative duality gap of every solve
SINE = 1e-4  # largest sine of an exact subspace; ``GAP`` guarantees it where the proof holds by ``MARGIN``
MARGIN = 0.02  # a proof counts when its two numbers are at least this far from 1
FACTORS = tuple(float(f) for f in 2.0 ** np.arange(-1.0, 1.01, 0.25))  # weights over the certified one

PEERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "block FMS": robust_subspace.block_fms,
    "Tyler": robust_subspace.tyler,
    "Tyler, pairs": lambda X, rank: robust_subspace.tyler(robust_subspace.pair_differences(X), rank),
    "outlier pursuit": robust_subspace.outlier_pursuit,
    "outlier pursuit, centred": lambda X, rank: robust_subspace.outlier_pursuit(robust_subspace.centre(X), rank),
    "median + PCA": robust_subspace.median_pca,
    "PCA": robust_subspace.pca,
}
CONVEX = ("convex, 3/7 rule", "convex, log rule", "convex, window", "convex, certified")
METHODS = ("consensus", *CONVEX, "block FMS", "Tyler, pairs", "outlier pursuit, centred", "median + PCA", "PCA")
WITHOUT_COMMON = ("consensus", "convex, log rule", "convex, certified", "block FMS", "Tyler", "outlier pursuit")


def weight(method: str, truth: Planted, certified: float) -> float:
    """Return the weight lam of a convex method: a rule's, the middle of the planted window, or the certified weight."""
    K, bad = len(truth.updates), int((~truth.benign).sum())
    low, high = planted_window(truth)
    return {
        "convex, 3/7 rule": 3 / (7 * math.sqrt(bad)),  # 3 / (7 sqrt(share K))
        "convex, log rule": 1 / math.sqrt(math.log(K)),
        "convex, window": math.sqrt(low * high),
        "convex, certified": certified,
    }[method]


def planted_window(truth: Planted) -> tuple[float, float]:
    """Return ``theory.lambda_window`` for the planted decomposition.

    The planted contamination of a contaminated client is its whole deviation from the benign mean.
    """
    return window_of(truth, theory.lambda_window)


def window_of(truth: Planted, window: Callable[[Tensor, Tensor], tuple[float, float]]) -> tuple[float, float]:
    """Return a window in closed form, such as ``theory.balanced_window``, at the planted decomposition."""
    centred = truth.updates - truth.updates[truth.benign].mean(dim=0)
    benign = truth.benign[:, None, None]
    return window(torch.where(benign, centred, 0.0), torch.where(benign, 0.0, centred))


def convex_row(truth: Planted, found: Decomposition) -> dict[str, Any]:
    """Measure a solution's errors: sine of the subspace, and whether it names exactly the contaminated clients.

    A client is named when the norm of its contamination block exceeds ``theory.NEGLIGIBLE`` times the largest such
    norm.
    """
    basis = robust_subspace.leading_basis(found.low_rank, truth.rank)
    sizes = torch.linalg.matrix_norm(found.contamination)
    named = sizes > theory.NEGLIGIBLE * sizes.max()
    row = _row(truth, basis, ~named)
    return row | {"lam": found.lam, "gap": found.certificate.relative_gap, "iterations": found.certificate.iterations}


def _row(truth: Planted, basis: Tensor, benign: Tensor | None) -> dict[str, Any]:
    """Build a result row; ``exact`` needs an exact subspace and, where the method names a set, the exact set."""
    sine = sin_theta(basis, truth.basis)
    exact_set = None if benign is None else bool(torch.equal(benign, truth.benign))
    return {"sine": sine, "exact_set": exact_set, "exact": sine <= SINE and exact_set is not False}


def run_method(method: str, truth: Planted, certified: float, seed: int) -> dict[str, Any]:
    """Run one method on one draw. Peers and ``convex`` methods are told the rank; ``consensus`` is told nothing."""
    X = truth.updates
    if method in PEERS:
        return _row(truth, PEERS[method](X, truth.rank), None)
    if method == "consensus":
        frame = consensus(X, torch.ones(len(X), dtype=X.dtype), generator=derive(seed, "tuples"))
        return _row(truth, frame.basis, frame.members)
    return convex_row(truth, decompose(X, lam=weight(method, truth, certified), tolerance=GAP))


def phase_cell(
    contamination: str, share: float, rank: int, common: float, draws: int, methods: list[str], seed: int, **size: int
) -> dict[str, Rows]:
    """Run every method on noiseless draws (table "recovery"), and try to prove exact recovery of each ("proofs")."""
    tables: dict[str, Rows] = {"recovery": [], "proofs": []}
    for draw in range(draws):
        truth = draw_clients(contamination, share, rank, common, draw, seed, **size)
        certified, proof = prove(truth)
        tables["proofs"].append({"draw": draw, **proof})
        for method in methods:
            tables["recovery"].append({"draw": draw, "method": method, **run_method(method, truth, certified, seed)})
    return tables


def draw_clients(
    kind: str, share: float, rank: int, common: float, draw: int, seed: int, p: int, q: int, K: int
) -> Planted:
    """Draw noiseless clients (K, p, q) of a cell; the same numbers give the same clients."""
    generator = derive(seed, "phase", kind, str(share), rank, str(common), draw)
    return planted(kind, share=share, K=K, p=p, q=q, r=rank, noise_std=0.0, common_norm=common, generator=generator)


def prove(truth: Planted) -> tuple[float, dict[str, Any]]:
    """Return the certified weight, and a row with its recovery certificate and the ends of the planted window."""
    certified = theory.certified_weight(truth.updates, truth.benign, truth.basis)
    proof = theory.recovery_certificate(truth.updates, truth.benign, truth.basis, certified)
    low, high = planted_window(truth)
    row: dict[str, Any] = {"certified": certified, "necessary": proof.necessary}
    row |= {"spectral": proof.spectral, "block": proof.block}
    row |= {"verdict": proof.verdict(MARGIN), "margin": max(proof.spectral, proof.block)}
    row |= {"low": low, "high": high, "ratio": high / low}
    low, high = window_of(truth, theory.balanced_window)
    return certified, row | {"balanced": high / low}


def phase_study(
    shares: dict[str, Sequence[float]],
    ranks: Sequence[int],
    draws: int,
    *,
    common: float = 1.0,
    methods: Sequence[str] = METHODS,
    size: tuple[int, int, int] = (20, 10, 20),
    seed: int = 0,
    cache: Path | None = None,
    jobs: int = 1,
) -> dict[str, pd.DataFrame]:
    """Run ``phase_cell`` over kinds of contamination, contaminated fractions and ranks; ``size`` is (p, q, K)."""
    cells = cells_of(shares, ranks, size, draws=draws, common=common, methods=list(methods), seed=seed)
    return sweep(phase_cell, cells, cache=cache, jobs=jobs)


def cells_of(shares: dict[str, Any], ranks: Sequence[int], size: tuple[int, ...], **fixed: Any) -> list[dict[str, Any]]:
    """Return the parameters of every cell: kind, contaminated fraction, rank, ``size`` (p, q, K) and ``fixed`` ones."""
    fixed |= dict(zip("pqK", size, strict=True))
    return [
        {"contamination": kind, "share": share, "rank": rank, **fixed}
        for kind, levels in shares.items()
        for share in levels
        for rank in ranks
    ]


def weight_cell(
    contamination: str, share: float, rank: int, common: float, draws: int, seed: int, **size: int
) -> dict[str, Rows]:
    """Solve the convex program at weights around the certified one; each row has its certificate's verdict."""
    rows = []
    for draw in range(draws):
        truth = draw_clients(contamination, share, rank, common, draw, seed, **size)
        certified, _ = prove(truth)
        low, high = planted_window(truth)
        for factor in FACTORS:
            lam = factor * certified
            proof = theory.recovery_certificate(truth.updates, truth.benign, truth.basis, lam)
            row: dict[str, Any] = {"draw": draw, "factor": factor, "spectral": proof.spectral, "block": proof.block}
            row |= {"verdict": proof.verdict(MARGIN), "inside": low < lam < high}
            rows.append(row | convex_row(truth, decompose(truth.updates, lam=lam, tolerance=GAP)))
    return {"weights": rows}


def weight_study(
    shares: dict[str, Sequence[float]],
    ranks: Sequence[int],
    draws: int,
    *,
    common: float = 1.0,
    size: tuple[int, int, int] = (20, 10, 20),
    seed: int = 0,
    cache: Path | None = None,
    jobs: int = 1,
) -> pd.DataFrame:
    """Run ``weight_cell`` over kinds, contaminated fractions and ranks, on the draws of ``phase_study``."""
    cells = cells_of(shares, ranks, size, draws=draws, common=common, seed=seed)
    return sweep(weight_cell, cells, cache=cache, jobs=jobs)["weights"]


DUAL_CASES = {"window open": (0.2, 1), "weight too small": (0.2, 0.6), "too large": (0.2, 1.8), "no window": (0.45, 1)}


def dual_cases(seed: int, size: tuple[int, int, int] = (20, 10, 20)) -> dict[str, pd.DataFrame]:
    """Compute the dual multipliers Y of solves that recover exactly and of solves that do not.

    The clients contain a coalition of rank 2. ``DUAL_CASES`` gives the contaminated fraction and the weight, as a
    multiple of the certified one. Table "values": singular values of [Y_1 .. Y_K], and the norm ||Y_k||_F / lam of
    every client. Table "summary": one row per case.
    """
    values, summary = [], []
    for case, (share, factor) in DUAL_CASES.items():
        truth = draw_clients("coalition", share, 2, 1.0, 0, seed, *size)
        lam = factor * theory.certified_weight(truth.updates, truth.benign, truth.basis)
        found = decompose(truth.updates, lam=lam, tolerance=GAP)
        spectrum = torch.linalg.svdvals(found.dual.permute(1, 0, 2).flatten(1))
        norms = torch.linalg.matrix_norm(found.dual) / lam
        values.append(pd.DataFrame({"case": case, "part": "singular value", "value": spectrum}))
        values.append(pd.DataFrame({"case": case, "part": "block norm", "value": norms, "benign": truth.benign}))
        row: dict[str, Any] = {"case": case, "share": share, "sum of Y": float(found.dual.sum(dim=0).norm())}
        summary.append(row | {"at one": int((spectrum > 1 - 1e-4).sum())} | convex_row(truth, found))
    return {"values": pd.concat(values, ignore_index=True), "summary": pd.DataFrame(summary)}


CELL = ["contamination", "share", "rank", "common"]


def summarise_phase(recovery: pd.DataFrame) -> pd.DataFrame:
    """Summarise each cell and method: rates of exact draws (Wilson interval) and sets, median sine, largest gap."""
    rows = []
    for key, cell in recovery.groupby([*CELL, "method"], sort=False):
        rate, low, high = rate_interval(int(cell.exact.sum()), len(cell))
        row = dict(zip([*CELL, "method"], key, strict=True)) | {"draws": len(cell), "exact": rate}
        named = cell.exact_set.dropna()
        row |= {"low": low, "high": high, "exact_set": float(named.mean()) if len(named) else math.nan}
        rows.append(row | {"sine": cell.sine.median(), "gap": cell.gap.max()})
    return pd.DataFrame(rows)


def identifiable(cells: pd.DataFrame, K: int) -> pd.Series:
    """Return the cells to which Statement 1 applies.

    It needs two benign clients, and against a coalition more benign clients than the coalition has members.
    """
    bad = (cells.share * K).round()
    limit = np.where(cells.contamination == "coalition", K - bad > bad, K - bad >= 2)
    return pd.Series(limit, index=cells.index)


def with_proofs(tables: dict[str, pd.DataFrame], method: str = "convex, certified") -> pd.DataFrame:
    """Join the proofs with the results of one method; one row per draw."""
    found = tables["recovery"].query("method == @method")
    columns = [*CELL, "draw", "sine", "exact_set", "exact", "gap"]
    return tables["proofs"].merge(found[columns], on=[*CELL, "draw"])


def proved_cells(joined: pd.DataFrame) -> pd.DataFrame:
    """Count, in each cell that has any, the draws proved exact and the fraction of them recovered exactly."""
    cells = joined[joined.verdict == "exact"].groupby(CELL, sort=False)
    return cells.agg(proved=("exact", "size"), exact=("exact", "mean"), sine=("sine", "max")).reset_index()


def by_verdict(joined: pd.DataFrame, by: str = "verdict") -> pd.DataFrame:
    """Count draws and exact recoveries (Wilson interval) by the certificate's verdict, or by another column."""
    rows = []
    for value, group in joined.groupby(by):
        rate, low, high = rate_interval(int(group.exact.sum()), len(group))
        row: dict[str, Any] = {by: value, "draws": len(group), "exact": rate, "low": low, "high": high}
        row |= {"found": int(group.exact.sum()), "exact_set": float(group.exact_set.astype(float).mean())}
        rows.append(row | {"sine": group.sine.median()})
    return pd.DataFrame(rows)


def predictors(joined: pd.DataFrame) -> pd.DataFrame:
    """Compare predictors of exact recovery: rate of exact draws where the predictor says yes, and where it says no.

    ``right`` is the fraction of draws that the predictor classifies correctly.
    """
    says = {
        "planted window open": joined.ratio > 1,
        "balanced window open": joined.balanced > 1,
        "certificate holds": joined.margin < 1,
    }
    rows = []
    for name, yes in says.items():
        row: dict[str, Any] = {"predictor": name, "yes": int(yes.sum()), "exact where yes": joined.exact[yes].mean()}
        row |= {"no": int((~yes).sum()), "exact where no": joined.exact[~yes].mean()}
        rows.append(row | {"right": float((yes == joined.exact).mean())})
    return pd.DataFrame(rows)


def window_limits(proofs: pd.DataFrame) -> pd.DataFrame:
    """Find the contaminated fraction at which the median draw's window closes, by kind and rank; NaN where none does.

    Values are interpolated linearly between the fractions that were run. At ``certified`` the certificate's margin
    reaches 1; at ``planted`` the ratio of the planted window's ends does.
    """
    rows = []
    for (kind, rank), part in proofs.groupby(["contamination", "rank"], sort=False):
        middle = part.groupby("share")[["margin", "ratio"]].median()
        row = {"contamination": kind, "rank": rank, "certified": crossing(middle.index, np.log(middle.margin))}
        rows.append(row | {"planted": crossing(middle.index, -np.log(middle.ratio))})
    return pd.DataFrame(rows)


def crossing(shares: Sequence[float], values: Sequence[float]) -> float:
    """Return the first place where the values rise through zero, by linear interpolation; NaN where they never do."""
    x, y = np.asarray(shares, dtype=float), np.asarray(values, dtype=float)
    above = np.flatnonzero(y >= 0)
    if len(above) == 0:
        return math.nan
    i = int(above[0])
    return float(x[0] if i == 0 else x[i - 1] + (x[i] - x[i - 1]) * -y[i - 1] / (y[i] - y[i - 1]))


def worst_cell(summary: pd.DataFrame, K: int) -> pd.DataFrame:
    """Summarise each method over identifiable cells: least and mean rate of exact draws, cells always exact."""
    cells = summary[identifiable(summary, K)].assign(always=lambda table: table.exact == 1)
    rates = cells.groupby("method", sort=False)
    table = rates.agg(worst=("exact", "min"), mean=("exact", "mean"), always=("always", "sum"), cells=("exact", "size"))
    return table.reset_index()
