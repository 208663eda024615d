"""The studies' tables and figures: what the notebooks' claims are computed from."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from clairlib import CLAIR, plots
from clairlib.core.seeds import derive
from clairlib.simulate import planted
from studies.common.verdicts import benign_error
from studies.start_here import plots as study_plots
from studies.start_here.study import error_table, recovery_cell, summarise_recovery


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


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
    truth = planted(generator=derive(0, "figures"))
    for figure in (study_plots.recovery_rates(draws), study_plots.errors(error_table(truth, truth.updates))):
        figure.canvas.draw()
