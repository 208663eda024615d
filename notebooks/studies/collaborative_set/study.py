"""Statement 3: recovery of the collaborative set, detectors that are told more than CLAIR, and calibration.

Statement 3 is this project's reconstruction (notebook 04), not the paper's (arXiv:2605.21217).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

from clairlib import CLAIR, ClairResult
from clairlib.baselines.scores import CLIENT_SCORES
from clairlib.core.seeds import derive
from clairlib.linalg.subspace import project_out, sin_theta
from clairlib.recovery.detection import benign_set, calibrate
from clairlib.recovery.frame import Frame, fit_frame
from clairlib.recovery.leave_one_out import LeaveOneOut
from clairlib.recovery.scores import SCORED_DIRECTIONS_PER_RANK, log_scores
from clairlib.reproduce.sweep import Rows, grid, sweep
from clairlib.simulate import Planted, planted
from clairlib.simulate.attacks import random_frame
from clairlib.theory.collaborative_set import energy_separation, filtered_separation, oracle_benign
from studies.common.intervals import mean_interval, rate_interval
from studies.common.verdicts import auc

CELL = ["K", "noise", "contamination", "share"]
KINDS = ("unstructured", "dense", "coalition", "sign_flip")
COLUMNS = 10  # q
HARD_NOISE = 0.6  # at this noise level and above, the grid includes a contaminated fraction of .1
FALSE_ALARMS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # rates at which ROC curves are read
CLAIR_NAME, TOLD_RANK, TOLD_SET = "CLAIR", "CLAIR, told r", "told S and r"
TOLD_ENERGY, TOLD_FILTER = "told P, M, sigma: energy", "told P, M, sigma: filtered"


def separations(truth: Planted) -> Tensor:
    """Return ||P_perp (Theta_k - M)||_F / sigma of each contaminated client."""
    off = project_out(truth.basis, truth.targets - truth.common_part)
    return torch.linalg.matrix_norm(off[~truth.benign]) / truth.noise_std


def at_separation(truth: Planted, distance: float, directions: int | None = None) -> Tensor:
    """Scale every contaminated client's off-subspace part, or its top ``directions``, to norm distance * sigma."""
    off = project_out(truth.basis, truth.targets - truth.common_part)
    size = torch.linalg.svdvals(off)[:, :directions].square().sum(dim=1).sqrt()
    factor = torch.where(truth.benign, 0.0, distance * truth.noise_std / size - 1)
    return truth.updates + factor[:, None, None] * off


def told_cell(contamination: str, K: int, factor: float, draws: int, seed: int) -> dict[str, Rows]:
    """Run Statement 3's detectors with 30 % of clients contaminated, at ``factor`` times its separation.

    The detectors are told the true subspace or a random one (column ``basis``).
    """
    rows = []
    for d in range(draws):
        draw = derive(seed, "told", contamination, K, d)
        truth = planted(contamination, K=K, noise_std=0.3 / COLUMNS**0.5, generator=draw)
        p, r = truth.basis.shape
        g, bases = SCORED_DIRECTIONS_PER_RANK * r, {"true": truth.basis, "random": random_frame(p, r, generator=draw)}
        clients = {
            "energy": at_separation(truth, factor * energy_separation(p - r, COLUMNS, K)),
            "filtered": at_separation(truth, factor * filtered_separation(p - r, COLUMNS, g, K), g),
        }
        for statistic, X in clients.items():
            for name, basis in bases.items():
                benign = oracle_benign(X, basis, truth.common_part, truth.noise_std, statistic)
                rows.append({"basis": name, "statistic": statistic, "exact": bool(torch.equal(benign, truth.benign))})
    return {"told": rows}


def told_study(clients: list[int], factors: list[float], *, draws: int, seed: int, **how: Any) -> pd.DataFrame:
    """Run ``told_cell`` over kinds, numbers of clients and factors: rate of exact sets with Wilson interval.

    ``how`` goes to ``sweep``, here and in the studies below: cache, jobs.
    """
    cells = grid(contamination=list(KINDS), K=clients, factor=factors, draws=[draws], seed=[seed])
    table = sweep(told_cell, cells, **how)["told"]
    by = ["statistic", "basis", "K", "contamination", "factor"]
    rows = [(*key, *rate_interval(int(cell.exact.sum()), len(cell))) for key, cell in table.groupby(by, sort=False)]
    return pd.DataFrame(rows, columns=[*by, "exact", "low", "high"])


