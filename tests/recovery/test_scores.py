"""Log scores: the law of noise, the formula, and what must not count: a client's level of noise, its leverage."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clairlib.core.seeds import derive
from clairlib.recovery.detection import calibrate
from clairlib.recovery.frame import fit_frame
from clairlib.recovery.leave_one_out import LeaveOneOut
from clairlib.recovery.scores import (
    LAW_DRAWS,
    LEVEL_REACH,
    SCORED_DIRECTIONS_PER_RANK,
    SCORED_PART,
    common_shape,
    log_scores,
    noise_law,
    noise_shape,
    robust_variance,
)
from clairlib.simulate.attacks import random_frame


def ones(K):
    return torch.ones(K, dtype=torch.float64)


def everybody(K):
    return torch.ones(K, dtype=torch.bool)


def in_noise(levels, name="scores", p=60, q=20, r=2):
    """Clients that share a subspace, with noise of standard deviation ``levels`` (K,)."""
    g, K = derive(0, name), len(levels)
    U = random_frame(p, r, generator=g)
    A = 3 * torch.randn(K, r, q, generator=g, dtype=torch.float64)
    E = torch.randn(K, p, q, generator=g, dtype=torch.float64)
    return U @ A + 0.1 * levels[:, None, None] * E


def scored(X, rank=2, members=None):
    K = len(X)
    left_out = LeaveOneOut(X, ones(K), fit_frame(X, ones(K), everybody(K) if members is None else members, rank))
    return log_scores(left_out), left_out


@pytest.mark.parametrize("rows, columns, directions", [(30, 8, 3), (8, 30, 3), (47, 10, 1)])
def test_moments_of_noise_are_those_of_gaussian_matrices(rows, columns, directions):
    """Five standard errors of n normal draws: of a mean s / sqrt(n), of a covariance ((v_1 v_2 + c^2) / n)^1/2."""
    law, draws = noise_law(rows, columns, directions), 3000
    E = np.random.default_rng(0).standard_normal((draws, rows, columns))
    squares = np.linalg.svd(E, compute_uv=False) ** 2
    top, bulk = squares[:, :directions].sum(1), squares[:, directions:].sum(1)
    part, C = top / (top + bulk), np.cov(np.log(top), np.log(bulk))
    error = 5 * (1 / LAW_DRAWS + 1 / draws) ** 0.5
    assert law.part == pytest.approx(part.mean(), abs=error * part.std())
    assert law.top == pytest.approx(C[0, 0], abs=error * 2**0.5 * C[0, 0])
    assert law.bulk == pytest.approx(C[1, 1], abs=error * 2**0.5 * C[1, 1])
    assert law.both == pytest.approx(C[0, 1], abs=error * (C[0, 0] * C[1, 1] + C[0, 1] ** 2) ** 0.5)


def test_noise_that_is_scored_whole_has_the_variance_of_a_log_chi_square():
    law = noise_law(40, 5, 5)
    assert (law.part, law.top, law.bulk) == (1.0, 2 / 200, 0.0)


def test_log_scores_are_the_formula_of_the_docstring():
    levels = torch.linspace(0.8, 1.25, 16, dtype=torch.float64)
    members = torch.arange(16) < 13
    (x, variance), left_out = scored(in_noise(levels), members=members)
    s2 = torch.linalg.svdvals(left_out.R).square()
    dof = left_out.benign.degrees_of_freedom(s2[members])
    rows, columns = noise_shape(s2[members], dof)
    assert rows * columns == pytest.approx(58 * 20, rel=0.1)
    m = min(2 * SCORED_DIRECTIONS_PER_RANK, int(SCORED_PART * columns))
    law = noise_law(rows, columns, m)
    T = (s2[:, :m].sum(1) / (1 + left_out.leverage / law.part)).log()
    B = s2[:, m:].sum(1).log()
    between = max(0.0, robust_variance(B[common_shape(T - B, law)]) - law.bulk)
    rho = min(1.0, (between + law.both) / (between + law.bulk))
    assert m == 4 and between > law.bulk and 0 < rho < 1
    level = (B - B[members].median()).clamp(-LEVEL_REACH, LEVEL_REACH)
    assert torch.allclose(x, T - rho * level, rtol=1e-9)
    pure = law.top + rho**2 * law.bulk - 2 * rho * law.both + (1 - rho) ** 2 * between
    assert variance == pytest.approx(pure, rel=1e-9)


def moved_by(levels, client, factor):
    """Changes of a client's score and of its log energy when its noise energy is multiplied."""
    more = levels.clone()
    more[client] *= factor**0.5
    others = torch.arange(len(levels)) != client
    ((x, _), first), ((y, _), second) = (scored(in_noise(own), members=others) for own in (levels, more))
    energy = [left_out.R[client].square().sum().log() for left_out in (first, second)]
    return float(y[client] - x[client]), float(energy[1] - energy[0])


