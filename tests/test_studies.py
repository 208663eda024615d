"""The studies' tables and figures: what the notebooks' claims are computed from."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from clairlib import CLAIR, plots
from clairlib.clients import planted
from clairlib.copying_study import (
    METHODS,
    against,
    leverage_picks_symbols,
    paired_differences,
    summarise_accuracy,
    summarise_detection,
)
from clairlib.planted_study import benign_error, error_table, recovery_cell, summarise_recovery
from clairlib.seeds import derive


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def accuracy_table() -> pd.DataFrame:
    rows = []
    for seed in range(3):
        for client in range(2):
            for m, method in enumerate(METHODS):
                lift = 0.02 if method == "CLAIR" else 0.01 * (m == METHODS.index("local"))
                value = 0.8 + lift + 0.001 * seed * (method == "CLAIR")
                rows.append({"label_noise": 0.1, "seed": seed, "client": client, "method": method, "accuracy": value})
                rows[-1] |= {"on_symbols": value, "off_symbols": value, "free_running": value}
    return pd.DataFrame(rows)


def test_recovery_cell_reports_the_verdict_against_the_truth():
    row = recovery_cell("coalition", 0.4, 0.1, seed=3)["recovery"][0]
    assert row["exact"] and row["exact_rank"] and row["missed"] == row["false_alarms"] == 0
    assert row["error"] < row["local_error"] / 3
    assert row["sin_theta"] == pytest.approx(row["oracle_sin_theta"], rel=1e-6)


def test_summary_counts_a_wrong_rank_and_a_wrong_set():
    good = {"contamination": "dense", "share": 0.2, "noise": 0.1, "exact": True, "exact_rank": True, "sin_theta": 0.2}
    good |= {"oracle_sin_theta": 0.1, "error": 3.0, "oracle_error": 2.0, "local_error": 30.0}
    draws = pd.DataFrame([good, good, good | {"exact_rank": False}, good | {"exact": False}])
    row = summarise_recovery(draws).iloc[0]
    assert (row.exact, row.exact_rank, row.exact_both) == (0.75, 0.75, 0.5)
    assert (row.sin_theta_ratio, row.error_ratio, row.refined_over_local) == (2.0, 1.5, 0.1)


def test_paired_differences_are_clair_minus_the_other():
    table = accuracy_table()
    local = against(paired_differences(table), "local", 0.1)
    assert local["difference"] == pytest.approx(0.011) and local["low"] < 0.011 < local["high"]
    assert local["low"] > 0
    assert against(paired_differences(table, over="client"), "FedAvg", 0.1)["difference"] == pytest.approx(0.021)
    summary = summarise_accuracy(table).set_index("method")
    assert summary.accuracy["local"] == pytest.approx(0.81) and set(summary.index) == set(METHODS)


def test_detection_summary_and_leverage():
    rows = [{"label_noise": 0.1, "seed": 0, "client": k, "score": k} for k in range(4)]
    for row, flagged, contaminated in zip(rows, (0, 0, 1, 1), (0, 1, 0, 1), strict=True):
        row |= {"flagged": bool(flagged), "contaminated": bool(contaminated)}
    summary = summarise_detection(pd.DataFrame(rows)).iloc[0]
    assert (summary.precision, summary.recall, summary.exact) == (0.5, 0.5, False)
    leverage = pd.DataFrame(
        [{"label_noise": 0.1, "seed": s, "token": t, "leverage": v, "symbol": t < 2}
         for s, values in enumerate([(0.9, 0.8, 0.1), (0.9, 0.1, 0.2)]) for t, v in enumerate(values)]
    )
    assert list(leverage_picks_symbols(leverage).picked) == [True, False]


def test_errors_by_method_are_measured_against_the_targets():
    truth = planted("coalition", share=0.4, generator=derive(0, "errors"))
    table = error_table(truth, truth.targets).set_index("method")
    assert table.error["CLAIR"] == 0
    assert table.error["local"] == pytest.approx(benign_error(truth.updates, truth))


@pytest.mark.parametrize("by_module", [False, True])
def test_overview_shows_every_client_and_the_verdict(by_module):
    truth = planted("coalition", share=0.25, generator=derive(1, "picture"))
    names = [f"<b>{k}$" for k in range(len(truth.updates))]  # markup and TeX in names must stay text
    updates = {"a": truth.updates, "b": truth.updates} if by_module else truth.updates
    figure = plots.overview(CLAIR().fit(updates, names=names))
    figure.canvas.draw()
    middle = figure.axes[1]
    benign, contaminated = (len(line.get_xdata()) for line in middle.lines[:2])
    assert (benign, contaminated) == (int(truth.benign.sum()), int((~truth.benign).sum()))


def test_figures_draw_from_their_tables():
    draws = pd.DataFrame(
        [{"contamination": "dense", "share": s, "noise": n, "exact": 1.0, "low": 0.8, "high": 1.0}
         for s in (0.2, 0.4) for n in (0.1, 0.3)]
    )
    scores = pd.DataFrame(
        [{"seed": 0, "score": 1.0, "contaminated": c, "flagged": f} for c in (True, False) for f in (True, False)]
    )
    truth = planted(generator=derive(0, "figures"))
    leverage = pd.DataFrame([{"token": t, "leverage": 0.1 * t, "symbol": t > 2} for t in range(5)])
    figures = [
        plots.recovery_rates(draws),
        plots.errors(error_table(truth, truth.updates)),
        plots.accuracies(summarise_accuracy(accuracy_table())),
        plots.client_scores(scores, by="seed"),
        plots.vocabulary_leverage(leverage),
    ]
    for figure in figures:
        figure.canvas.draw()
    crosses = [line for line in figures[3].axes[0].lines if line.get_marker() == "x"]
    assert sum(len(line.get_xdata()) for line in crosses) == 2  # the two wrong verdicts
    bars = [bar.get_height() for bar in figures[4].axes[0].patches]
    assert torch.tensor(bars).max() == pytest.approx(0.4)