def detection_cell(
    contamination: str, share: float, K: int, noise: float, strength: float, told_rank: bool, draws: int, part: int,
    seed: int,
) -> dict[str, Rows]:  # fmt: skip
    """Draw planted clients; return the verdicts of CLAIR and of detectors told more, and the ROC curves of scores.

    ``noise`` is the noise of one row of an update: an entry's standard deviation is noise / sqrt(q).
    """
    verdicts: Rows = []
    scores: Rows = []
    for d in range(draws):
        names = (contamination, str(share), K, str(noise), str(strength), part, d)
        draw, level = derive(seed, "detection", *names), noise / COLUMNS**0.5
        truth = planted(contamination, share=share, K=K, noise_std=level, strength=strength, generator=draw)
        ones = torch.ones(K, dtype=torch.float64)
        oracle = fit_frame(truth.updates, ones, truth.benign, truth.rank)
        result = CLAIR().fit(truth.updates)
        here = {"draw": draws * part + d}
        verdicts += [here | row for row in _verdicts(truth, oracle, result, told_rank)]
        x, _ = log_scores(LeaveOneOut(truth.updates, ones, oracle))
        scores += [here | row for row in _score_rows(truth, {CLAIR_NAME: result.scores, TOLD_SET: x})]
    return {"verdicts": verdicts, "scores": scores}


def _verdicts(truth: Planted, oracle: Frame, result: ClairResult, told_rank: bool) -> Rows:
    """Return one verdict row per method."""
    ones = torch.ones(len(truth.updates), dtype=torch.float64)
    left_out = LeaveOneOut(truth.updates, ones, oracle)
    x, variance = log_scores(left_out)
    calibrated, inside = calibrate(x, truth.benign, variance), left_out.inside
    told = (truth.updates, truth.basis, truth.common_part, truth.noise_std)
    found: dict[str, Tensor] = {
        TOLD_SET: benign_set(x, truth.benign, calibrated.p_values, variance, inside),
        TOLD_ENERGY: oracle_benign(*told),
        TOLD_FILTER: oracle_benign(*told, statistic="filtered"),
    }
    fits = {CLAIR_NAME: result} | ({TOLD_RANK: CLAIR(truth.rank).fit(truth.updates)} if told_rank else {})
    bound = 1.05 * sin_theta(oracle.basis, truth.basis)
    rows = [_verdict(name, benign, truth) | {"rank": truth.rank, "close": True} for name, benign in found.items()]
    for name, fit in fits.items():
        close = sin_theta(fit.basis, truth.basis) <= bound  # other methods use the oracle's or the true subspace
        rows.append(_verdict(name, fit.benign, truth) | {"rank": fit.rank, "close": close})
    return rows


def _verdict(method: str, benign: Tensor, truth: Planted) -> dict[str, Any]:
    bad = ~truth.benign
    return {
        "method": method,
        "separation": float(separations(truth).min()),
        "exact": bool(torch.equal(benign, truth.benign)),
        "power": float((~benign)[bad].double().mean()),
        "false_alarms": float((~benign)[truth.benign].double().mean()),
    }


def _score_rows(truth: Planted, scores: dict[str, Tensor]) -> Rows:
    """Return AUC and ROC curve of each method's scores and of ``CLIENT_SCORES``.

    Krum is told the number of contaminated clients.
    """
    contaminated = int((~truth.benign).sum())
    scores = scores | {name: score(truth.updates, contaminated) for name, score in CLIENT_SCORES.items()}
    rows = []
    for name, values in scores.items():
        low, high = values[truth.benign].numpy(), values[~truth.benign].numpy()
        cuts = np.quantile(low, 1 - np.array(FALSE_ALARMS), method="higher")
        curve = {f"roc {rate:g}": float(np.mean(high > cut)) for rate, cut in zip(FALSE_ALARMS, cuts, strict=True)}
        rows.append({"method": name, "auc": auc(low, high), **curve})
    return rows


