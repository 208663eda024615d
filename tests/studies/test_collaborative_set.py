"""Statement 3: its constants against exact laws, its detectors on planted clients, and the study's tables."""

from __future__ import annotations

from math import exp, log

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from clairlib.core.seeds import derive
from clairlib.recovery.detection import FAMILY_ERROR
from clairlib.simulate import planted
from clairlib.simulate.attacks import random_frame
from clairlib.theory.collaborative_set import energy_separation, filtered_null, filtered_separation, oracle_benign
from studies.collaborative_set import plots, study

ROWS, COLUMNS, K, DRAWS = 47, 10, 24, 40


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def exact_sets(kind: str, statistic: str, distance: float, basis: str = "true") -> int:
    """Draws, of DRAWS, in which the told detector finds exactly S at this off-subspace distance over sigma."""
    found = 0
    for d in range(DRAWS):
        draw = derive(0, "statement 3", kind, d)
        truth = planted(kind, share=0.4, K=K, generator=draw)
        told = truth.basis if basis == "true" else random_frame(50, 3, generator=draw)
        X = study.at_separation(truth, distance, 6 if statistic == "filtered" else None)
        found += torch.equal(oracle_benign(X, told, truth.common_part, truth.noise_std, statistic), truth.benign)
    return found


@pytest.mark.parametrize("statistic", ["energy", "filtered"])
@pytest.mark.parametrize("kind", ["unstructured", "sign_flip"])
def test_statement3_detector_told_the_truth_finds_separated_clients(kind, statistic):
    asked = {"energy": energy_separation(ROWS, COLUMNS, K), "filtered": filtered_separation(ROWS, COLUMNS, 6, K)}
    allowed = stats.binom.isf(1e-4, DRAWS, FAMILY_ERROR)  # failures when each has the chance the statement allows
    assert exact_sets(kind, statistic, asked[statistic]) >= DRAWS - allowed
    assert exact_sets(kind, statistic, asked[statistic], basis="random") == 0


def test_statement3_needs_the_separation():
    assert exact_sets("dense", "energy", (ROWS * COLUMNS) ** 0.25) == 0


@pytest.mark.parametrize("clients", [8, 60, 1000])
@pytest.mark.parametrize("freedom", [(1, 1), (47, 10), (400, 50)])
def test_the_energy_separation_bounds_the_exact_noncentral_law(clients, freedom):
    n, level = freedom[0] * freedom[1], FAMILY_ERROR / clients
    asked = energy_separation(*freedom, clients)
    cut = stats.chi2.isf(level, n)
    assert stats.ncx2.cdf(cut, n, asked**2) <= level
    assert stats.ncx2.cdf(cut, n, (asked / 2) ** 2) > level  # the constants lose less than a factor of two


