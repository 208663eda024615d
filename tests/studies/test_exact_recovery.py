"""Statement 2a, the phase study's tables, and its figures."""

from __future__ import annotations

import math

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from clairlib.baselines.subspaces import leading_basis
from clairlib.core.seeds import derive
from clairlib.linalg.subspace import sin_theta
from clairlib.recovery.consensus import consensus
from clairlib.recovery.convex import decompose
from clairlib.simulate import planted
from clairlib.simulate.attacks import random_frame
from clairlib.theory import exact_recovery as theory
from studies.exact_recovery import plots as phase_plots
from studies.exact_recovery import study

SIZE = (12, 6, 12)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def tables():
    return study.phase_study({"dense": [0.25, 0.75], "coalition": [0.25, 0.58]}, [1, 2], 2, size=SIZE)


@pytest.fixture(scope="module")
def weights():
    return study.weight_study({"dense": [0.25]}, [1], 2, size=SIZE)


@pytest.mark.parametrize("solver", ["convex", "consensus"])
@pytest.mark.parametrize("kind", ["unstructured", "dense", "coalition"])
def test_statement2a_exact_recovery_without_noise(kind, solver):
    """Certificate below 1: set and subspace exact. A random basis in place of U is at a sine near 1."""
    generator = derive(0, "statement 2a", kind)
    truth = planted(kind, share=0.3, K=20, p=20, q=10, r=2, noise_std=0.0, generator=generator)
    lam = theory.certified_weight(truth.updates, truth.benign, truth.basis)
    proof = theory.recovery_certificate(truth.updates, truth.benign, truth.basis, lam)
    assert proof.verdict(study.MARGIN) == "exact"
    if solver == "convex":
        found = decompose(truth.updates, lam=lam, tolerance=study.GAP)
        assert found.certificate.relative_gap <= study.GAP
        sizes = torch.linalg.matrix_norm(found.contamination)
        benign, basis = sizes <= theory.NEGLIGIBLE * sizes.max(), leading_basis(found.low_rank, 2)
        tolerance = resolution(truth, proof, lam, found.certificate.primal - found.certificate.dual)
    else:
        frame = consensus(truth.updates, torch.ones(20, dtype=torch.float64), generator=generator)
        benign, basis, tolerance = frame.members, frame.basis, 1e-12
    assert torch.equal(benign, truth.benign)
    assert tolerance <= study.SINE
    assert sin_theta(basis, truth.basis) <= tolerance
    random = random_frame(20, 2, generator=derive(1, "random"))
    assert sin_theta(basis, random) > 0.5, "the test would be red if U were any other basis"


def resolution(truth, proof, lam, gap):
    """Largest sine that a duality gap allows, from the notebook's Remark."""
    W = (truth.basis.T @ proof.dual)[truth.benign]
    spread = torch.linalg.svdvals((W - W.mean(0)).permute(1, 0, 2).flatten(1))[-1]
    outside, blocks = gap / (1 - proof.spectral), gap / (lam * (1 - proof.block))
    sums = outside + (outside + blocks) / float(spread)
    benign = truth.updates[truth.benign] - truth.updates[truth.benign].mean(0)
    signal = float(torch.linalg.svdvals(benign.permute(1, 0, 2).flatten(1))[truth.rank - 1])
    return sums / (signal - blocks)


def test_proofs_decide_and_unidentifiable_cells_fail(tables):
    joined = study.with_proofs(tables)
    decided = joined[joined.verdict != "undecided"]
    assert set(decided.verdict) == {"exact", "not exact"}
    assert ((decided.verdict == "exact") == decided.exact).all()
    found = study.summarise_phase(tables["recovery"])
    assert (found.gap.dropna() <= study.GAP).all()
    outside = found[~study.identifiable(found, SIZE[2])]
    assert set(outside.contamination) == {"coalition"} and set(outside.share) == {0.58}
    assert outside.exact.max() == 0
    worst = study.worst_cell(found, SIZE[2]).set_index("method")
    assert worst.worst["PCA"] == 0 and worst.cells["PCA"] == 6
    assert set(worst.index) == set(study.METHODS)


