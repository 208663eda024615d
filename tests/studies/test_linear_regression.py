"""Linear regression: the fits, the joint refit, the designs, and the tables that the claims are computed from."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
import torch
from scipy.optimize import minimize

from clairlib.core.seeds import derive
from clairlib.linalg.subspace import project_out, sin_theta
from clairlib.reproduce.sweep import grid
from clairlib.simulate.attacks import random_frame
from studies.linear_regression import designs as regression_clients
from studies.linear_regression import least_squares as regression
from studies.linear_regression import plots as regression_plots
from studies.linear_regression import study
from studies.linear_regression.least_squares import least_squares, oracle_terms, pool, spectral, within


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def draw(*shape, name="x"):
    return torch.randn(*shape, generator=derive(0, "test", name), dtype=torch.float64)


def planted(K=20, n=60, p=12, q=2, r=2, *, off=0.0, common=0.0, noise=0.5, name="planted"):
    """Clients' data, their coefficients, the subspace and the common part off it."""
    generator = derive(0, "test", name)
    options = {"generator": generator, "dtype": torch.float64}
    U = random_frame(p, r, generator=generator)
    C = common * project_out(U, torch.randn(p, q, **options))
    targets = C + U @ torch.randn(K, r, q, **options) + off * project_out(U, torch.randn(K, p, q, **options))
    X = torch.randn(K, n, p, **options)
    Y = X @ targets + noise * torch.randn(K, n, q, **options)
    return least_squares(list(X), list(Y)), targets, U, C


def test_fits_are_those_of_statsmodels():
    X = [draw(n, 4, name=f"X{n}") for n in (9, 30)]
    Y = [draw(n, 2, name=f"Y{n}") for n in (9, 30)]
    fits = least_squares(X, Y)
    for k in range(2):
        each = [sm.OLS(Y[k][:, j].numpy(), X[k].numpy()).fit() for j in range(2)]
        assert np.allclose(fits.estimates[k], np.column_stack([one.params for one in each]))
        assert float(fits.noise[k]) == pytest.approx(np.mean([one.mse_resid for one in each]))
        variances = [np.diag(one.normalized_cov_params).mean() for one in each]
        assert float(fits.weights[k]) == pytest.approx(1 / (float(fits.noise[k]) * variances[0]))


def test_a_client_that_cannot_be_fitted_is_named():
    good = draw(9, 4)
    with pytest.raises(ValueError, match="client 1 has 4 samples"):
        least_squares([good, good[:4]], [good[:, :1], good[:4, :1]])
    with pytest.raises(ValueError, match="client 0 has linearly dependent"):
        least_squares([good[:, [0, 1, 2, 2]]], [good[:, :1]])


def test_precision_is_unbiased_for_one_over_the_variance():
    X, Y = [draw(10, 4)] * 4000, list(draw(4000, 10, 1, name="noise"))
    precision = least_squares(X, Y).precision  # 6 degrees of freedom: uncorrected, the mean would be 1.5
    assert abs(float(precision.mean()) - 1) < 4 * float(precision.std()) / 4000**0.5


def test_statement4_with_the_covariance_of_the_estimators():
    p, r, K, draws, sigma = 8, 2, 6, 4000, 0.7
    root = torch.linalg.cholesky(0.6 ** (torch.arange(p).double()[:, None] - torch.arange(p)).abs())
    sizes = [12, 15, 20, 30, 40, 60]
    X = [draw(n, p, name=f"design{n}") @ root.T for n in sizes]
    gram = torch.stack([x.T @ x for x in X])
    U, w = random_frame(p, r, generator=derive(0, "test", "U")), torch.tensor(sizes).double()
    errors = torch.stack([  # of the estimates: their refined errors do not depend on the coefficients
        torch.linalg.solve(gram[k], X[k].T @ (sigma * draw(draws, n, 3, name=f"E{n}"))) for k, n in enumerate(sizes)
    ])  # (K, draws, p, q)
    mean = torch.einsum("k,kdpq->dpq", w / w.sum(), errors)
    refined = errors - project_out(U, errors - mean)
    measured = refined.square().sum(dim=(2, 3)).mean(dim=0)
    variances = torch.full((K,), sigma**2, dtype=torch.float64)
    error = float(measured.std()) / draws**0.5
    assert abs(float(measured.mean()) - oracle_terms(gram, variances, U, w, 3).total) < 4 * error
    other = random_frame(p, r, generator=derive(0, "test", "other"))
    assert abs(float(measured.mean()) - oracle_terms(gram, variances, other, w, 3).total) > 4 * error