def shares_of(kind: str, K: int, noise: float) -> tuple[float, ...]:
    """Return the grid's contaminated fractions.

    They go up to .8, or up to the largest minority where contaminated clients agree among themselves.
    """
    mild = (0.1,) if noise >= HARD_NOISE else ()
    agreeing = kind in ("coalition", "sign_flip")
    return mild + ((0.2, (K - 1) // 2 / K) if agreeing else (0.2, 0.4, 0.6, 0.8))


def grid_study(
    clients: list[int], noises: list[float], told_rank: list[float], *, draws: int, batch: int, seed: int, **how: Any
) -> dict[str, pd.DataFrame]:
    """Run ``detection_cell`` over the grid, with at least ``draws`` draws per cell in batches.

    The result has the tables ``verdicts`` and ``scores``. CLAIR told the rank is run with the fewest clients only, at
    the noise levels in ``told_rank``.
    """
    cells = [
        {"contamination": kind, "share": share, "K": K, "noise": noise, "strength": 1.0,
         "told_rank": K == min(clients) and noise in told_rank, "draws": batch, "seed": seed, "part": part}
        for K in clients for noise in noises for kind in KINDS for share in shares_of(kind, K, noise)
        for part in range(-(-draws // batch))
    ]  # fmt: skip
    return sweep(detection_cell, cells, **how)


def separation_study(
    strengths: list[float], *, noise: float, draws: int, batch: int, seed: int, K: int = 24, **how: Any
) -> pd.DataFrame:
    """Return verdicts while contaminated clients deviate by only part of their planted deviation (``strengths``).

    The contaminated fraction is 30 % for every kind, and also 60 % for unstructured contamination.
    """
    pairs = [(kind, 0.3) for kind in KINDS] + [("unstructured", 0.6)]
    cells = [
        {"contamination": kind, "share": share, "K": K, "noise": noise, "strength": strength, "told_rank": False,
         "draws": batch, "seed": seed, "part": part}
        for kind, share in pairs for strength in strengths for part in range(-(-draws // batch))
    ]  # fmt: skip
    return sweep(detection_cell, cells, **how)["verdicts"]


def summarise_verdicts(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Summarise each cell and method: rates of exact sets, power, and benign clients flagged.

    ``exact`` (Wilson interval) is the rate of exact sets, ``both`` (Wilson interval) that of exact sets with a subspace
    close to the oracle's.
    """
    by = [*CELL, "strength", "method"]
    rows = []
    for key, cell in verdicts.groupby(by, sort=False):
        sets = rate_interval(int(cell.exact.sum()), len(cell))
        both = rate_interval(int((cell.exact & cell.close).sum()), len(cell))
        means = cell[["separation", "power", "false_alarms"]].mean()
        rows.append((*key, len(cell), *sets, *both, *means))
    rates = ["exact", "low", "high", "both", "both_low", "both_high"]
    return pd.DataFrame(rows, columns=[*by, "draws", *rates, "separation", "power", "false_alarms"])


def calibration_cell(K: int, noise: str, runs: int, seed: int, part: int) -> dict[str, Rows]:
    """Run CLAIR with no contaminated client: number of clients flagged, p-value of one client drawn at random."""
    rows = []
    for run in range(runs):
        draw = derive(seed, "calibration", K, noise, part, run)
        correlation = {"isotropic": 0.0, "coloured": 0.6}[noise]
        truth = planted(share=0.0, K=K, noise_std=0.3 / COLUMNS**0.5, row_correlation=correlation, generator=draw)
        result = CLAIR().fit(truth.updates)
        one = int(torch.randint(K, (1,), generator=draw))
        rows.append({"flagged": int((~result.benign).sum()), "p_value": float(result.p_values[one])})
    return {"calibration": rows}


def calibration_study(clients: list[int], runs: list[int], *, batch: int, seed: int, **how: Any) -> pd.DataFrame:
    """Run ``calibration_cell`` for each number of clients, with isotropic and with coloured noise.

    ``runs`` gives the least number of runs for each entry of ``clients``.
    """
    cells = [
        {"K": K, "noise": noise, "runs": batch, "seed": seed, "part": part}
        for K, wanted in zip(clients, runs, strict=True) for noise in ("isotropic", "coloured")
        for part in range(-(-wanted // batch))
    ]  # fmt: skip
    return sweep(calibration_cell, cells, **how)["calibration"].drop(columns="runs")


def summarise_calibration(runs: pd.DataFrame) -> pd.DataFrame:
    """Summarise each K and kind of noise.

    Columns: probability that at least one client is flagged (Wilson interval), fraction of clients flagged, and
    Kolmogorov-Smirnov test of the p-values against uniform.
    """
    rows = []
    for (K, noise), cell in runs.groupby(["K", "noise"], sort=False):
        anybody = rate_interval(int((cell.flagged > 0).sum()), len(cell))
        rows.append((K, noise, len(cell), *anybody, cell.flagged.mean() / K, *stats.kstest(cell.p_value, "uniform")))
    return pd.DataFrame(rows, columns=["K", "noise", "runs", "anybody", "low", "high", "flagged", "ks", "ks_p"])


def filter_cell(contamination: str, strength: float, spread: float, draws: int, seed: int) -> dict[str, Rows]:
    """Compute the AUC of leave-one-out off-subspace energies in the top r, 2 r and all directions, told S and r.

    Contamination ``low-rank`` is unstructured contamination without common parts. Client k's noise level is 0.6 /
    sqrt(q) times exp(spread N(0, 1)); the scores are not told it.
    """
    kind, common = ("unstructured", 0.0) if contamination == "low-rank" else (contamination, 1.0)
    rows = []
    for d in range(draws):
        draw = derive(seed, "filter", contamination, str(strength), str(spread), d)
        levels = (spread * torch.randn(24, generator=draw, dtype=torch.float64)).exp()
        noise = HARD_NOISE / COLUMNS**0.5
        how: dict[str, Any] = {"strength": strength, "weights": levels**-2}
        truth = planted(kind, common_norm=common, noise_std=noise, **how, generator=draw)
        ones = torch.ones(24, dtype=torch.float64)
        R = LeaveOneOut(truth.updates, ones, fit_frame(truth.updates, ones, truth.benign, truth.rank)).R
        energy = torch.linalg.svdvals(R).square().cumsum(dim=1)
        for name, directions in (("top r", truth.rank), ("top 2 r", 2 * truth.rank), ("all (Frobenius)", COLUMNS)):
            x = energy[:, directions - 1].numpy()
            rows.append({"filter": name, "draw": d, "auc": auc(x[truth.benign], x[~truth.benign])})
    return {"filters": rows}


def filter_study(strengths: list[float], spreads: list[float], *, draws: int, seed: int, **how: Any) -> pd.DataFrame:
    """Run ``filter_cell`` over kinds, strengths and spreads: mean AUC with its t interval over draws."""
    kinds = ["low-rank", "unstructured", "sign_flip", "dense"]
    cells = grid(contamination=kinds, strength=strengths, spread=spreads, draws=[draws], seed=[seed])
    table = sweep(filter_cell, cells, **how)["filters"]
    return _mean_table(table, ["contamination", "spread", "filter", "strength"], "auc")


def _mean_table(table: pd.DataFrame, by: list[str], value: str) -> pd.DataFrame:
    rows = [(*key, *mean_interval(cell[value])) for key, cell in table.groupby(by, sort=False)]
    return pd.DataFrame(rows, columns=[*by, value, "low", "high"])


def summarise_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """Average every score's AUC in every cell, with a t interval over draws."""
    return _mean_table(scores, [*CELL, "method"], "auc")


def roc_curves(scores: pd.DataFrame) -> pd.DataFrame:
    """Average every score's ROC curve over the cells and draws of a noise level and kind."""
    by, columns = ["noise", "contamination", "method"], [f"roc {rate:g}" for rate in FALSE_ALARMS]
    mean = scores.groupby(by, sort=False)[columns].mean().reset_index()
    long = mean.melt(by, var_name="false_alarms", value_name="caught")
    return long.assign(false_alarms=long.false_alarms.str.removeprefix("roc ").astype(float))


def against(table: pd.DataFrame, value: str, first: str, others: list[str]) -> pd.DataFrame:
    """Subtract each other method's ``value`` from that of ``first``, paired by draw: mean and t interval per cell."""
    rows = []
    for key, cell in table.groupby(CELL, sort=False):
        wide = cell.pivot(index="draw", columns="method", values=value).astype(float)
        for other in others:
            rows.append((*key, other, *wide[[first, other]].mean(), *mean_interval(wide[first] - wide[other])))
    return pd.DataFrame(rows, columns=[*CELL, "other", first, "of other", "difference", "low", "high"])


def rank_table(verdicts: pd.DataFrame) -> pd.DataFrame:
    """Compare CLAIR told the rank with CLAIR estimating it, in the cells that have both.

    Columns: rate of exact sets (Wilson interval), power, and distribution of the rank.
    """
    both = verdicts[verdicts.told_rank & verdicts.method.isin([CLAIR_NAME, TOLD_RANK])]
    rows = []
    for key, cell in both.groupby([*CELL, "method"], sort=False):
        shares = [float((cell["rank"] == r).mean()) for r in range(1, 5)] + [float((cell["rank"] > 4).mean())]
        rows.append((*key, *rate_interval(int(cell.exact.sum()), len(cell)), cell.power.mean(), *shares))
    ranks = [f"rank {r}" for r in (1, 2, 3, 4, ">4")]
    return pd.DataFrame(rows, columns=[*CELL, "method", "exact", "low", "high", "power", *ranks])