def test_weights_of_the_convex_methods():
    truth = planted("dense", share=0.25, K=12, p=12, q=6, r=2, noise_std=0.0, generator=derive(0, "weights"))
    low, high = study.planted_window(truth)
    assert study.weight("convex, 3/7 rule", truth, 0.5) == pytest.approx(3 / (7 * math.sqrt(0.25 * 12)))
    assert study.weight("convex, log rule", truth, 0.5) == pytest.approx(math.log(12) ** -0.5)
    assert low < study.weight("convex, window", truth, 0.5) < high
    assert study.weight("convex, certified", truth, 0.5) == 0.5


def test_tables_from_made_up_draws():
    base = {"contamination": "dense", "rank": 1, "common": 1.0, "method": "convex, certified", "gap": 1e-9}
    rows = [(0.2, 0, True, True), (0.2, 1, False, True), (0.4, 0, False, False), (0.4, 1, False, True)]
    found = pd.DataFrame(
        [base | {"share": s, "draw": d, "exact": e, "exact_set": n, "sine": 0.1} for s, d, e, n in rows]
    )
    proofs = found[study.CELL + ["draw"]].assign(
        verdict=["exact", "exact", "not exact", "undecided"], margin=[0.5, 0.5, 2.0, 2.0], ratio=4.0, balanced=0.5
    )
    row = study.summarise_phase(found).iloc[0]
    assert (row.exact, row.exact_set, row.draws) == (0.5, 1.0, 2) and row.low < 0.5 < row.high
    joined = study.with_proofs({"recovery": found, "proofs": proofs})
    [cell] = study.proved_cells(joined).itertuples()
    assert (cell.share, cell.proved, cell.exact) == (0.2, 2, 0.5)
    assert dict(study.by_verdict(joined).set_index("verdict").found) == {"exact": 1, "not exact": 0, "undecided": 0}
    limit = study.window_limits(proofs).iloc[0]
    assert limit.certified == pytest.approx(0.3) and math.isnan(limit.planted)
    says = study.predictors(joined).set_index("predictor")
    assert list(says.yes) == [4, 0, 2] and says["exact where yes"]["certificate holds"] == 0.5


def test_sweep_of_weights_fails_on_both_sides(weights):
    ends = weights[weights.factor.isin([study.FACTORS[0], study.FACTORS[-1]])]
    assert not ends.exact.any() and weights[weights.factor == 1].exact.all()
    assert weights.gap.max() <= study.GAP
    assert not weights[weights.verdict == "not exact"].exact.any()
    assert weights[weights.verdict == "exact"].exact.all()


def test_dual_cases_show_what_the_statement_says():
    cases = study.dual_cases(0)
    summary = cases["summary"].set_index("case")
    assert (summary["sum of Y"] < 1e-10).all()
    assert summary.exact["window open"] and summary["at one"]["window open"] == 2
    assert not summary.exact.drop("window open").any()
    blocks = cases["values"].query("case == 'window open' and part == 'block norm'")
    assert (blocks.value[~blocks.benign.astype(bool)] > 1 - 1e-4).all()
    assert (blocks.value[blocks.benign.astype(bool)] < 0.99).all()


def test_figures_draw_from_their_tables(tables, weights):
    summary, cases = study.summarise_phase(tables["recovery"]), study.dual_cases(0)
    diagram = phase_plots.phase_diagram(
        summary, study.window_limits(tables["proofs"]), {"dense": 0.9, "coalition": 0.5}, ["consensus", "PCA"]
    )
    figures = [diagram, phase_plots.certificate_map(weights)]
    figures.append(phase_plots.dual_certificates(cases["values"], cases["summary"]))
    for figure in figures:
        figure.canvas.draw()
    drawn = diagram.axes[1].images[0].get_array()  # dense, PCA
    assert drawn.shape == (2, 2) and drawn.max() == 0
    points = sum(len(line.get_xdata()) for line in figures[1].axes[0].lines[:3])
    assert points == len(weights)