def test_within_is_least_squares_in_the_affine_subspace():
    fits, _, U, _ = planted()
    C = project_out(U, draw(12, 2))
    B = within(fits, U, C)
    assert project_out(U, B - C).abs().max() < 1e-12
    gradient = U.T @ (fits.gram @ B - fits.moments)
    assert gradient.abs().max() < 1e-9 * fits.moments.abs().max()


def test_pool_recovers_without_noise_and_keeps_who_is_not_benign():
    fits, targets, U, _ = planted(noise=1e-6, common=1.0)
    benign = torch.arange(20) >= 3
    for rank in (0, 2, 5):  # wherever the search for it starts
        result = pool(fits, benign, rank)
        assert torch.equal(result.coefficients[:3], fits.estimates[:3])
        assert (result.coefficients - targets)[3:].abs().max() < 1e-6  # of the noise, and 60 samples average it
        assert sin_theta(result.basis, U) < 1e-6


def test_pool_estimates_the_spread_off_the_subspace():
    for off in (0.0, 0.1, 0.4):
        fits, _, _, _ = planted(K=40, off=off, name=f"off{off}")
        result = pool(fits, torch.ones(40, dtype=torch.bool), 2)
        # the excess has (p - r) K q = 800 terms of variance noise^2 / n = .0042 and tau^2: 4 standard deviations, and
        # what the subspace, fitted to H_k as well, takes of them: (p - r) r of the 800 terms
        assert abs(result.spread - off**2) < 4 * (2 / 800) ** 0.5 * (0.0042 + off**2) + 20 / 800 * off**2


def test_pool_drops_the_common_part_where_none_is_seen():
    everyone = torch.ones(20, dtype=torch.bool)
    for common, kept in ((0.0, False), (1.0, True)):
        fits, _, _, _ = planted(common=common, name=f"common{common}")
        assert bool(pool(fits, everyone, 2).common.any()) is kept


def test_pool_finds_the_rank_down_and_up():
    everyone = torch.ones(20, dtype=torch.bool)
    fits, _, _, _ = planted(r=3, common=1.0)
    assert [pool(fits, everyone, rank).basis.shape[1] for rank in (0, 2, 3, 4, 8)] == [3] * 5
    alike, targets, _, _ = planted(r=0, common=1.0)  # all the same: one regression for everybody
    result = pool(alike, everyone, 2)
    assert result.basis.shape[1] == 0 and result.spread < 1e-3
    assert (result.common - targets[0]).abs().max() < 5 * 0.5 / 1200**0.5 * 2  # 1200 samples; tau^2 is not exactly 0


def test_pool_refuses_by_degrees():
    everyone = torch.ones(20, dtype=torch.bool)
    fits, targets, U, C = planted(off=5.0)
    local = (fits.estimates - targets).square().sum(dim=(1, 2)).mean()
    apart = pool(fits, everyone, 2).coefficients
    forced = within(fits, U, C)
    assert (apart - targets).square().sum(dim=(1, 2)).mean() < 1.02 * local
    assert (forced - targets).square().sum(dim=(1, 2)).mean() > 100 * local


def test_pool_gains_over_the_fits_and_over_projecting_them():
    fits, targets, U, _ = planted()
    result = pool(fits, torch.ones(20, dtype=torch.bool), 2).coefficients
    projection = U @ U.T @ fits.estimates
    local, projected, pooled = (float((B - targets).square().sum()) for B in (fits.estimates, projection, result))
    # inside it goes back to the data, and comes within the (p - r) r + K r q = 100 numbers fitted of 480 in all; P is
    # told U, and projects the noise as it is
    assert pooled < local * 100 / 480 * 1.5
    assert pooled < 1.5 * projected


