"""Statement 4: closed forms of the refined error, the boundary, two readings of the same updates, the tables."""

from __future__ import annotations

from dataclasses import astuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from clairlib.core.seeds import derive
from clairlib.recovery.frame import fit_frame
from clairlib.recovery.refinement import refined_core
from clairlib.simulate import planted
from clairlib.theory import refinement_gain as oracle_gain
from studies.common.intervals import agreement
from studies.common.verdicts import benign_error
from studies.refinement_gain import plots as gain_plots
from studies.refinement_gain import study as gain

SIZE = {"noise": 0.03, "p": 50, "q": 10, "r": 3, "s": 17}
BASE = {**gain.SHAPE, "noise": 0.1}


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def measured(ratio: float, draws: int = 40, **changes) -> pd.DataFrame:
    """Terms of the base shape by oracle and term: measured, formula, z."""
    cell = {**BASE, "ratio": ratio, **changes}
    rows = gain.summarise_terms(gain.gain_study("terms", [cell], draws))
    return rows.set_index(["told", "term"])


@pytest.mark.parametrize("ratio", [0.0, 1.5])
def test_statement4_refined_error_follows_the_formula(ratio):
    """Every term within 4 standard errors of 40 draws, and the total to 2 %; with a random basis it is far off."""
    rows = measured(ratio)
    assert (rows.z.abs().dropna() < 4).all()
    totals = rows.xs("total", level="term")
    assert np.allclose(totals.measured, totals.formula, rtol=0.02)
    random = measured(ratio, basis="random").loc[("P", "total")]
    assert random.z > 30 and random.measured > 1.5 * random.formula


def test_first_order_is_the_limit_of_little_noise_and_not_enough_at_high_noise():
    for order in (1, 2):
        near = oracle_gain.estimated_terms(**{**SIZE, "noise": 1e-4}, heterogeneity=1e-3, order=order)
        assert near.subspace_cost == pytest.approx((1e-8 - 1e-6 / 470) * 47 * 3 / 17, rel=1e-6)
    raw = gain.gain_study("terms", [{**BASE, "noise": 0.3, "ratio": 0.0}], 40)
    first, second = (gain.summarise_terms(raw, order).set_index(["told", "term"]).z for order in (1, 2))
    assert first[("r", "subspace_cost")] > 5 and abs(second[("r", "subspace_cost")]) < 4


def test_terms_add_up_to_the_error_exactly():
    truth = gain.draw("sum", 0, 12, 0.25, 4, 2, 0.3, 0.8)
    frame = gain.oracle_frame(truth)
    errors = (refined_core(truth.updates, frame) - truth.targets)[truth.benign]
    terms = oracle_gain.measured_terms(errors, truth.targets[truth.benign], truth.basis)
    assert terms.total == pytest.approx(benign_error(refined_core(truth.updates, frame), truth), rel=1e-12)
    oracle = oracle_gain.measured_terms(
        (gain.refined_core(truth.updates, gain.replace(frame, basis=truth.basis)) - truth.targets)[truth.benign],
        truth.targets[truth.benign],
        truth.basis,
    )
    assert oracle.subspace_cost == pytest.approx(0.0, abs=1e-12)


def test_gain_is_the_oracle_gain_less_cost_and_heterogeneity():
    for h in (0.0, 0.3, 2.0):
        tau2 = h**2 / 470
        expected = (SIZE["noise"] ** 2 - tau2) * 47 * (160 - 3) / 17  # (sigma^2 - tau^2) (p - r) (n - r) / s
        assert oracle_gain.gain(**SIZE, heterogeneity=h, order=1) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("order", [1, 2])
def test_boundaries_are_roots_of_the_gain(order):
    h = oracle_gain.boundary_heterogeneity(**SIZE, order=order)
    scale = oracle_gain.local_error(SIZE["noise"], 50, 10)
    assert oracle_gain.gain(**SIZE, heterogeneity=h, order=order) == pytest.approx(0.0, abs=1e-12 * scale)
    assert oracle_gain.gain(**SIZE, heterogeneity=0.99 * h, order=order) > 0
    n = oracle_gain.boundary_samples(**SIZE, heterogeneity=h, order=order)
    assert n == pytest.approx(1.0, rel=1e-9)  # h is the boundary at this very noise
    assert np.isnan(oracle_gain.boundary_heterogeneity(**{**SIZE, "q": 1, "s": 4}))  # n <= r + 1: no second order


@pytest.mark.parametrize("K, q, h", [(16, 10, 0.0), (16, 10, 3.0), (7, 4, 0.5)])
def test_stein_error_is_unbiased(K, q, h):
    """n > p and n < p, heterogeneity far above the boundary included: paired difference within 4 standard errors."""
    apart = []
    for seed in range(80):
        truth = planted(share=0.0, K=K, q=q, noise_std=0.3 / q**0.5, heterogeneity=h, generator=derive(seed, "stein"))
        frame = fit_frame(truth.updates, torch.ones(K, dtype=torch.float64), truth.benign, 3)
        error = benign_error(refined_core(truth.updates, frame), truth)
        apart.append(oracle_gain.stein_error(frame, truth.noise_std) - error)
    apart = np.array(apart)
    assert abs(apart.mean()) < 4 * apart.std(ddof=1) / 80**0.5


