"""A second reading of the decomposition (notebook 02): the program on blocks of client pairs, beside that on clients.

    minimise  || [L_jk]_{j<k} ||_* + lam sum_{j<k} ||S_jk||_F   subject to  X_j - X_k = L_jk + S_jk.

Its dual, which certifies a solve, is to maximise sum_{j<k} <Y_jk, X_j - X_k> over ||[Y_jk]||_2 <= 1 and ||Y_jk||_F <=
lam. A pair with S_jk = 0 is called clean. Differences cancel the common part, so the program has none. Both programs
are this project's reconstructions from the abstract of arXiv:2605.21217. Which of them the paper solves, if any, we do
not know.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from clairlib.baselines.subspaces import leading_basis, pair_differences
from clairlib.linalg.subspace import sin_theta
from clairlib.recovery.convex import Decomposition, decompose, lambda_window
from clairlib.reproduce.sweep import Rows, sweep
from clairlib.simulate import Planted
from clairlib.theory import exact_recovery as theory
from studies.common.intervals import rate_interval
from studies.exact_recovery import study

CLIENTS, PAIRS = "client blocks", "pair blocks"
READING = [*study.CELL, "reading"]
EASY = ("unstructured", 0.25, 2, 1.0)  # kind, contaminated fraction, rank and common part of the draws that are timed


def both_of_pair(clients: Tensor) -> Tensor:
    """Return for every pair j < k, in the order of ``pair_differences``, whether ``clients`` (K,) bool has both."""
    first, second = torch.triu_indices(len(clients), len(clients), offset=1)
    return clients[first] & clients[second]


def pair_window(low_rank: Tensor, contamination: Tensor) -> tuple[float, float]:
    """Return the window of weights lam for pair blocks, in closed form, from a decomposition of the clients.

        low = max_{j, k in S} ||V_j - V_k||_F / sqrt(s),   high = 1 / || [sqrt(s) c_k .., c_kl ..] ||_2

    with k, l not in S, c_k = C_k / ||C_k||_F, c_kl = (C_k - C_l) / ||C_k - C_l||_F, s the number of benign clients S,
    and [V_1 .. V_K] the right singular vectors of [L_1 .. L_K]. low and high are dimensionless. Arguments are as for
    `theory.balanced_window`: ``low_rank`` (K, p, q) has mean zero over S and is 0 off it, ``contamination`` (K, p, q)
    is 0 on S. Without contaminated clients high is inf.

    Derivation (ours). It is `lambda_window` of the blocks L_j - L_k for j, k in S and C_j - C_k for all other pairs.
    Low: sum_{j<k in S} (L_j - L_k)(L_j - L_k)' = s sum_S L_k L_k', so V_jk = (V_j - V_k) / sqrt(s). High: each of the s
    pairs of k with S has the direction c_k. No condition sum_k Y_k = 0 is left out, as the program has no common part.
    So the window is exact, not only necessary, in the limit of large C_k off the subspace. A finite C_k leaves a part
    of L_j in L_jk, j in S, and both ends are approximate; then `Reading.proof` decides.
    """
    benign = ~contamination.flatten(1).any(1)
    clean = both_of_pair(benign)[:, None, None]
    return lambda_window(pair_differences(low_rank) * clean, pair_differences(contamination) * ~clean)


def linked_clients(clean: Tensor, K: int) -> Tensor:
    """Read the benign clients (K,) bool off the clean pairs (K (K-1) / 2,) bool: the largest group that they link.

    Reason: exact recovery makes all pairs within S clean and no pair of S with another client, so S is a group of its
    own. It stays one when a weight too small spoils some pairs within S, as long as the others still link it: a benign
    client needs one clean pair, not all. Contaminated clients that agree can form groups too. The largest group wins,
    and of equal ones that with the first client.
    """
    links = np.zeros((K, K), dtype=bool)
    links[np.triu_indices(K, 1)] = clean.numpy()
    _, group = connected_components(links, directed=False)
    return torch.from_numpy(group == np.bincount(group).argmax())


@dataclass(frozen=True)
class Reading:
    """One program: the ``blocks`` (B, p, q) that it decomposes, which of them are ``clean`` in truth, (B,) bool.

    ``window``: the ends of the closed-form window of its weight. ``with_common``: whether it has a common part.
    """

    truth: Planted
    blocks: Tensor
    clean: Tensor
    window: tuple[float, float]
    with_common: bool

    @classmethod
    def of_clients(cls, truth: Planted) -> Reading:
        """Blocks X_k and a common part: the program of Statement 2a."""
        return cls(truth, truth.updates, truth.benign, study.window_of(truth, theory.balanced_window), True)

    @classmethod
    def of_pairs(cls, truth: Planted) -> Reading:
        """Blocks X_j - X_k, j < k. Pairs of contaminated clients count as spoiled: no two may agree off U."""
        window = study.window_of(truth, pair_window)
        return cls(truth, pair_differences(truth.updates), both_of_pair(truth.benign), window, False)

    def _with_both_signs(self) -> tuple[Tensor, Tensor, float]:
        """Return blocks to which Statement 2a applies, their clean ones, and the factor from its weight to this one.

        Statement 2a has a common part M. For the blocks D and -D together M = 0 is optimal, by symmetry and convexity,
        and then ||[L, -L]||_* = sqrt(2) ||L||_* while the sum over blocks doubles: weight lam / sqrt(2) there is lam.
        """
        if self.with_common:
            return self.blocks, self.clean, 1.0
        return torch.cat([self.blocks, -self.blocks]), self.clean.repeat(2), math.sqrt(2)

    def certified_weight(self) -> float:
        """Return the weight at which the two numbers of the certificate are equal."""
        blocks, clean, factor = self._with_both_signs()
        return factor * theory.certified_weight(blocks, clean, self.truth.basis)

    def proof(self, lam: float) -> theory.RecoveryCertificate:
        """Return the certificate of exact recovery at the weight ``lam``, before the program is solved."""
        blocks, clean, factor = self._with_both_signs()
        return theory.recovery_certificate(blocks, clean, self.truth.basis, lam / factor)

    def solve(self, lam: float) -> Decomposition:
        """Solve the program to the relative duality gap ``study.GAP``."""
        return decompose(self.blocks, lam=lam, with_common=self.with_common, tolerance=study.GAP)

    def measure(self, lam: float) -> dict[str, Any]:
        """Solve, and return a row: certificate, errors, iterations and seconds.

        ``exact_blocks``: exactly the clean blocks have no contamination. ``exact_set``: the benign clients are read off
        correctly. ``exact``: they are, and the sine is at most ``study.SINE``.
        """
        proof, start = self.proof(lam), time.perf_counter()
        found = self.solve(lam)
        seconds = time.perf_counter() - start
        sine = sin_theta(leading_basis(found.low_rank, self.truth.rank), self.truth.basis)
        sizes = torch.linalg.matrix_norm(found.contamination)
        clean = sizes <= theory.NEGLIGIBLE * sizes.max()
        benign = clean if self.with_common else linked_clients(clean, len(self.truth.updates))
        right = torch.equal(benign, self.truth.benign)
        row: dict[str, Any] = {"lam": lam, "spectral": proof.spectral, "block": proof.block}
        row |= {"verdict": proof.verdict(study.MARGIN), "inside": self.window[0] < lam < self.window[1]}
        row |= {"sine": sine, "exact_blocks": torch.equal(clean, self.clean), "exact_set": right}
        row |= {"exact": right and sine <= study.SINE, "seconds": seconds}
        return row | {"gap": found.certificate.relative_gap, "iterations": found.certificate.iterations}


def readings(truth: Planted) -> dict[str, Reading]:
    """Return both readings of the same clients, by name."""
    return {CLIENTS: Reading.of_clients(truth), PAIRS: Reading.of_pairs(truth)}


def reading_cell(
    contamination: str, share: float, rank: int, common: float, draws: int, factors: list[float], seed: int, **size: int
) -> dict[str, Rows]:
    """Solve both programs on the same draws, at multiples ("factor") of the certified weight of each."""
    rows = []
    for draw in range(draws):
        truth = study.draw_clients(contamination, share, rank, common, draw, seed, **size)
        for name, reading in readings(truth).items():
            certified = reading.certified_weight()
            low, high = reading.window
            for factor in factors:
                row = {"draw": draw, "reading": name, "factor": factor}
                row |= {"low": low / certified, "high": high / certified}
                rows.append(row | reading.measure(factor * certified))
    return {"readings": rows}


def reading_study(
    shares: dict[str, Sequence[float]],
    ranks: Sequence[int],
    draws: int,
    *,
    commons: Sequence[float] = (1.0, 0.0),
    factors: Sequence[float] = (1.0,),
    size: tuple[int, int, int] = (20, 10, 12),
    seed: int = 0,
    cache: Path | None = None,
    jobs: int = 1,
) -> pd.DataFrame:
    """Run ``reading_cell`` over norms of the common part, kinds, contaminated fractions, ranks; ``size``: (p, q, K)."""
    fixed = {"draws": draws, "factors": list(factors), "seed": seed}
    cells = [cell for common in commons for cell in study.cells_of(shares, ranks, size, common=common, **fixed)]
    return sweep(reading_cell, cells, cache=cache, jobs=jobs)["readings"]


def speed_cell(K: int, p: int, q: int, draws: int, seed: int) -> dict[str, Rows]:
    """Time both programs on the same easy draws, in the middle of the closed-form window of each."""
    rows = []
    for draw in range(draws):
        truth = study.draw_clients(*EASY, draw, seed, p=p, q=q, K=K)
        for name, reading in readings(truth).items():
            found = reading.measure(math.sqrt(math.prod(reading.window)))
            kept = {key: found[key] for key in ("exact", "iterations", "seconds", "gap")}
            rows.append({"draw": draw, "reading": name, "blocks": len(reading.blocks), **kept})
    return {"speed": rows}


def speed_study(
    clients: Sequence[int], draws: int, *, p: int, q: int, seed: int = 0, cache: Path | None = None
) -> pd.DataFrame:
    """Run ``speed_cell`` over numbers of clients, one after the other; return medians over draws.

    ``over_clients``: seconds of the reading over those of client blocks.
    """
    cells = [{"K": K, "p": p, "q": q, "draws": draws, "seed": seed} for K in clients]
    groups = sweep(speed_cell, cells, cache=cache)["speed"].groupby(["K", "reading", "blocks"], sort=False)
    table = groups.agg(
        exact=("exact", "mean"), iterations=("iterations", "median"), seconds=("seconds", "median"), gap=("gap", "max")
    ).reset_index()
    unit = table[table.reading == CLIENTS].set_index("K").seconds
    return table.assign(over_clients=table.seconds / table.K.map(unit))


def summarise(found: pd.DataFrame) -> pd.DataFrame:
    """Summarise each cell and reading: rates of proved and exact draws (Wilson interval), of sets and of blocks."""
    rows = []
    for key, cell in found.groupby(READING, sort=False):
        rate, low, high = rate_interval(int(cell.exact.sum()), len(cell))
        row = dict(zip(READING, key, strict=True)) | {"draws": len(cell), "proved": (cell.verdict == "exact").mean()}
        row |= {"exact": rate, "low": low, "high": high, "exact_set": cell.exact_set.mean()}
        row |= {"exact_blocks": cell.exact_blocks.mean(), "sine": cell.sine.median(), "gap": cell.gap.max()}
        rows.append(row | {"iterations": cell.iterations.median(), "seconds": cell.seconds.median()})
    return pd.DataFrame(rows)


def proved_exact(found: pd.DataFrame) -> float:
    """Return the rate of draws recovered exactly, blocks included, among those proved exact; its least over cells."""
    proved = found[found.verdict == "exact"]
    return float((proved.exact & proved.exact_blocks).groupby([proved[name] for name in READING]).mean().min())


def leads(summary: pd.DataFrame) -> pd.DataFrame:
    """Compare the readings in each cell: rates of exact draws and of exact sets, and pair blocks' lead in both."""
    wide = summary.pivot(index=study.CELL, columns="reading", values=["exact", "exact_set"])
    table = pd.DataFrame({f"{value}, {name}": wide[value, name] for value, name in wide.columns})
    for value in ("exact", "exact_set"):
        table[f"lead in {value}"] = wide[value, PAIRS] - wide[value, CLIENTS]
    return table.reset_index()