def test_pool_leaves_clients_alone_where_the_subspace_could_hold_all_their_differences():
    fits, targets, _, _ = planted(K=2, q=1, common=1.0)
    result = pool(fits, torch.ones(2, dtype=torch.bool), 2)
    assert result.basis.shape[1] == 0
    local = (fits.estimates - targets).square().sum()
    assert (result.coefficients - targets).square().sum() < 1.2 * local  # strangers: not much is pooled


def test_the_predictor_minimises_its_criterion():
    fits, _, U, _ = planted(K=2, q=1)
    C, spread = project_out(U, draw(12, 1)), 0.05
    B = regression.predict(fits, U, C, spread)

    def criterion(b, k):
        b = torch.from_numpy(b)[:, None]
        fit = b.T @ fits.gram[k] @ b - 2 * b.T @ fits.moments[k]
        return float(fits.precision[k] * fit + project_out(U, b - C).square().sum() / spread)

    for k in range(2):
        least = minimize(criterion, np.zeros(12), args=(k,), method="BFGS", options={"gtol": 1e-9})
        assert np.allclose(B[k, :, 0], least.x, atol=1e-5)


def test_a_round_of_alternating_least_squares_never_adds_to_the_residuals(monkeypatch):
    fits, _, U, C = planted(common=1.0)
    start = torch.linalg.qr(U + 0.3 * draw(12, 2)).Q, torch.zeros_like(C)
    excess = [regression.excess_risk(fits, within(fits, *start))]
    for rounds in (1, 2, 3, 30):
        monkeypatch.setattr(regression, "ROUNDS", rounds)
        excess.append(regression.excess_risk(fits, within(fits, *regression.alternate(fits, *start))))
    assert all(after <= before + 1e-9 for before, after in zip(excess, excess[1:], strict=False))
    # from a start this far off; at the level of the noise of an excess of some 380 terms, 3 rounds are as good as 30
    assert excess[3] - excess[4] < 0.1 * (2 * 380) ** 0.5


def test_the_spectral_step_minimises_its_criterion():
    fits, _, U, _ = planted(K=6, q=1, off=0.5)
    samples = torch.full((6,), 60)
    refitted = spectral(fits, samples, 2, 0.2, strength=0.05)
    pulled = spectral(fits, samples, 2, 0.2, strength=100.0)  # nobody leaves the representation
    assert torch.linalg.matrix_rank(pulled[:, :, 0], tol=1e-9) == 2
    gamma = 0.05 * (12 + np.log(6)) ** 0.5

    def criterion(b, k):
        b = torch.from_numpy(b)[:, None]
        fit = (b.T @ fits.gram[k] @ b - 2 * b.T @ fits.moments[k]) / 120
        return float(fit + gamma / 60**0.5 * torch.linalg.vector_norm(b - pulled[k]))

    for k in range(6):
        least = minimize(criterion, fits.estimates[k, :, 0].numpy(), args=(k,), method="BFGS", options={"gtol": 1e-9})
        assert criterion(refitted[k, :, 0].numpy(), k) <= least.fun + 1e-9


def test_armul_draws_what_the_published_code_draws():
    tasks = regression_clients.armul(0.2, 0.5, regression_clients.armul_seed(3))
    np.random.seed(13000)  # theirs is numpy's global generator
    directions = [z / np.linalg.norm(z) for z in (np.random.randn(3) for _ in range(30))]
    outliers = set(np.random.choice(30, size=6, replace=False).tolist())
    assert {k for k in range(30) if not tasks.benign[k]} == outliers
    for k in range(30):
        step = np.random.randn(50)
        expected = 0.5 * step / np.linalg.norm(step)
        if k in outliers:
            expected = 4 * expected
        else:
            expected[:3] += 2 * directions[k]
        assert np.allclose(tasks.targets[k, :, 0], expected)
        X = np.random.randn(200, 50)
        assert np.array_equal(tasks.X[k], X)
        assert np.allclose(tasks.Y[k][:, 0], X @ expected + np.random.randn(200))


