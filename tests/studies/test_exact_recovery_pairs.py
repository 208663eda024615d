"""The program on blocks of client pairs: against cvxpy, its certificate, its window, what is read off, its tables."""

from __future__ import annotations

import math

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from clairlib.baselines.subspaces import leading_basis, pair_differences
from clairlib.core.seeds import derive
from clairlib.linalg.subspace import project_out, sin_theta
from clairlib.recovery.convex import decompose, lambda_window
from clairlib.simulate import Planted, planted
from clairlib.simulate.attacks import random_frame
from clairlib.theory import exact_recovery as theory
from studies.exact_recovery import pairwise, plots, study
from studies.exact_recovery.pairwise import CLIENTS, PAIRS, Reading, both_of_pair, linked_clients, pair_window

SIZE = (12, 6, 10)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def found():
    return pairwise.reading_study({"dense": [0.2, 0.6], "coalition": [0.4]}, [1], 2, size=SIZE)


@pytest.fixture(scope="module")
def weights():
    return pairwise.reading_study({"dense": [0.2]}, [1], 2, commons=[1.0], factors=study.FACTORS, size=SIZE)


def draw(kind="dense", share=0.3, K=12, r=2, seed=0, p=20, q=10):
    return planted(kind, share=share, K=K, p=p, q=q, r=r, noise_std=0.0, generator=derive(seed, "pairs", kind))


def wide(blocks):
    return np.hstack(list(blocks.numpy()))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("lam", [0.25, 0.5])
def test_objective_equals_cvxpy_and_both_bounds_are_feasible(seed, lam):
    cvxpy = pytest.importorskip("cvxpy")
    reading = Reading.of_pairs(draw(("dense", "coalition")[seed % 2], K=6, p=6, q=3, r=1, seed=seed))
    D, solution = reading.blocks, reading.solve(lam)
    assert not solution.common_part.any()
    torch.testing.assert_close(solution.low_rank + solution.contamination, D, rtol=0, atol=1e-12)
    Y = solution.dual
    assert np.linalg.norm(wide(Y), 2) <= 1 + 1e-12 and torch.linalg.matrix_norm(Y).max() <= lam * (1 + 1e-12)
    sizes = torch.linalg.matrix_norm(solution.contamination)
    primal = np.linalg.norm(wide(solution.low_rank), "nuc") + lam * float(sizes.sum())
    dual = float((Y * D).sum())
    assert 0 <= primal - dual <= study.GAP * primal * 1.01
    L, C = ([cvxpy.Variable((6, 3)) for _ in D] for _ in range(2))
    value = cvxpy.normNuc(cvxpy.hstack(L)) + lam * sum(cvxpy.norm(block, "fro") for block in C)
    limits = [a + b == d.numpy() for a, b, d in zip(L, C, D, strict=True)]
    oracle = cvxpy.Problem(cvxpy.Minimize(value), limits).solve(solver="SCS", eps=1e-8, max_iters=100_000)
    assert primal == pytest.approx(oracle, rel=1e-5)


@pytest.mark.parametrize("kind", ["unstructured", "dense"])
def test_exact_where_the_certificate_holds(kind):
    """Set, pairs and subspace. A random basis in place of U is at a sine near 1, and has no certificate."""
    truth = draw(kind)
    reading = Reading.of_pairs(truth)
    lam = reading.certified_weight()
    assert reading.proof(lam).verdict(study.MARGIN) == "exact"
    row = reading.measure(lam)
    assert row["exact"] and row["exact_blocks"] and row["gap"] <= study.GAP and row["inside"]
    random = random_frame(20, 2, generator=derive(1, "random"))
    assert sin_theta(leading_basis(reading.solve(lam).low_rank, 2), random) > 0.5, "red if U were any other basis"
    turned = Planted(truth.updates, truth.targets, truth.benign, random, truth.common_part, 0.0)
    assert not Reading.of_pairs(turned).measure(lam)["exact"]


def test_both_signs_with_a_common_part_are_the_same_program():
    reading = Reading.of_pairs(draw("coalition", share=0.4))
    blocks, clean, factor = reading._with_both_signs()
    for lam in (0.2, 0.35):
        one = reading.solve(lam)
        both = decompose(blocks, lam=lam / factor, tolerance=study.GAP)
        assert both.certificate.primal == pytest.approx(math.sqrt(2) * one.certificate.primal, rel=1e-7)
        assert both.common_part.norm() <= 1e-12 * blocks.norm()
    assert int(clean.sum()) == 2 * int(reading.clean.sum())


def test_certificate_of_pairs_is_an_optimal_multiplier():
    """Where it holds, Y of the ordered pairs proves the optimum of the pair program, up to the solver's gap."""
    reading = Reading.of_pairs(draw())
    lam = reading.certified_weight()
    Y = reading.proof(lam).dual
    B = len(reading.blocks)
    torch.testing.assert_close(Y[:B], -Y[B:], rtol=0, atol=1e-10)
    Y = math.sqrt(2) * Y[:B]  # of spectral norm 1 again
    assert np.linalg.norm(wide(Y), 2) == pytest.approx(1, abs=1e-10)
    assert torch.linalg.matrix_norm(Y).max() <= lam * (1 + 1e-10)
    optimum = reading.solve(lam).certificate.primal
    assert float((Y * reading.blocks).sum()) == pytest.approx(optimum, rel=1e-7)


