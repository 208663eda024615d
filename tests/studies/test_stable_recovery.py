"""Statement 2b: recovery is stable under preliminary estimation error, at the rates of the closed forms."""

from __future__ import annotations

import math

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.linalg import subspace_angles

from clairlib.core.seeds import derive
from clairlib.linalg.subspace import project_out, sin_theta
from clairlib.recovery.frame import fit_frame
from clairlib.simulate import planted
from clairlib.simulate.attacks import random_frame
from clairlib.theory import stable_recovery as rates
from studies.common.intervals import slope_interval
from studies.stable_recovery import plots as stability_plots
from studies.stable_recovery.study import (
    BASE,
    FOUND,
    PREDICTED,
    TOLD,
    UNWEIGHTED,
    against_oracle,
    compare,
    exponents,
    false_alarms,
    group_errors,
    largest_exponents,
    noise_curve,
    over_prediction,
    plant,
    regressor,
    setting,
    stability_cell,
    stability_study,
    weights_ratio,
    worst_prediction,
)


@pytest.fixture(scope="module")
def study() -> pd.DataFrame:
    axes = {"sigma": [0.005, 0.02], "p": [20, 40], "white": [0.01, 0.6], "coloured": [0.01], "unequal": [1.25, 9.0]}
    return stability_study(axes, 3, 1)


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=derive(seed, "normals"), dtype=torch.float64)


def wide(blocks: torch.Tensor) -> torch.Tensor:
    """Centred blocks side by side."""
    return (blocks - blocks.mean(dim=0)).permute(1, 0, 2).flatten(1)