def predictors(found: pd.DataFrame) -> pd.DataFrame:
    """Return how often the closed-form window and the certificate say right whether a draw is exact, by reading."""
    rows = []
    for (common, name), part in found.groupby(["common", "reading"], sort=False):
        says = {"closed-form window open": part.low < part.high}
        says["certificate holds"] = part[["spectral", "block"]].max(axis=1) < 1
        for predictor, yes in says.items():
            row = {"common": common, "reading": name, "predictor": predictor, "yes": int(yes.sum())}
            rows.append(row | {"exact": int(part.exact.sum()), "right": float((yes == part.exact).mean())})
    return pd.DataFrame(rows)


def windows(weights: pd.DataFrame) -> pd.DataFrame:
    """Compare windows of the weight, as multiples of the certified weight ``lam``; medians over draws, by cell.

    ``low``, ``high``: closed form. ``proved_low``, ``proved_high``: where block and spectral are 1, by interpolation.
    ``found_low``, ``found_high``: least and largest weight tried at which every draw has exact blocks and subspace.
    ``set_low``, ``set_high``: the same for the benign clients alone.
    """
    rows = []
    for key, cell in weights.groupby(READING, sort=False):
        middle = cell.groupby("factor")[["spectral", "block", "low", "high", "lam"]].median()
        row = dict(zip(READING, key, strict=True)) | {"lam": middle.lam[1.0]}
        row |= {"low": middle.low[1.0], "high": middle.high[1.0]}
        row["proved_low"] = 2 ** -study.crossing(-np.log2(middle.index[::-1]), np.log(middle.block[::-1]))
        row["proved_high"] = 2 ** study.crossing(np.log2(middle.index), np.log(middle.spectral))
        for name, right in (("found", cell.exact & cell.exact_blocks), ("set", cell.exact_set.astype(bool))):
            always = right.groupby(cell.factor).all()
            row |= {f"{name}_low": always[always].index.min(), f"{name}_high": always[always].index.max()}
        rows.append(row)
    table = pd.DataFrame(rows)
    return table.assign(proved_width=table.proved_high / table.proved_low)