def large(factor=1e3, seed=0):
    """Clients whose contamination off the subspace is so large that the closed form is exact."""
    truth = draw(share=0.25, K=8, seed=seed)
    bad = ~truth.benign
    X = truth.updates.clone()
    noise = torch.randn(int(bad.sum()), 20, 10, generator=derive(seed, "large"), dtype=torch.float64)
    X[bad] = truth.updates[truth.benign].mean(0) + factor * project_out(truth.basis, noise)
    return Planted(X, X, truth.benign, truth.basis, truth.common_part, 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_closed_form_window_is_exact_for_large_contamination(seed):
    truth = large(seed=seed)
    reading = Reading.of_pairs(truth)
    low, high = reading.window
    assert low < high
    for lam, expected in ((0.98 * low, False), (1.02 * low, True), (0.98 * high, True), (1.02 * high, False)):
        proof = reading.proof(lam)
        assert (max(proof.spectral, proof.block) < 1) == expected
        solution = decompose(reading.blocks, lam=lam, with_common=False, tolerance=1e-12)
        sizes = torch.linalg.matrix_norm(solution.contamination)
        clean = sizes <= 1e-8 * sizes.max()
        values = torch.linalg.svdvals(torch.tensor(wide(solution.low_rank)))
        assert (torch.equal(clean, reading.clean) and int((values > 1e-4 * values[0]).sum()) == 2) == expected


def test_window_from_clients_is_that_of_the_pair_blocks():
    truth = large()
    benign = truth.benign[:, None, None]
    centred = truth.updates - truth.updates[truth.benign].mean(0)
    low, high = pair_window(centred * benign, centred * ~benign)
    L, s = (centred * benign).permute(1, 0, 2).flatten(1), int(truth.benign.sum())
    V = torch.linalg.svd(L, full_matrices=False).Vh[:2].reshape(2, 8, 10).permute(1, 0, 2)[truth.benign]
    assert low == pytest.approx(max(float((a - b).norm()) for a in V for b in V) / math.sqrt(s))
    bad = centred[~truth.benign]
    unit = [math.sqrt(s) * c / c.norm() for c in bad] + [(bad[0] - bad[1]) / (bad[0] - bad[1]).norm()]
    assert high == pytest.approx(1 / float(torch.linalg.matrix_norm(torch.cat(unit, 1), ord=2)))


@pytest.mark.parametrize(("s", "b"), [(6, 2), (4, 5), (4, 14)])
def test_ratio_of_windows_for_equidistant_clients_and_unrelated_contamination(s, b):
    p, q = 5, 4 * b  # row 0 is the subspace; each contaminated client has 4 columns of its own off it
    low_rank, contamination = (torch.zeros(s + b, p, q, dtype=torch.float64) for _ in range(2))
    low_rank[:s, 0, :s] = torch.eye(s, dtype=torch.float64) - 1 / s
    for k in range(b):
        contamination[s + k, 1:, 4 * k : 4 * k + 4] = torch.eye(4, dtype=torch.float64)
    low, high = pair_window(low_rank, contamination)
    balanced_low, balanced_high = theory.balanced_window(low_rank, contamination)
    squared = (high / low / (balanced_high / balanced_low)) ** 2
    assert squared == pytest.approx(s * (s**2 - 1) / ((2 * s + b - 1) * (s**2 - b)))
    assert (squared < 1) == (b < 14)


def test_no_contaminated_client_leaves_the_window_open_above():
    blocks = torch.randn(5, 4, 3, generator=derive(0, "open"), dtype=torch.float64)
    low, high = pair_window(blocks - blocks.mean(0), torch.zeros_like(blocks))
    assert 0 < low <= 1 and math.isinf(high)


def test_differences_have_the_centred_stacks_spectrum_times_root_K():
    X = draw().updates
    values = torch.linalg.svdvals(torch.tensor(wide(pair_differences(X))))
    centred = torch.linalg.svdvals(torch.tensor(wide(X - X.mean(0))))
    torch.testing.assert_close(values, math.sqrt(12) * centred)
    benign = torch.arange(12) >= 3
    assert float((~both_of_pair(benign)).double().mean()) == pytest.approx(1 - 9 * 8 / (12 * 11))


def clean_pairs(K, *links):
    clean = torch.zeros(K, K, dtype=torch.bool)
    for j, k in links:
        clean[min(j, k), max(j, k)] = True
    return clean[tuple(torch.triu_indices(K, K, offset=1))]


def test_benign_clients_are_the_largest_group_of_clean_pairs():
    truth = torch.tensor([False, True, True, False, True])
    assert torch.equal(linked_clients(both_of_pair(truth), 5), truth)
    assert torch.equal(linked_clients(clean_pairs(5, (1, 2), (2, 4), (0, 3)), 5), truth)  # pair 1, 4 cut; 0, 3 agree
    assert torch.equal(linked_clients(clean_pairs(4, (2, 3), (0, 1)), 4), torch.tensor([True, True, False, False]))
    assert int(linked_clients(clean_pairs(4), 4).sum()) == 1


def test_reading_by_groups_survives_a_weight_below_the_window():
    """Some pairs of benign clients are cut off, but the others still link all of them."""
    reading = Reading.of_pairs(draw("unstructured", share=0.25))
    row = reading.measure(0.7 * reading.certified_weight())
    assert row["exact_set"] and not row["exact_blocks"] and row["verdict"] == "not exact"


def test_tables_and_proofs_agree(found):
    assert pairwise.proved_exact(found) == 1 and found.gap.max() <= 1e-6
    refuted = found[found.verdict == "not exact"]
    assert len(refuted) and not (refuted.exact & refuted.exact_blocks).any()
    summary = pairwise.summarise(found)
    assert len(summary) == 12 and set(summary.reading) == {CLIENTS, PAIRS}
    clients = found[found.reading == CLIENTS]
    assert (clients.exact_set == clients.exact_blocks).all()
    leads = pairwise.leads(summary)
    assert len(leads) == 6
    dense = leads[(leads.contamination == "dense") & (leads.share == 0.6) & (leads.common == 1)].iloc[0]
    assert dense["lead in exact"] == dense["exact, pair blocks"] - dense["exact, client blocks"]
    right = pairwise.predictors(found)
    assert len(right) == 8 and right[right.predictor == "certificate holds"].right.min() >= 0.75


def test_client_blocks_are_the_program_of_the_notebook():
    truth = draw()
    reading = Reading.of_clients(truth)
    certified, row = study.prove(truth)
    assert reading.certified_weight() == certified
    expected = study.convex_row(truth, decompose(truth.updates, lam=certified, tolerance=study.GAP))
    measured = reading.measure(certified)
    assert {key: measured[key] for key in ("sine", "exact", "exact_set", "gap")} == {
        key: expected[key] for key in ("sine", "exact", "exact_set", "gap")
    }
    assert reading.window[1] / reading.window[0] == pytest.approx(row["balanced"])


def test_windows_found_lie_between_those_proved(weights):
    table = pairwise.windows(weights).set_index("reading")
    assert (table.proved_low < 1).all() and (table.proved_high > 1).all()
    step = 2**0.26  # weights tried are 2**0.25 apart
    assert (table.found_low >= table.proved_low / step).all() and (table.found_low <= table.proved_low * step**2).all()
    assert (table.found_high <= table.proved_high * step).all() and (table.found_high >= 1).all()
    assert table.proved_width[PAIRS] < table.proved_width[CLIENTS]
    ratio = weights[weights.factor == 1].groupby("reading").lam.median()
    torch.testing.assert_close(torch.tensor(table.lam[PAIRS]), torch.tensor(ratio[PAIRS]))


def test_speed_table():
    table = pairwise.speed_study([5, 6], 1, p=12, q=6)
    assert list(table.blocks) == [5, 10, 6, 15]
    assert (table.over_clients[table.reading == CLIENTS] == 1).all() and (table.seconds > 0).all()


def test_figures_draw_from_their_tables(found, weights):
    summary, windows = pairwise.summarise(found), pairwise.windows(weights)
    closed = windows.assign(proved_low=1.1, proved_high=0.9, proved_width=0.8, low=2.0, high=1.0)
    rates = plots.reading_rates(summary)
    figures = [rates, plots.weight_windows(windows), plots.weight_windows(closed)]
    for figure in figures:
        figure.canvas.draw()
    assert len(rates.axes) == 8
    line = rates.axes[0].lines[1]  # dense, common part, exact, pair blocks
    rows = summary.query("contamination == 'dense' and common == 1 and reading == @PAIRS")
    np.testing.assert_array_equal(line.get_ydata(), rows.exact)
    assert len(figures[1].axes[0].patches) == 2 and len(figures[2].axes[0].patches) == 0


def test_lambda_window_is_reused_unchanged():
    """The closed form is a call of the library's window, so its conventions hold: S by ``NEGLIGIBLE``, rank by size."""
    truth = large()
    reading = Reading.of_pairs(truth)
    low_rank = torch.where(reading.clean[:, None, None], reading.blocks, 0.0)
    off = torch.where(reading.clean[:, None, None], 0.0, reading.blocks)
    np.testing.assert_allclose(lambda_window(low_rank, off), reading.window, rtol=2e-3)


def test_tables_from_made_up_rows():
    base = {"contamination": "dense", "share": 0.2, "rank": 1, "common": 1.0, "exact_blocks": True, "gap": 0.0}
    base |= {"iterations": 3, "seconds": 0.1, "sine": 0.0, "verdict": "exact"}
    rows = [base | {"reading": r, "exact": e, "exact_set": True} for r, e in ((CLIENTS, True), (PAIRS, False))]
    table = pd.DataFrame(rows)
    assert pairwise.proved_exact(table) == 0
    [lead] = pairwise.leads(pairwise.summarise(table)).itertuples(index=False)
    assert (lead[-2], lead[-1]) == (-1, 0)
