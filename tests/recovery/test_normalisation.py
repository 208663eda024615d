"""Sizes of clients from the common part, and heavy tails: what is recovered, what is left alone."""

from __future__ import annotations

import pytest
import torch

from clairlib.core.seeds import derive
from clairlib.recovery.frame import fit_frame
from clairlib.recovery.leave_one_out import LeaveOneOut
from clairlib.recovery.normalisation import client_scales, cut_tails
from clairlib.simulate.attacks import random_frame

K, P, Q, R, NOISE = 20, 50, 10, 3, 0.02
ONES, EVERYBODY = torch.ones(K, dtype=torch.float64), torch.ones(K, dtype=torch.bool)


def normal(g, *shape):
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def sized(seed=0, spread=0.3, noise=NOISE, size=1.0):
    """Clients a_k (M + U A_k) + noise with a rank-one common part of norm ``size``; the a_k, and U."""
    g = derive(seed, "sizes")
    U, M = random_frame(P, R, generator=g), torch.outer(normal(g, P), normal(g, Q))
    M = M - U @ (U.T @ M)
    a = (spread * normal(g, K)).exp()
    X = M * size / torch.linalg.matrix_norm(M) + U @ normal(g, K, R, Q) / Q**0.5
    return a[:, None, None] * X + noise * normal(g, K, P, Q), a, U


def scales_of(X, members=EVERYBODY, rank=R):
    frame = fit_frame(X, torch.ones(len(X), dtype=torch.float64), members, rank)
    return client_scales(X, frame, float((P - R) * Q))


@pytest.mark.parametrize("rank", [R, R + 1], ids=["the rank", "the rank with that of the common part"])
def test_planted_sizes_are_recovered(rank):
    """a_k has the standard error s / ||M||, so has the median of K by 1.25 / K^1/2; shrinkage and P add second order.

    With sizes that differ, M is one more direction of the clients' subspace.
    """
    X, a, _ = sized()
    found, error = scales_of(X, rank=rank), NOISE
    assert (found / found.median() - a / a.median()).abs().max() < 5 * (1 + 1.25 / K**0.5) * error + 0.02


def test_sizes_beside_sign_flips_are_those_of_the_honest():
    X, a, _ = sized()
    bad = torch.arange(K) < 6
    X[bad] = -X[bad]
    found = scales_of(X, members=~bad)
    assert torch.equal(found[bad], ONES[bad])
    honest = found[~bad] / found[~bad].median() - a[~bad] / a[~bad].median()
    assert honest.abs().max() < 5 * (1 + 1.25 / 14**0.5) * NOISE + 0.02


@pytest.mark.parametrize("seed", range(4))
def test_alike_clients_have_size_one(seed):
    """Sizes that are told apart are at most by the errors of estimation."""
    found = scales_of(sized(seed, spread=0.0)[0])
    assert (found - 1).abs().max() < 5 * NOISE


def test_without_a_clear_common_part_everybody_has_size_one():
    for size in (0.0, 0.2):
        X, _, _ = sized(size=size, noise=0.1)
        assert torch.equal(scales_of(X), ONES)


@pytest.mark.parametrize("unit", [1e-3, 7.0, -1.0])
def test_sizes_do_not_depend_on_the_unit(unit):
    X, _, _ = sized()
    assert torch.allclose(scales_of(unit * X), scales_of(X), rtol=1e-8)


def test_three_clients_are_taken_as_they_are():
    assert torch.equal(scales_of(sized()[0][:3], EVERYBODY[:3], rank=1), ONES[:3])


def noisy(seed=0, tails=None):
    g = derive(seed, "tails")
    E = normal(g, K, P, Q)
    if tails is not None:
        E = E / (normal(g, 3, K, P, 1).square().sum(dim=0) / 3).sqrt()
    return random_frame(P, R, generator=g) @ normal(g, K, R, Q) + 0.05 * E


def cut(X):
    return cut_tails(X, ONES, fit_frame(X, ONES, EVERYBODY, R))


def test_gaussian_noise_is_left_as_it_is():
    """Of 20 clients, more than half must show what one in a hundred shows."""
    for seed in range(4):
        X = noisy(seed)
        assert cut(X) is X


def kurtosis_of_rows(X):
    R_ = LeaveOneOut(X, ONES, fit_frame(X, ONES, EVERYBODY, R)).R.square().sum(dim=2)
    return float((R_.square().mean(dim=1) / R_.mean(dim=1).square()).mean())


def test_heavy_rows_are_cut():
    """E||row||^4 / (E||row||^2)^2 is 1 + 2 / q of Gaussian rows, without bound of t rows with 3 degrees of freedom."""
    X = noisy(tails="rows")
    less = cut(X)
    assert kurtosis_of_rows(X) > 4 and kurtosis_of_rows(less) < 2
    changed = (less != X).any(dim=2)
    assert bool(changed.any(dim=1).all()) and float(changed.double().mean()) < 0.5


def test_the_heavy_row_of_one_client_is_left_for_the_verdict():
    X = noisy()
    X[4, 7] += 0.6  # twelve standard deviations an entry; far more would move the mean of all
    assert cut(X) is X