def benign_parts(noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Basis, centred coefficients, centred errors, and the subspace estimated from the benign clients."""
    truth = planted(share=0.0, K=12, p=20, q=6, r=2, noise_std=noise, generator=derive(seed, "statement 2b"))
    U = truth.basis
    everybody = torch.ones(12, dtype=torch.bool)
    found = fit_frame(truth.updates, torch.ones(12, dtype=torch.float64), everybody, 2).basis
    return U, wide(U.T @ truth.targets), wide(truth.updates - truth.targets), found


def remainder(basis: torch.Tensor, U: torch.Tensor, A: torch.Tensor, E: torch.Tensor) -> tuple[float, float]:
    """||P_perp U_hat (U' U_hat)^-1 - W||_2, W = P_perp E A' (A A')^-1, and the most that it can be.

    Z = P_perp U_hat (U' U_hat)^-1 solves Z G = P E A' + P E E'U + P E E'P Z - Z U'XX'P Z - Z (U'XX'U - G), X = U A + E.
    With e = ||E|| / sigma_r(A), c = ||A|| / sigma_r(A) and ||Z|| <= z = 2 e / sqrt(1 - 4 e^2) (part i) the terms after
    the first are at most e^2 + e^2 z + z^2 (c + e) e + z (2 c e + e^2).
    """
    W = project_out(U, E @ A.T) @ torch.linalg.inv(A @ A.T)
    Z = project_out(U, basis) @ torch.linalg.inv(U.T @ basis)
    values = torch.linalg.svdvals(A)
    e, c = float(torch.linalg.matrix_norm(E, 2) / values[-1]), float(values[0] / values[-1])
    z = 2 * e / math.sqrt(1 - 4 * e**2)
    most = e**2 + e**2 * z + z**2 * (c + e) * e + z * (2 * c * e + e**2)
    return float(torch.linalg.matrix_norm(Z - W, 2)), most


@pytest.mark.parametrize("noise", [1e-3, 1e-4, 1e-5])
def test_statement2b_error_is_first_order_in_the_noise(noise):
    U, A, E, found = benign_parts(noise)
    difference, most = remainder(found, U, A, E)
    assert difference <= most
    stranger = random_frame(20, 2, generator=derive(1, "stranger"))
    assert remainder(stranger, U, A, E)[0] > 100 * most
    assert most < 300 * noise**2  # of second order


@pytest.mark.parametrize("noise", [1e-4, 0.03, 0.1, 1.0])
def test_statement2b_largest_sine_is_within_the_deterministic_bound(noise):
    for seed in range(5):
        U, A, E, found = benign_parts(noise, seed)
        blocks = (X.unflatten(1, (12, 6)).permute(1, 0, 2) for X in (E, A))
        assert sin_theta(found, U) <= rates.stability_bound(*blocks)


def test_subspace_distance_against_scipy():
    first, second = (random_frame(9, 3, generator=derive(k, "frame")) for k in range(2))
    angles = subspace_angles(first.numpy(), second.numpy())
    assert rates.subspace_distance(first, second) == pytest.approx(np.linalg.norm(np.sin(angles)), rel=1e-12)
    assert rates.subspace_distance(first, first[:, :2]) == pytest.approx(0.5**0.5, rel=1e-12)
    assert rates.subspace_distance(first, first.flip(1)) < 1e-15


def test_first_order_is_the_mean_over_coefficients():
    s, r, q, count = 5, 2, 4, 4000
    draws = normals(count, s, r, q) / q**0.5
    given = np.array([rates.first_order_given(A, 0.3**2 * (11 - r)) for A in draws])
    assert given.mean() == pytest.approx(rates.first_order(0.3, 11, q, s, r), abs=4 * given.std() / count**0.5)


def test_first_order_with_weights_and_unequal_noise_is_the_variance_of_w():
    s, p, r, q, count = 6, 7, 2, 3, 3000
    A, U = normals(s, r, q), random_frame(p, r, generator=derive(0, "U"))
    v, w = torch.linspace(0.5, 3, s).double(), torch.linspace(2, 1, s).double()
    E = normals(count, s, p, q, seed=1) * v.sqrt()[:, None, None]
    centred = A - torch.einsum("k,krq->rq", w / w.sum(), A)
    inverse = torch.linalg.inv(torch.einsum("k,krq,ktq->rt", w, centred, centred))
    W = project_out(U, torch.einsum("k,nkpq,krq->npr", w, E, centred)) @ inverse
    squares = W.square().sum(dim=(1, 2))
    predicted = rates.first_order_given(A, p - r, weights=w, variances=v)
    assert predicted == pytest.approx(float(squares.mean()), abs=4 * float(squares.std()) / count**0.5)
    best = rates.first_order_given(A, p - r, weights=1 / v, variances=v)
    assert best < predicted and best < rates.first_order_given(A, p - r, variances=v)


def test_weights_ratio_is_the_limit_of_many_columns():
    """Centring leaves sum(w) - sum(w^2) / sum(w) of sum(w) and s - 1 of s, both known exactly."""
    w = torch.tensor([1.0, 1 / 4] * 10, dtype=torch.float64)
    A = normals(20, 2, 5000)
    ratio = rates.first_order_given(A, 1.0, variances=1 / w) / rates.first_order_given(
        A, 1.0, weights=w, variances=1 / w
    )
    finite = float((1 - w.square().sum() / w.sum() ** 2) * 20 / 19)
    assert ratio == pytest.approx(rates.unweighted_over_weighted(w) * finite, rel=0.02)
    assert rates.unweighted_over_weighted(w) == pytest.approx(0.625 * 2.5)


def test_spiked_starts_at_first_order_and_ends_at_the_breakdown():
    sizes = (50, 10, 17, 3)
    gamma, spike = 47 / 156, 1 / (10 * 0.01**2)
    relative = rates.spiked(0.01, *sizes) / rates.first_order(0.01, *sizes)
    assert relative == pytest.approx(1 + (1 - gamma) / spike, abs=2 / spike**2)
    edge = rates.breakdown(*sizes)
    assert rates.spiked(edge * (1 - 1e-9), *sizes) == pytest.approx(3, rel=1e-6)
    assert rates.spiked(1.5 * edge, *sizes) == 3
    assert rates.breakdown(*sizes, signal=2.0) == pytest.approx(2 * edge)


def test_coloured_is_spiked_for_white_noise_and_the_population_tilt_for_many_clients():
    U = random_frame(40, 3, generator=derive(0, "U"))
    noise = 0.02
    white = rates.coloured(U, noise**2 * torch.eye(40, dtype=torch.float64), 10, 17)
    spike = 1 / (10 * noise**2)
    assert white == pytest.approx(rates.spiked(noise, 40, 10, 17, 3), rel=2 / spike**2)
    covariance = noise**2 * rates.row_covariance(40, 0.6)
    tilted = torch.linalg.eigh(U @ U.T / 10 + covariance)[1][:, -3:]
    exact = rates.subspace_distance(tilted, U) ** 2
    assert rates.coloured(U, covariance, 10, 10**12) == pytest.approx(exact, rel=4 * 4 / spike)
    assert rates.coloured(U, covariance * 1e4, 10, 17) == 3


def test_coloured_breakdown_is_where_the_noise_outgrows_the_subspace():
    noise = rates.coloured_breakdown(0.6, 10)
    top = float(torch.linalg.eigvalsh(rates.row_covariance(800, 0.6))[-1])
    assert 1 / 10 + noise**2 == pytest.approx(noise**2 * top, rel=1e-3)


@pytest.mark.parametrize("p", [12, 60])
def test_largest_sine_is_the_mean_root_of_two_wishart_matrices(p):
    s, q, r, count = 8, 5, 3, 600
    G, Z = normals(count, r, (s - 1) * q), normals(count, p - r, r, seed=1)
    roots = torch.linalg.eigvals(torch.linalg.inv(G @ G.mT) @ Z.mT @ Z).real.amax(dim=1)
    measured = float((0.01 * (q * roots).sqrt()).mean())
    assert rates.largest_sine(0.01, p, q, s, r) == pytest.approx(measured, rel=0.03)  # Tracy-Widom at r = 3


def test_settings_change_one_thing():
    assert (setting("s", 10).s, setting("p", 20.0).p, BASE.s) == (7, 20, 17)
    assert setting("q_entry", 40).signal == pytest.approx(2.0) and setting("q", 40).signal == 1
    assert setting("coloured", 0.1).row_correlation == 0.6 and setting("white", 0.1).row_correlation == 0
    weights = setting("unequal", 4.0).weights
    assert weights is not None and weights[:2].tolist() == [1.0, 0.25]
    assert regressor("p", 20) == 17 and regressor("q_entry", 10) == pytest.approx(16 * 10 - 4)
    assert regressor("s", 24) == pytest.approx(15.6) and regressor("sigma", 0.02) == 0.02


@pytest.mark.parametrize("axis", sorted(PREDICTED))
def test_first_order_has_the_predicted_exponents_exactly(axis):
    levels = {"sigma": (0.001, 0.004), "s": (10, 64), "p": (20, 160), "a": (0.5, 4), "q": (4, 32), "q_entry": (4, 32)}
    x = [regressor(axis, v) for v in levels[axis]]
    y = [rates.first_order(*setting(axis, v).sizes) ** 0.5 for v in levels[axis]]
    if axis == "q":  # the finite-size factor, as in group_errors
        y = [e * (regressor("q_entry", v) / v) ** 0.5 for e, v in zip(y, levels[axis], strict=True)]
    slope = math.log(y[1] / y[0]) / math.log(x[1] / x[0])
    assert slope == pytest.approx(PREDICTED[axis], abs=1e-12)


def test_a_stronger_signal_is_less_noise_and_a_smaller_common_part():
    strong = plant(setting("a", 4.0), derive(0, "signal"))
    weak = plant(BASE, derive(0, "signal"))
    assert strong.noise_std == pytest.approx(weak.noise_std / 4)
    assert torch.allclose(strong.common_part, weak.common_part / 4)
    assert torch.equal(strong.basis, weak.basis)


def test_a_random_basis_and_a_wrong_verdict_are_seen():
    truth = plant(BASE, derive(0, "compare"))
    stranger = random_frame(50, 3, generator=derive(1, "stranger"))
    row = compare(stranger, ~truth.benign, truth)
    assert row["error"] > 1 and not row["exact"] and row["exact_rank"] and row["false_alarms"] == 17
    row = compare(truth.basis[:, :2], truth.benign, truth)
    assert row["error"] == pytest.approx(0.5**0.5) and row["exact"] and not row["exact_rank"]


def test_cell_is_a_function_of_its_arguments():
    first, again, other = (stability_cell("sigma", 0.01, g, 1, 0)["stability"] for g in (0, 0, 1))
    assert first == again and first != other
    assert [row["method"] for row in first] == [FOUND, TOLD]


def test_groups_must_divide_the_draws():
    with pytest.raises(ValueError, match="groups of 3 do not divide 10"):
        stability_study({"sigma": [0.01]}, 10, 3)


def test_slopes_are_ordinary_least_squares(study):
    groups = group_errors(study[study.axis.isin(PREDICTED)])
    table = exponents(groups).set_index(["axis", "method"])
    part = groups[(groups.axis == "p") & (groups.method == TOLD)]
    assert table.slope["p", TOLD] == pytest.approx(np.polyfit(np.log(part.x), np.log(part.error), 1)[0])
    assert table.slope["sigma", FOUND] == pytest.approx(1, abs=0.25)
    corrected = largest_exponents(groups)
    assert ((corrected.corrected > 0.4) & (corrected.corrected < 0.5)).all()


def test_an_interval_excludes_a_wrong_exponent():
    x = np.repeat([1.0, 2.0, 4.0, 8.0], 5)
    y = x**0.5 * np.exp(0.02 * normals(20).numpy())
    slope, low, high = slope_interval(x, y, 0.99)
    assert low < 0.5 < high and high < 0.55 and low > 0.45 and low < slope < high


def test_small_noise_agrees_with_first_order_and_the_oracle(study):
    small = study[study.axis.isin(["sigma", "p"])]
    table = over_prediction(small).set_index("method")
    assert table.low[FOUND] < 1 < table.high[FOUND] and table.over_predicted[FOUND] == pytest.approx(1, abs=0.25)
    oracle = against_oracle(small)
    assert (oracle["median"] <= 1.05).all() and (oracle.over_bound == 0).all()


def test_a_wrong_rank_counts_against_clair_but_has_no_angles(study):
    small = study[study.axis == "sigma"].reset_index(drop=True)
    spoiled = small.index[small.method == FOUND][0]
    worse = small.copy()
    worse.loc[spoiled, ["error", "exact_rank"]] = [1.0, False]
    worse["exact_rank"] = worse.exact_rank.astype(bool)
    assert len(group_errors(worse)) == len(group_errors(small)) - 1
    assert group_errors(worse).error.max() < 0.2
    before, after = (against_oracle(table).iloc[0] for table in (small, worse))
    assert (before.wrong_rank, after.wrong_rank) == (0, 1) and before.share_close - after.share_close > 0.3


def test_noise_curve_breaks_beyond_the_breakdown(study):
    curve = noise_curve(study[study.axis.isin(["white", "coloured"])])
    lost = curve[curve.noise == 0.6]
    assert (lost.exact[lost.method == FOUND] == 0).all() and (lost.noise > lost.breakdown).all()
    found = curve[(curve.noise == 0.01) & (curve.method == FOUND)]
    assert (found.exact == 1).all() and (found.rms < 0.05).all() and lost.rms.min() > 1
    assert worst_prediction(curve) < 0.6


def test_weights_repair_the_verdicts_and_lower_the_error(study):
    part = study[study.axis == "unequal"]
    alarms = false_alarms(part).set_index(["unequal", "method"])
    assert alarms.anybody[9.0, FOUND] == 0 and alarms.noisy[9.0, UNWEIGHTED[FOUND]] > 0.9
    ratios = weights_ratio(part).set_index("unequal")
    assert ratios.closed_form[9.0] == pytest.approx(10 * 10 / 9 / 4)
    assert ratios.measured[9.0] > 1.5 and ratios.over_predicted[9.0] == pytest.approx(1, abs=0.5)
    assert ratios.draws.tolist() == [3, 3, 6]


def test_figures_draw_from_their_tables(study):
    groups = group_errors(study[study.axis.isin(PREDICTED)])
    slopes = exponents(groups)
    every = pd.concat([slopes.assign(axis=axis) for axis in ("s", "a", "q")])
    more = pd.concat([groups[groups.axis == "p"].assign(axis=axis) for axis in ("s", "a", "q", "q_entry")])
    six = pd.concat([slopes, slopes[slopes.axis == "p"].assign(axis="q_entry"), every[every.predicted == 0.5]])
    part = study[study.axis == "unequal"]
    for figure in (
        stability_plots.exponent_panels(pd.concat([groups, more]), six),
        stability_plots.slope_deviations(slopes),
        stability_plots.noise_curves(noise_curve(study[study.axis.isin(["white", "coloured"])]), BASE.r),
        stability_plots.unequal_noise(weights_ratio(part), false_alarms(part)),
    ):
        figure.canvas.draw()
        assert all(axes.has_data() for axes in figure.axes)
    plt.close("all")