def test_the_filtered_separation_bounds_the_simulated_law():
    rows, columns, g = 30, 8, 4
    draw, x = np.random.default_rng(0), log(K / FAMILY_ERROR)
    shift = np.zeros((rows, columns))
    shift[:g, :g] = np.eye(g) * filtered_separation(rows, columns, g, K) / g**0.5
    energy = np.linalg.svd(shift + draw.standard_normal((4000, rows, columns)), compute_uv=False)[:, :g] ** 2
    cut = np.quantile(filtered_null(rows, columns, g // 2), 1 - exp(-x))
    assert (energy.sum(axis=1) <= cut).mean() <= exp(-x) + 3 * (exp(-x) / 4000) ** 0.5
    everything = filtered_separation(rows, columns, columns, K)
    assert energy_separation(rows, columns, K) < everything < 1.25 * energy_separation(rows, columns, K)


def test_the_filtered_null_is_that_of_a_gaussian_matrix():
    direct = np.linalg.svd(np.random.default_rng(1).standard_normal((20_000, 12, 5)), compute_uv=False)[:, :4] ** 2
    sample = filtered_null(12, 5, 2)
    assert stats.ks_2samp(direct.sum(axis=1), sample).pvalue > 1e-3
    assert np.array_equal(sample, filtered_null(12, 5, 2)) and (np.diff(sample) >= 0).all()
    everything = filtered_null(5, 6, 3)  # five directions are all there are
    assert stats.kstest(everything, stats.chi2(30).cdf).pvalue > 1e-3


def test_at_separation_moves_contaminated_clients_only():
    truth = planted("dense", share=0.5, K=8, generator=derive(0, "distance"))
    X = study.at_separation(truth, 7.0)
    assert torch.equal(X[truth.benign], truth.updates[truth.benign])
    off = X - truth.updates + truth.targets - truth.common_part
    off = off - truth.basis @ (truth.basis.mT @ off)
    assert torch.linalg.matrix_norm(off)[~truth.benign].numpy() == pytest.approx(7 * truth.noise_std)


def test_auc_counts_pairs():
    low, high = np.array([0.0, 1.0, 2.0]), np.array([1.0, 3.0])
    wins = sum((b > a) + 0.5 * (b == a) for a in low for b in high)
    assert study.auc(low, high) == pytest.approx(wins / 6)


def test_a_cell_reports_every_method_against_the_truth():
    cell = study.detection_cell("coalition", 0.4, 12, 0.1, 1.0, True, draws=2, part=1, seed=0)
    verdicts, scores = pd.DataFrame(cell["verdicts"]), pd.DataFrame(cell["scores"])
    assert list(verdicts.draw.unique()) == [2, 3] and verdicts.method.nunique() == 5
    assert verdicts.exact.all() and verdicts.close.all() and (verdicts["rank"] == 3).all()
    assert (verdicts.power == 1).all() and (verdicts.false_alarms == 0).all()
    assert (scores[scores.method == "CLAIR"].auc == 1).all() and scores.auc.between(0, 1).all()
    assert (scores[scores.method == "CLAIR"]["roc 0"] == 1).all()


def test_the_grid_reaches_the_largest_minority_and_mild_shares_where_noise_is_high():
    assert study.shares_of("coalition", 24, 0.3) == (0.2, 11 / 24)
    assert study.shares_of("sign_flip", 60, 0.6) == (0.1, 0.2, 29 / 60)
    assert study.shares_of("dense", 24, 0.02) == (0.2, 0.4, 0.6, 0.8)


def verdict_table() -> pd.DataFrame:
    rows = []
    for draw in range(4):
        for method in (study.CLAIR_NAME, study.TOLD_RANK, study.TOLD_SET, study.TOLD_ENERGY):
            row = {"K": 24, "noise": 0.3, "contamination": "dense", "share": 0.2, "strength": 1.0, "draw": draw}
            wrong = method == study.CLAIR_NAME and draw == 0
            row |= {"method": method, "exact": not wrong, "close": draw != 1, "power": 0.5 if wrong else 1.0}
            row |= {"false_alarms": 0.0, "separation": 10.0, "rank": 2 if wrong else 3, "told_rank": True}
            rows.append(row)
    return pd.DataFrame(rows)


def test_summaries_count_draws_and_pair_methods():
    table = study.summarise_verdicts(verdict_table()).set_index("method")
    assert table.exact["CLAIR"] == 0.75 and table.both["CLAIR"] == 0.5 and table.power["CLAIR"] == 0.875
    assert table.low["CLAIR"] < 0.75 < table.high["CLAIR"] and table.exact["told S and r"] == 1
    gap = study.against(verdict_table(), "power", study.CLAIR_NAME, [study.TOLD_ENERGY]).iloc[0]
    assert gap.difference == pytest.approx(-0.125) and gap.low < gap.difference < gap.high
    ranks = study.rank_table(verdict_table()).set_index("method")
    assert ranks["rank 2"]["CLAIR"] == 0.25 and ranks["rank 3"]["CLAIR, told r"] == 1


def test_calibration_summary_sees_flags_and_p_values_that_are_not_uniform():
    places = (np.arange(100) + 0.5) / 100
    runs = pd.DataFrame({"K": 8, "noise": "isotropic", "flagged": [2] + 99 * [0], "p_value": places})
    table = study.summarise_calibration(pd.concat([runs, runs.assign(noise="coloured", p_value=places**2)]))
    assert list(table.anybody) == [0.01, 0.01] and table.flagged[0] == pytest.approx(2 / 800)
    assert table.ks_p[0] > 0.99 and table.ks_p[1] < 1e-4


def test_filters_rank_low_rank_contamination():
    rows = pd.DataFrame(study.filter_cell("low-rank", 1.5, 0.0, draws=3, seed=0)["filters"])
    assert set(rows["filter"]) == {"top r", "top 2 r", "all (Frobenius)"} and rows.auc.min() > 0.9


def test_figures_draw_from_their_tables():
    verdicts, summary = verdict_table(), study.summarise_verdicts(verdict_table())
    runs = pd.DataFrame([{"K": k, "noise": n, "flagged": 0, "p_value": p}
                         for k in (8, 24) for n in ("isotropic", "coloured") for p in (0.1, 0.7)])
    told = pd.DataFrame([{"statistic": s, "basis": b, "K": 24, "factor": f, "exact": f}
                         for s in ("energy", "filtered") for b in ("true", "random") for f in (0.5, 1.0)])
    filters = pd.DataFrame([{"contamination": "dense", "spread": s, "filter": "top r", "strength": x, "auc": x}
                            for s in (0.0, 0.2) for x in (0.6, 0.9)]).assign(low=0.5, high=1.0)
    rocs = pd.DataFrame([{"noise": 0.3, "contamination": "dense", "method": "CLAIR", "false_alarms": f, "caught": 1.0}
                         for f in (0.0, 0.5)])
    figures = [
        plots.recovery_grid(summary), plots.separation_curves(summary, 20.0), plots.promise(told),
        plots.calibration(study.summarise_calibration(runs), runs), plots.filter_curves(filters),
        plots.rank_bars(study.rank_table(verdicts)), plots.roc(rocs),
    ]  # fmt: skip
    for figure in figures:
        figure.canvas.draw()
    assert "75" in [text.get_text() for text in figures[0].axes[0].texts]