def test_two_readings_share_the_updates_and_are_both_within_the_model():
    sigma, tau, shape = 0.03, 0.05, {"K": 60, "share": 0.2, "p": 40, "q": 10, "r": 3}
    both = oracle_gain.two_readings(noise=sigma, spread=tau, generator=derive(0, "two"), **shape)
    for targets, noise in ((both.different, both.noise), (both.alike, both.noise_alike)):
        left = (both.updates - targets).flatten()
        assert float(left.std()) == pytest.approx(noise, rel=0.03)
    G = (both.different - both.alike)[both.benign]
    assert float(G.std()) == pytest.approx(tau, rel=0.03)
    centred = both.different[both.benign] - both.different[both.benign].mean(dim=0)
    basis = fit_frame(both.alike, torch.ones(60, dtype=torch.float64), both.benign, 3).basis
    rows = (basis.T @ centred).square().sum(dim=2).mean()  # rows of A_k of the first reading: unit expected size
    assert float(rows) == pytest.approx(1.0, rel=0.15)


def test_a_rule_is_right_in_one_reading_and_the_told_one_in_both():
    rows = gain.gain_study("readings", [{**BASE, "ratio": 1.5}], 2)
    plain, told = (
        gain.summarise_decisions(rows, ["reading", "noise", "ratio"], rule).set_index("reading")
        for rule in ("refines", "told_refines")
    )
    assert plain.gain["different"] < 0 < plain.gain["alike"]
    assert plain.right.sum() == 1 and (told.right == 1).all()


def test_weighted_formula_reduces_to_the_plain_one_and_is_followed():
    plain = oracle_gain.oracle_terms(**SIZE)
    for told in (True, False):
        equal = oracle_gain.weighted_oracle_terms(noise=0.03, p=50, q=10, r=3, weights=[1.0] * 17, told=told)
        assert astuple(equal) == pytest.approx(astuple(plain))
    rows = []
    w = 16 ** torch.linspace(-0.5, 0.5, 24, dtype=torch.float64)
    for seed in range(40):
        truth = gain.draw("weighted", seed, **BASE, weights=w)
        frame = gain.replace(gain.oracle_frame(truth, w), basis=truth.basis)
        size = {"noise": truth.noise_std, "p": 50, "q": 10, "r": 3, "weights": w[truth.benign].tolist()}
        formula = oracle_gain.weighted_oracle_terms(**size).total
        rows.append(benign_error(refined_core(truth.updates, frame), truth) / formula - 1)
    assert abs(np.mean(rows)) < 4 * np.std(rows, ddof=1) / 40**0.5


def test_crossing_is_interpolated_and_its_error_is_that_of_the_gain():
    places = np.array([0.9, 1.0, 1.1])
    gains = np.array([[3.0, 1.0, -1.0], [1.0, -1.0, -3.0]])  # mean 2, 0, -2
    at, error = oracle_gain.crossing(places, gains)
    assert at == pytest.approx(1.0) and error == pytest.approx(2**0.5 / 2**0.5 / 20)
    assert np.isnan(oracle_gain.crossing(places, gains + 10)[0])


def test_agreement_finds_a_wrong_formula_and_passes_a_right_one():
    z = np.random.default_rng(0).standard_t(49, size=200)
    table = pd.DataFrame({"term": "total", "z": z, "draws": 50})
    assert agreement(table)[["p_max", "p_value"]].min(axis=None) > 0.01
    assert agreement(table.assign(z=z + 1.0)).p_value[0] < 1e-9
    assert agreement(table.assign(z=np.append(z[1:], 7.0))).p_max[0] < 1e-4


def test_no_gain_with_too_few_clients_and_the_sign_of_the_boundary_beyond():
    cells = [{"q": 1, "r": 3, "share": 0.0, "noise": 0.1, "K": K, "ratio": h} for K in (3, 4, 8) for h in (0.0, 1.5)]
    rows = gain.summarise_clients(gain.gain_study("terms", cells, 20)).set_index(["s", "ratio"])
    assert rows.gain.loc[[3, 4]].abs().max() < 1e-12 and not rows.enough.loc[[3, 4]].any()
    assert rows.low[(8, 0.0)] > 0 > rows.high[(8, 1.5)]


def test_tables_of_clair_boundary_and_weights_feed_their_figures():
    low = [{**BASE, "ratio": ratio, "rank": 1} for ratio in (0.0, 1.4)]
    draws = gain.gain_study("clair", low, 2)
    decided = gain.summarise_decisions(draws, ["rank", "noise", "ratio"])
    assert list(decided.refines) == [1.0, 0.0] and decided.right.min() == 1
    methods = gain.summarise_methods(draws[draws.ratio == 0])
    assert (methods.over_other < 0.5).all() and set(methods.method) == set(gain.METHODS)
    cells = [{**BASE, "axis": axis} for axis in ("heterogeneity", "samples")]
    boundary = gain.summarise_boundary(gain.gain_study("boundary", cells, 10))
    assert (boundary.crossing - boundary.second).abs().max() < 0.05 and boundary.z.abs().max() < 5
    weights = gain.summarise_weights(gain.gain_study("weights", [{"spread": 4.0, "noise": 0.1}], 2))
    assert weights.formula[weights.told].item() < weights.formula[~weights.told].item()
    terms = measured(0.0, draws=4).reset_index()
    clients = pd.DataFrame({"s": [4, 8], "ratio": 0.0, "gain": [0.0, 0.4], "low": 0.0, "high": 0.5, "formula": 0.2})
    readings = pd.DataFrame({"reading": ["different", "alike"], "noise": 0.1, "ratio": 1.5, "right": [0.0, 1.0]})
    figures = [
        gain_plots.terms(terms),
        gain_plots.methods(methods),
        gain_plots.boundary(boundary, clients),
        gain_plots.decisions(decided, readings, readings),
        gain_plots.weights(weights),
    ]
    for figure in figures:
        figure.canvas.draw()
    assert [bar.get_width() for bar in figures[3].axes[1].patches][:2] == [0.0, 1.0]