def test_where_levels_of_noise_differ_a_clients_own_does_not_count():
    """Spread .5 in log energy is far beyond noise (58 x 20 entries: .04), so rho is within .02 of one."""
    levels = (0.25 * torch.randn(16, generator=derive(0, "levels"), dtype=torch.float64)).exp()
    client = int((levels - levels.median()).abs().argmin())
    score, energy = moved_by(levels, client, 2.5)
    assert energy == pytest.approx(np.log(2.5), abs=0.1) and abs(score) < 0.1


def test_where_levels_of_noise_are_alike_energy_counts():
    """Then rho is the slope of noise alone, c / v_B: the less, the fewer directions are scored."""
    score, energy = moved_by(ones(16), 3, 2.5)
    law = noise_law(58, 20, 4)
    assert energy == pytest.approx(np.log(2.5), abs=0.1)
    assert score == pytest.approx((1 - law.both / law.bulk) * energy, abs=0.2 * energy)


def test_beyond_the_reach_level_counts_fully():
    levels = (0.25 * torch.randn(16, generator=derive(0, "levels"), dtype=torch.float64)).exp()
    client = int(levels.argmax())
    far, further = (moved_by(levels, client, factor)[0] for factor in (20.0, 60.0))
    assert further - far == pytest.approx(np.log(3), abs=0.05)


@pytest.mark.parametrize("factor", [1.0, 10.0])
def test_leverage_is_the_energy_of_the_subspaces_tilt(factor):
    """To first order the rows of P_perp U C are normal with the covariance s^2 C' S^-1 C; H = S^-1/2 C C' S^-1/2.

    The tilt's energy over s^2 (p - r) has the mean tr H and the variance 2 tr H^2 / (p - r). Five standard errors of
    the mean of the draws, and the second order, s^2 p / S.
    """
    (K, p, q, r), s, draws = (12, 300, 6, 2), 0.01, 6
    ratio, errors = [], []
    for d in range(draws):
        g = derive(d, "leverage")
        U, A = random_frame(p, r, generator=g), torch.randn(K, r, q, generator=g, dtype=torch.float64)
        A[0] *= factor
        X = U @ A + s * torch.randn(K, p, q, generator=g, dtype=torch.float64)
        left_out = LeaveOneOut(X, ones(K), fit_frame(X, ones(K), everybody(K), r))
        rest = fit_frame(X[1:], ones(K - 1), everybody(K - 1), r).basis
        D = U @ (A[0] - A[1:].mean(0)) / (1 + 1 / (K - 1)) ** 0.5
        tilt = float((D - rest @ (rest.T @ D)).square().sum()) / (s**2 * (p - r) * q)
        ratio.append(tilt / float(left_out.leverage[0]))
        C, B = A[0] - A[1:].mean(0), A[1:] - A[1:].mean(0)
        H = torch.linalg.solve(torch.einsum("krq,ksq->rs", B, B), C @ C.T)
        errors.append(2 * float((H @ H).trace() / H.trace() ** 2) / (p - r))
    assert np.mean(ratio) == pytest.approx(1, abs=5 * np.sum(errors) ** 0.5 / draws + s**2 * p / K)


def test_a_client_with_ten_times_the_coefficients_does_not_stand_out():
    levels = ones(16)
    X, g = in_noise(levels), derive(0, "scores")
    U, A = random_frame(60, 2, generator=g), 3 * torch.randn(16, 2, 20, generator=g, dtype=torch.float64)
    X[0] += 9 * U @ A[0]
    (x, variance), left_out = scored(X)
    plain = left_out.squares[:, :4].sum(dim=1).log()
    assert float(calibrate(x, everybody(16), variance).p_values[0]) > 0.01
    assert float(calibrate(plain, everybody(16), variance).p_values[0]) < 1e-4  # but for its leverage


def test_a_subspace_of_noise_has_no_tilt():
    X = torch.randn(10, 20, 6, generator=derive(0, "pure noise"), dtype=torch.float64)
    assert not scored(X, rank=0)[1].leverage.any()
    apart = scored(X, rank=3)[1].leverage
    assert float(apart.max()) < 1.0
