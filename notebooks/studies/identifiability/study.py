"""Checks of Statement 1 on planted clients: what exact algebra determines, and how much of it CLAIR finds.

Statement 1 is this project's reconstruction (notebook 01), not the paper's (arXiv:2605.21217).
"""

from __future__ import annotations

from itertools import product
from math import exp, log
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from clairlib import CLAIR
from clairlib.core.seeds import derive
from clairlib.linalg.subspace import project_out, sin_theta
from clairlib.recovery.frame import fit_frame
from clairlib.recovery.refinement import refined_core
from clairlib.reproduce.sweep import Rows, sweep
from clairlib.simulate import Planted, planted
from clairlib.simulate.attacks import random_frame
from clairlib.theory.identifiability import (
    INSIDE_ATTACKS,
    RIVALS,
    attacked,
    chance_size,
    consensus_frames,
    difference_ranks,
    frame_through,
    identified_frame,
    moved_gauge,
    rivals,
    tuple_ranks,
    tuple_size,
)
from studies.common.intervals import mean_interval, rate_interval

Q, RANK = 10, 3
TINY, MODEST = 1e-3, 0.1  # noise levels: an entry's standard deviation times sqrt(q); signal rows have norm 1
TOLD_LEVEL = 0.01  # level of the test that is told P, M and the noise level


def rank_table(kinds: list[str], *, K: int = 12, share: float = 1 / 3, seed: int = 0) -> pd.DataFrame:
    """Tabulate the rank of Theta_j - Theta_k for all pairs of clients, benign clients first.

    Columns: contamination, first (j), second (k), benign (true where both clients are), rank.
    """
    rows: Rows = []
    for kind in kinds:
        truth = planted(kind, share=share, K=K, generator=derive(seed, "ranks", kind))
        order = (~truth.benign).long().argsort(stable=True)
        ranks, benign = difference_ranks(truth.targets[order]), truth.benign[order].tolist()
        for j, k in product(range(K), repeat=2):
            place = {"contamination": kind, "first": j, "second": k}
            rows.append({**place, "benign": benign[j] and benign[k], "rank": int(ranks[j, k])})
    return pd.DataFrame(rows)


def reveal_cell(contamination: str, q: int, draws: int, seed: int) -> dict[str, Rows]:
    """Check whether pairs, and tuples of ceil(r / q) + 1, of benign clients reveal the subspace; one row per draw.

    Eight of 12 clients are benign. ``pairs`` and ``tuples``: fraction of benign pairs and of benign tuples whose
    differences span exactly r directions. ``sin_theta``: largest error of a benign tuple's subspace. ``mixed``:
    smallest rank of a tuple with both benign and contaminated clients.
    """
    rows = []
    for draw in range(draws):
        generator = derive(seed, "reveal", contamination, q, draw)
        truth = planted(contamination, share=1 / 3, K=12, q=q, generator=generator)
        tuples = torch.combinations(torch.arange(12), tuple_size(RANK, q))
        inside = truth.benign[tuples].sum(dim=1)
        benign = tuples[inside == tuples.shape[1]]
        frames = [frame_through(truth.targets, clients) for clients in benign]
        mixed = tuples[(inside > 0) & (inside < tuples.shape[1])]
        row: dict[str, Any] = {"pairs": _share_of_rank(truth, torch.combinations(torch.arange(12), 2))}
        row |= {"tuples": _share_of_rank(truth, tuples), "mixed": int(tuple_ranks(truth.targets, mixed).min())}
        row["sin_theta"] = max(sin_theta(frame.basis, truth.basis) for frame in frames)
        rows.append(row)
    return {"reveal": rows}


def _share_of_rank(truth: Planted, tuples: Tensor) -> float:
    """Return the fraction of benign tuples whose differences span exactly r directions."""
    benign = tuples[truth.benign[tuples].all(dim=1)]
    return float((tuple_ranks(truth.targets, benign) == truth.rank).double().mean())


def reveal_study(kinds: list[str], columns: list[int], draws: int, *, seed: int = 0) -> pd.DataFrame:
    """Run ``reveal_cell`` over kinds of contamination and numbers of columns q."""
    cells = [{"contamination": kind, "q": q, "draws": draws, "seed": seed} for kind in kinds for q in columns]
    return sweep(reveal_cell, cells)["reveal"]


def summarise_reveal(rows: pd.DataFrame) -> pd.DataFrame:
    """Summarise by number of columns q: clients per tuple, fractions that reveal the subspace, and worst errors."""
    worst = {"pairs": "mean", "tuples": "mean", "sin_theta": "max", "mixed": "min"}
    table = rows.groupby("q", as_index=False).agg(worst)
    table.insert(1, "tuple", [tuple_size(RANK, q) for q in table.q])
    return table