def test_single_task_steps_tend_to_least_squares(monkeypatch):
    tasks = regression_clients.armul(0.0, 0.0, 10000)
    fits = least_squares(tasks.X, tasks.Y)
    near = (study.descent(tasks) - fits.estimates).abs().max()
    monkeypatch.setattr(study, "DESCENT", 5000)
    scale = torch.stack(tasks.X).square().mean(dim=(0, 1)).sqrt()
    assert (study.descent(tasks) / scale[:, None] - fits.estimates).abs().max() < 1e-6 < near


def test_the_design_of_tian_gu_feng():
    tasks = regression_clients.tian_gu_feng(100, 50, 5, 0.1, generator=derive(0, "test", "tian"))
    assert int((~tasks.benign).sum()) == 10 and len(tasks.X) == 100
    wide = tasks.targets[tasks.benign][:, :, 0]
    assert torch.linalg.matrix_rank(wide) == 5
    assert tasks.targets[~tasks.benign].abs().max() <= 3
    deviations = torch.stack(tasks.X).std(dim=(1, 2))
    assert torch.allclose(deviations, torch.where(tasks.benign, 1.0, 2.0).double(), rtol=0.05)  # 5000 entries each: 1 %


def test_the_multi_response_design():
    tasks = regression_clients.responses(5, 4.0, 0.5, 0.25, generator=derive(0, "test", "responses"))
    assert int(tasks.samples.min()) >= 40 and int(tasks.samples.max()) <= 160 and len(set(tasks.samples.tolist())) > 5
    own = tasks.targets[tasks.benign]
    assert torch.linalg.matrix_rank((own - own.mean(dim=0)).permute(1, 0, 2).flatten(1)) == 3
    features = torch.cat(tasks.X)
    assert float(torch.corrcoef(features.T)[3, 4]) == pytest.approx(0.5, abs=0.05)
    U = study.true_basis(tasks)
    assert project_out(U, own - own.mean(dim=0)).abs().max() < 1e-10


@pytest.mark.parametrize("name", regression_clients.DATA_SETS)
def test_real_clients_hold_out_clean_data(name):
    clean, corrupted = (regression_clients.DATA_SETS[name]("scaled", share, 1) for share in (0.0, 0.3))
    assert bool(clean.benign.all()) and int((~corrupted.benign).sum()) == round(0.3 * len(clean.X))
    for k, benign in enumerate(corrupted.benign):
        factor = 1.0 if benign else regression_clients.UNITS
        assert torch.equal(corrupted.Y[k], factor * clean.Y[k]) and torch.equal(corrupted.X[k], clean.X[k])
        assert torch.equal(corrupted.held_Y[k], clean.held_Y[k])
        assert len(clean.X[k]) > clean.X[k].shape[1] and len(clean.held_X[k]) >= 10


def test_countries_are_observed_in_one_year_of_each_block():
    split = regression_clients.countries("scaled", 0.0, 0)
    assert len(split.X) == 60 and {len(x) for x in split.X} == {13} and {len(x) for x in split.held_X} == {39}
    everything = torch.cat([split.X[0], split.held_X[0]])
    assert torch.allclose(everything.T @ everything, 52 * torch.eye(8, dtype=torch.float64), atol=1e-9)
    everybody = torch.cat([*split.Y, *split.held_Y])
    assert 0.5 < float(everybody.min()) and float(everybody.max()) < 10  # births per woman


def test_couples_are_grouped_by_both_occupations():
    split = regression_clients.couples("scaled", 0.0, 0)
    assert len(split.X) == 19
    assert all(20 <= len(x) <= 60 and len(x) + len(h) >= 60 for x, h in zip(split.X, split.held_X, strict=True))
    assert float(torch.cat(split.Y)[:, 0].max()) <= 5  # ratings from 1 to 5


def test_every_corruption_changes_the_fit_and_an_unknown_one_is_refused():
    X = torch.cat([torch.ones(30, 1).double(), draw(30, 4)], dim=1)
    Y = X @ draw(5, 2, name="B") + 0.1 * draw(30, 2, name="e")
    honest = least_squares([X], [Y]).estimates
    for kind in regression_clients.KINDS:
        sent = regression_clients.corrupt(kind, X, Y, derive(0, "test", kind))
        assert (least_squares([sent[0]], [sent[1]]).estimates - honest).abs().max() > 0.1
    with pytest.raises(ValueError, match="kind must be one of shuffled"):
        regression_clients.corrupt("backdoor", X, Y, derive(0, "test"))


@pytest.fixture(scope="module")
def armul():
    rows = [*grid(share=[0.2], off=[0.0, 0.5]), {"share": 0.7, "off": 0.0}]
    return study.study("armul", rows, 2)


def test_tables_of_the_published_design(armul):
    by = ["share", "off"]
    summary = study.summarise(armul["errors"], by, study.SINGLE)
    assert summary[summary.method == study.SINGLE].log_ratio.abs().max() == 0
    beside = study.beside_published(summary)
    assert beside["ARMUL (published)"].tolist() == [0.346, 0.498]  # the rows that have a published figure
    above = study.above_published(summary).set_index(["off", "method"])
    row = beside.set_index("off").loc[0.5]
    assert above.excess[0.5, study.POOLED] == pytest.approx(row[study.POOLED] - 0.498)
    wide = armul["errors"].pivot(index=["share", "off", "run"], columns="method", values="error")
    assert (wide[study.POOLED] < wide[study.SINGLE]).all()
    regression_plots.largest_errors(summary, by, study.published())


def test_half_and_more_compares_with_the_oracle(armul):
    no_design = pd.DataFrame({"design": [], "share": [], "method": [], "error": [], "seed": []})
    table = study.half_and_more(armul["errors"], no_design).set_index("method")
    assert set(table.index) == {study.TOLD_RANK, study.POOLED} and set(table.design) == {"armul"}
    wide = armul["errors"].query("share == 0.7").pivot(index="run", columns="method", values="error")
    expected = (wide[study.POOLED] / wide[study.ORACLE_POOLED]).mean()
    assert table.ratio[study.POOLED] == pytest.approx(expected)
    found = study.rates(armul["verdicts"], ["share", "off"]).set_index(["share", "off"])
    assert found.exact[0.2, 0.0] == 1 and found.missed[0.2, 0.0] == 0


def test_harmed_counts_cells_beyond_one_standard_error():
    errors = [("a", 1.0, 1.2), ("a", 1.0, 1.3), ("b", 1.0, 0.9), ("b", 1.0, 1.15)]  # means of logs .22 and .02
    rows = [
        {"cell": cell, "seed": s, "method": method, "error": error}
        for s, (cell, own, other) in enumerate(errors)
        for method, error in ((study.SINGLE, own), (study.POOLED, other))
    ]
    summary = study.summarise(pd.DataFrame(rows), ["cell"], study.SINGLE)
    assert study.harmed(summary).cell.tolist() == ["a"]


def test_real_and_multi_response_cells_and_their_figures():
    real = study.study("real", grid(data=["couples"], kind=["negated"], share=[0.0, 0.3]), 2)
    summary = study.summarise(real["errors"], ["data", "kind", "share"], study.SINGLE)
    averaged = summary[summary.method == "FedAvg"].set_index("share").log_ratio
    assert averaged[0.0] < 0 < 1 < averaged[0.3]  # averaging everybody gains until some negate
    regression_plots.held_out(summary)
    cells = grid(q=[2], spread=[2.0], correlation=[0.0, 0.5], share=[0.0])
    table = study.summarise_responses(study.study("responses", cells, 4)["responses"])
    assert (table[study.ORACLE_POOLED] < table[study.SINGLE]).all()
    assert table.exact[1] > table.isotropic[1] and table.exact[0] == pytest.approx(table.isotropic[0], rel=0.05)
    regression_plots.covariance(table)