def needed_cell(q: int, K: int, benign: int, draws: int, seed: int) -> dict[str, Rows]:
    """Check whether the benign set S is the unique largest consensus set when nothing but its subspace is shared.

    ``benign`` of the K clients are benign. One row per draw: ``unique``; ``sin_theta``, the error of the identified
    subspace, 1 where none is identified; ``needed``, the number of benign clients that Statement 1 requires.
    """
    rows = []
    for draw in range(draws):
        generator = derive(seed, "needed", q, K, benign, draw)
        truth = planted("unstructured", share=1 - benign / K, K=K, q=q, generator=generator)
        frames = consensus_frames(truth.targets, RANK)
        found = identified_frame(frames, RANK, q)
        unique = found is not None and torch.equal(found.members, truth.benign)
        error = sin_theta(found.basis, truth.basis) if found is not None else 1.0
        rows.append({"unique": unique, "sin_theta": error, "needed": chance_size(RANK, q) + 1})
    return {"needed": rows}


def needed_study(
    columns: list[int], counts: list[int], crowds: list[int], draws: int, *, seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure how often S is the unique largest consensus set: by q and number of benign clients, and by K.

    The first table has 12 clients. The second table has two benign clients among each K of ``crowds``, and q > r.
    """
    fixed = {"draws": draws, "seed": seed}
    cells = [{"q": q, "K": 12, "benign": n, **fixed} for q in columns for n in counts]
    cells += [{"q": Q, "K": K, "benign": 2, **fixed} for K in crowds]
    rows = sweep(needed_cell, cells)["needed"]
    summary = {"draws": ("unique", "size"), "unique": ("unique", "mean"), "needed": ("needed", "first")}
    table = rows.groupby(["q", "K", "benign"], as_index=False).agg(**summary, sin_theta=("sin_theta", "max"))
    table["as_stated"] = table.unique == (table.benign >= table.needed)
    small = table.K == 12
    return table[small].reset_index(drop=True), table[~small].reset_index(drop=True)


def rival_cell(kind: str, benign: int, count: int, noise: float, draws: int, seed: int) -> dict[str, Rows]:
    """Determine the winner, the benign set or the rivals, by exact algebra and by CLAIR; one row per draw.

    Rivals are contaminated clients that agree among themselves. ``largest`` and ``second`` are the sizes of the two
    largest consensus sets.
    """
    rows = []
    for draw in range(draws):
        truth, rival = rivals(kind, benign, count, noise / Q**0.5, generator=derive(seed, "rivals", kind, count, draw))
        frames = consensus_frames(truth.targets, RANK)
        found = identified_frame(frames, RANK, Q)
        result = CLAIR().fit(truth.updates)
        row: dict[str, Any] = {"largest": frames[0].size, "second": frames[1].size}
        row["algebra"] = "tie" if found is None else _winner(found.members, truth, rival)
        row["CLAIR"] = _winner(result.benign, truth, rival)
        rows.append(row | {"sin_theta": sin_theta(result.basis, truth.basis)})
    return {"rivals": rows}


def _winner(members: Tensor, truth: Planted, rival: Tensor) -> str:
    if torch.equal(members, truth.benign):
        return "benign"
    return "rivals" if torch.equal(members, rival) else "other"


def rival_study(
    counts: list[int], draws: int, *, benign: int = 12, seed: int = 0, cache: Path | None = None, jobs: int = 1
) -> pd.DataFrame:
    """Run ``rival_cell`` over kinds and numbers of rivals at noise level ``TINY``; one row per draw."""
    fixed = {"benign": benign, "noise": TINY, "draws": draws, "seed": seed}
    cells = [{"kind": kind, "count": count, **fixed} for kind in RIVALS for count in counts]
    return sweep(rival_cell, cells, cache=cache, jobs=jobs)["rivals"]


def summarise_rivals(rows: pd.DataFrame) -> pd.DataFrame:
    """Tabulate the frequency of each outcome by kind and number of rivals.

    ``as_stated``: fraction of draws in which both exact algebra and CLAIR come out as Statement 1 says. At a tie CLAIR
    may name either side.
    """
    tables = []
    for (kind, count, benign), cell in rows.groupby(["kind", "count", "benign"], sort=False):
        size = count + (kind == "anchored coalition")
        expected = "benign" if size < benign else "tie" if size == benign else "rivals"
        right = cell.CLAIR.isin(["benign", "rivals"] if expected == "tie" else [expected])
        row: dict[str, Any] = {"kind": kind, "count": count, "rival_set": size, "draws": len(cell)}
        row |= {"stated": expected, "as_stated": float(((cell.algebra == expected) & right).mean())}
        row |= {f"algebra {name}": float((cell.algebra == name).mean()) for name in ("benign", "tie", "rivals")}
        row |= {f"CLAIR {name}": float((cell.CLAIR == name).mean()) for name in ("benign", "rivals", "other")}
        tables.append(row | {"sin_theta": float(cell.sin_theta.median())})
    return pd.DataFrame(tables)


def exact_attacks(attackers: int, sizes: list[float], *, seed: int = 0) -> pd.DataFrame:
    """Run in-subspace attacks on 24 clients without noise.

    Columns: number of clients flagged by exact algebra and by CLAIR; ``sin_theta``, the error of the subspace;
    ``error``, the largest relative error of a refined update among the clients that do not attack.
    """
    honest = planted(share=0.0, noise_std=0.0, generator=derive(seed, "exact attacks"))
    rows = []
    for attack, size in product(INSIDE_ATTACKS, sizes):
        truth = attacked(honest, attack, attackers, size, generator=derive(seed, "exact attacks", attack))
        found = identified_frame(consensus_frames(truth.targets, RANK), RANK, Q)
        result = CLAIR().fit(truth.updates)
        frame = fit_frame(truth.updates, torch.ones(24, dtype=torch.float64), result.benign)
        wrong = torch.linalg.matrix_norm(refined_core(truth.updates, frame) - truth.targets)
        error = (wrong / torch.linalg.matrix_norm(truth.targets))[attackers:].max()
        row = {"attack": attack, "size": size, "flagged by algebra": 24 - (found.size if found else 0)}
        row |= {"flagged by CLAIR": int((~result.benign).sum()), "sin_theta": sin_theta(result.basis, truth.basis)}
        rows.append(row | {"error": float(error)})
    return pd.DataFrame(rows)


def in_subspace_cell(groups: list[int], sizes: list[float], K: int, noise: float, seed: int) -> dict[str, Rows]:
    """Run in-subspace attacks by the first m of K benign clients, for every m in ``groups``, on one draw.

    The other clients' refined squared error is divided by three references: the same error without an attack
    (``ratio``), without the attackers (``ratio_absent``), and that of the clients' own updates (``ratio_local``).
    ``sine_ratio``: sine of the subspace over that without an attack. ``flagged``: fraction of attackers that CLAIR
    flags. ``told_flagged``: fraction flagged by a test that is told P, M and the noise level. ``others_flagged``:
    number of other clients flagged. ``refused``: refinement is refused for all clients.
    """
    honest = planted(share=0.0, K=K, noise_std=noise / Q**0.5, generator=derive(seed, "inside", K, str(noise)))
    calm = CLAIR().fit(honest.updates)
    rows: Rows = []
    for m in groups:
        before, local = _error_after(calm.refined[m:], honest, m), _error_after(honest.updates[m:], honest, m)
        absent = _error_after(CLAIR().fit(honest.updates[m:]).refined, honest, m)
        for attack, size in product(INSIDE_ATTACKS, sizes):
            truth = attacked(honest, attack, m, size, generator=derive(seed, "inside", attack, m))
            result = CLAIR().fit(truth.updates)
            error = _error_after(result.refined[m:], truth, m)
            row: dict[str, Any] = {"attack": attack, "attackers": m, "size": size, "rank": result.rank}
            row |= {"flagged": float((~result.benign[:m]).double().mean()), "told_flagged": _told_flags(truth, m)}
            row |= {"others_flagged": int((~result.benign[m:]).sum()), "refused": result.gain <= 0}
            row |= {"ratio": error / before, "ratio_absent": error / absent, "ratio_local": error / local}
            row["sine_ratio"] = sin_theta(result.basis, truth.basis) / sin_theta(calm.basis, truth.basis)
            rows.append(row)
    return {"attacks": rows}


def _error_after(refined: Tensor, truth: Planted, attackers: int) -> float:
    """Return the mean squared error of the refined updates of the clients that come after the attackers."""
    return float((refined - truth.targets[attackers:]).square().sum(dim=(1, 2)).mean())


def _told_flags(truth: Planted, attackers: int) -> float:
    """Return the fraction of attackers that a chi-square test flags.

    The test has level ``TOLD_LEVEL`` and is told P, M and the noise level.
    """
    energy = project_out(truth.basis, truth.updates - truth.common_part).square().sum(dim=(1, 2))[:attackers]
    cut = float(stats.chi2.isf(TOLD_LEVEL, (len(truth.basis) - truth.rank) * Q))
    return float((energy > cut * truth.noise_std**2).double().mean())


def in_subspace_study(
    groups: list[int], sizes: list[float], seeds: int, *, seed: int = 0, cache: Path | None = None, jobs: int = 1
) -> pd.DataFrame:
    """Run ``in_subspace_cell`` over seeds with 12 clients at noise level ``MODEST``; one row per draw and attack."""
    cells = [{"groups": groups, "sizes": sizes, "K": 12, "noise": MODEST, "seed": seed + s} for s in range(seeds)]
    return sweep(in_subspace_cell, cells, cache=cache, jobs=jobs)["attacks"].drop(columns=["groups", "sizes"])


def summarise_attacks(rows: pd.DataFrame) -> pd.DataFrame:
    """Summarise each attack: geometric mean of the error ratio with its 95 % interval, and other columns' means."""
    tables = []
    for (attack, attackers, size), cell in rows.groupby(["attack", "attackers", "size"], sort=False):
        ratio, low, high = (exp(x) for x in mean_interval(cell.ratio.map(log)))
        row: dict[str, Any] = {"attack": attack, "attackers": attackers, "size": size, "draws": len(cell)}
        row |= {"ratio": ratio, "low": low, "high": high, "ratio_absent": exp(cell.ratio_absent.map(log).mean())}
        row |= {"sine_ratio": exp(cell.sine_ratio.map(log).mean()), "wrong_rank": float((cell["rank"] != RANK).mean())}
        row["worst_ratio_local"] = float(cell.ratio_local.max())
        tables.append(row | cell[["flagged", "told_flagged", "others_flagged", "refused"]].mean().to_dict())
    return pd.DataFrame(tables)


def few_cell(benign: int, noise: float, draws: int, seed: int, K: int = 24) -> dict[str, Rows]:
    """Check whether CLAIR, told nothing, finds a few benign clients among unstructured ones; one row per draw.

    ``exact``: it found the benign set. ``nobody``: it flagged no client. ``warned``: its summary said that no shared
    subspace was found.
    """
    rows = []
    for draw in range(draws):
        generator = derive(seed, "few", benign, str(noise), draw)
        truth = planted(share=1 - benign / K, K=K, noise_std=noise / Q**0.5, generator=generator)
        result = CLAIR().fit(truth.updates)
        row = {"exact": bool(torch.equal(result.benign, truth.benign)), "nobody": bool(result.benign.all())}
        rows.append(row | {"warned": not result.has_shared_subspace})
    return {"few": rows}


def few_study(
    counts: list[int], noises: list[float], draws: int, *, seed: int = 0, cache: Path | None = None, jobs: int = 1
) -> pd.DataFrame:
    """Measure how often CLAIR finds the benign set, by noise level and number of benign clients (Wilson interval)."""
    cells = [{"benign": n, "noise": noise, "draws": draws, "seed": seed} for noise in noises for n in counts]
    rows = sweep(few_cell, cells, cache=cache, jobs=jobs)["few"]
    tables = []
    for (noise, benign), cell in rows.groupby(["noise", "benign"], sort=False):
        exact, low, high = rate_interval(int(cell.exact.sum()), len(cell))
        row = {"noise": noise, "benign": benign, "draws": len(cell), "exact": exact, "low": low, "high": high}
        tables.append(row | cell[["nobody", "warned"]].mean().to_dict())
    return pd.DataFrame(tables)


def gauge_table(*, seed: int = 0) -> pd.DataFrame:
    """Compare two parameter sets with the same updates: relative change of each quantity when a gauge moves."""
    generator = derive(seed, "gauge")
    truth = planted(share=0.0, noise_std=0.0, generator=generator)
    U, M, A = truth.basis, truth.common_part, truth.basis.T @ (truth.targets - truth.common_part)
    still, turn = torch.eye(RANK, dtype=torch.float64), random_frame(RANK, RANK, generator=generator)
    moves = {"P M moved into every A_k": (U.T @ M, still), "U turned": (torch.zeros_like(A[0]), turn)}
    rows = []
    for move, (shift, rotation) in moves.items():
        V, N, B = moved_gauge(U, M, A, shift, rotation)
        pairs = {"updates": (M + U @ A, N + V @ B), "U": (U, V), "A": (A, B), "M": (M, N), "P": (U @ U.T, V @ V.T)}
        pairs["P_perp M"] = (project_out(U, M), project_out(V, N))
        change = {name: float((new - old).norm() / old.norm()) for name, (old, new) in pairs.items()}
        rows.append({"move": move, **change})
    return pd.DataFrame(rows)
