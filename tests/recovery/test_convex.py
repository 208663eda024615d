"""The convex program: against cvxpy, its certificate, its special cases, its symmetries, recovery."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import optimize

from clairlib.bench.convex import convex_problem
from clairlib.linalg.subspace import sin_theta
from clairlib.recovery.convex import Decomposition, decompose
from clairlib.simulate import planted
from clairlib.simulate.attacks import random_frame

SIZES = ((30, 12, 5), (12, 8, 3), (8, 5, 1), (4, 6, 9), (20, 10, 2), (5, 3, 4))  # (p, K, q)
KINDS = ("unstructured", "dense", "coalition", "sign_flip")


def draw(seed, p, K, q, noise=0.0, kind="unstructured", share=0.3):
    generator = torch.Generator().manual_seed(seed)
    return planted(kind, share=share, K=K, p=p, q=q, r=min(2, p), noise_std=noise, generator=generator)


def wide(blocks):
    return np.hstack(list(blocks.numpy()))  # (p, K*q)


def bounds(updates, found: Decomposition, common=True):
    """Primal and dual value from the returned tensors, in numpy; asserts that both points are feasible."""
    Y, lam, nu = found.dual.numpy(), found.lam, found.nu
    residual = (updates - found.common_part - found.low_rank - found.contamination).numpy()
    size = float(updates.norm())
    sizes = np.linalg.norm(found.contamination.numpy(), axis=(1, 2))
    primal = np.linalg.svd(wide(found.low_rank), compute_uv=False).sum()
    primal += sum(lam * size for size in sizes if size > 0)
    if nu > 0:
        primal += np.sum(residual**2) / (2 * nu)
    else:
        assert np.linalg.norm(residual) <= 1e-12 * size
    assert np.linalg.norm(wide(found.dual), 2) <= 1 + 1e-12
    assert np.linalg.norm(Y, axis=(1, 2)).max() <= lam * (1 + 1e-12)
    if common:
        assert np.linalg.norm(Y.sum(0)) <= 1e-12 * math.sqrt(Y.size)
    return primal, float((Y * updates.numpy()).sum() - nu / 2 * np.sum(Y**2))


def assert_certified(updates, found, common=True, tolerance=1e-6):
    primal, dual = bounds(updates, found, common)
    certificate = found.certificate
    assert certificate.converged
    assert dual <= primal * (1 + 1e-12)
    assert primal - dual <= tolerance * primal * (1 + 1e-6)
    assert primal == pytest.approx(certificate.primal, rel=1e-10)
    assert dual == pytest.approx(certificate.dual, rel=1e-10)
    assert certificate.relative_gap == pytest.approx((primal - dual) / primal, abs=1e-10)


@pytest.mark.parametrize("seed", range(24))
def test_objective_equals_cvxpy_and_gap_is_confirmed(seed):
    cvxpy = pytest.importorskip("cvxpy")
    p, K, q = SIZES[seed % len(SIZES)]
    nu = (0.0, 0.1, 0.5)[seed % 3] if seed >= 12 else 0.3 * (seed % 2)
    lam = (0.35, 0.55, 0.8)[(seed // 2) % 3]
    updates = draw(seed, p, K, q, noise=0.05 * (nu > 0), kind=KINDS[seed % 4]).updates
    found = decompose(updates, lam=lam, nu=nu)
    assert_certified(updates, found)
    oracle = convex_problem(cvxpy, updates, lam, nu).solve(solver="SCS", eps=1e-8, max_iters=100_000)
    assert found.certificate.primal == pytest.approx(oracle, rel=1e-5)


@pytest.mark.parametrize("nu", [0.0, 0.2])
def test_without_common_part_is_outlier_pursuit(nu):
    cvxpy = pytest.importorskip("cvxpy")
    updates = draw(3, p=10, K=15, q=1, noise=0.1 * nu).updates
    found = decompose(updates, lam=0.6, nu=nu, with_common=False)
    assert not found.common_part.any()
    assert_certified(updates, found, common=False)
    X = updates[:, :, 0].T.numpy()
    L, C = cvxpy.Variable(X.shape), cvxpy.Variable(X.shape)
    value = cvxpy.normNuc(L) + 0.6 * cvxpy.sum(cvxpy.norm(C, 2, axis=0))  # columns, as in the paper
    if nu > 0:
        problem = cvxpy.Problem(cvxpy.Minimize(value + cvxpy.sum_squares(X - L - C) / (2 * nu)))
    else:
        problem = cvxpy.Problem(cvxpy.Minimize(value), [L + C == X])
    oracle = problem.solve(solver="SCS", eps=1e-8, max_iters=100_000)
    assert found.certificate.primal == pytest.approx(oracle, rel=1e-5)
    assert found.certificate.primal > decompose(updates, lam=0.6, nu=nu).certificate.primal * 1.01


@pytest.mark.parametrize("lam", [math.inf, 50.0])
@pytest.mark.parametrize("q", [1, 4])
@pytest.mark.parametrize("nu", [0.0, 0.7])
def test_large_lam_is_mean_and_principal_components(lam, q, nu):
    updates = draw(1, p=9, K=8, q=q, noise=0.1).updates
    found = decompose(updates, lam=lam, nu=nu)
    mean = updates.mean(0)
    U, s, Vh = np.linalg.svd(wide(updates - mean), full_matrices=False)
    shrunk = (U * np.maximum(s - nu, 0)) @ Vh
    assert not found.contaminated.any()
    torch.testing.assert_close(found.common_part, mean, rtol=0, atol=1e-12)
    np.testing.assert_allclose(wide(found.low_rank), shrunk, atol=1e-10)
    assert_certified(updates, found)


@pytest.mark.parametrize("knee", [0.0, 1.0])  # of the Huber loss, in median distances
@pytest.mark.parametrize("q", [1, 3])
def test_small_lam_is_huberised_geometric_median(knee, q):
    K = 9
    updates = draw(2, p=4, K=K, q=q, noise=0.3).updates
    lam = 0.999 / math.sqrt(K)
    points = updates.reshape(K, -1).numpy()
    knee *= float(np.median(np.linalg.norm(points - np.median(points, axis=0), axis=1)))
    nu = knee / lam
    found = decompose(updates, lam=lam, nu=nu, tolerance=1e-10)

    def loss(centre):
        distance = np.linalg.norm(points - centre, axis=1)
        if nu == 0:
            return lam * distance.sum()
        return np.where(distance <= knee, distance**2 / (2 * nu), lam * distance - nu * lam**2 / 2).sum()

    best = optimize.minimize(loss, np.median(points, axis=0), method="BFGS", options={"gtol": 1e-10})
    assert found.low_rank.norm() <= 1e-6 * updates.norm()
    assert found.certificate.primal == pytest.approx(best.fun, rel=1e-9)
    np.testing.assert_allclose(found.common_part.reshape(-1).numpy(), best.x, atol=1e-4)
    assert nu == 0 or 0 < int(found.contaminated.sum()) < K  # both branches of the Huber loss are at work


@pytest.fixture(scope="module")
def hard():
    """Noiseless, 60 % of 30 clients contaminated about the same common part: p = q = 20, r = 3."""
    generator = torch.Generator().manual_seed(5)
    truth = planted(share=0.6, K=30, p=20, q=20, r=3, noise_std=0.0, common_norm=0.0, generator=generator)
    M = torch.randn(20, 20, generator=generator, dtype=torch.float64)
    return replace(truth, updates=truth.updates + M, targets=truth.targets + M, common_part=M)


@pytest.mark.parametrize("lam", [None, 0.6])
def test_exact_recovery_inside_the_window(hard, lam):
    found = decompose(hard.updates, lam=lam, tolerance=1e-8)
    assert torch.equal(found.contaminated, ~hard.benign)
    U = torch.linalg.svd(torch.cat(list(found.low_rank), 1))[0][:, :3]
    assert sin_theta(U, hard.basis) < 1e-6
    clean = found.common_part + found.low_rank
    error = (clean - hard.targets)[hard.benign].norm() / hard.targets[hard.benign].norm()
    assert float(error) < 1e-6


def test_weight_below_the_window_fails(hard):
    found = decompose(hard.updates, lam=3 / (7 * math.sqrt(0.6 * 30)))
    assert found.certificate.converged
    assert not torch.equal(found.contaminated, ~hard.benign)


@pytest.mark.parametrize("contaminated", [0, 1, 5, 7])
def test_automatic_weight_finds_the_set(contaminated):
    """Also where everybody looks contaminated at the starting weight (r = 4, K = 16) and where nobody is."""
    generator = torch.Generator().manual_seed(contaminated)
    truth = planted(share=contaminated / 16, K=16, p=30, q=8, r=4, noise_std=0.0, generator=generator)
    found = decompose(truth.updates)
    assert torch.equal(found.contaminated, ~truth.benign)
    assert math.isfinite(found.lam)


def test_automatic_weight_with_noise():
    generator = torch.Generator().manual_seed(0)
    p, K, q, sigma = 30, 24, 6, 0.01
    truth = planted(K=K, p=p, q=q, r=3, noise_std=sigma, generator=generator)
    found = decompose(truth.updates, nu=3 * sigma * math.sqrt(p * q))
    assert torch.equal(found.contaminated, ~truth.benign)
    assert_certified(truth.updates, found)


@pytest.mark.parametrize("nu", [0.0, 0.4])
@pytest.mark.parametrize("factor", [1e-9, 37.0, 1e9])
def test_scaling_the_updates_scales_the_result(nu, factor):
    updates = draw(4, p=12, K=10, q=4, noise=0.02).updates
    one, scaled = decompose(updates, nu=nu), decompose(factor * updates, nu=factor * nu)
    assert scaled.lam == pytest.approx(one.lam, rel=1e-6)
    assert scaled.certificate.primal == pytest.approx(factor * one.certificate.primal, rel=1e-9)
    for name in ("common_part", "low_rank", "contamination"):
        expected = factor * getattr(one, name)
        torch.testing.assert_close(getattr(scaled, name), expected, rtol=0, atol=1e-8 * factor)


@pytest.mark.parametrize("nu", [0.0, 0.4])
def test_permuting_clients_and_rotating_sides(nu):
    updates = draw(4, p=12, K=10, q=4, noise=0.02).updates
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(10, generator=generator)
    Q, R = random_frame(12, 12, generator=generator), random_frame(4, 4, generator=generator)
    one, other = decompose(updates, nu=nu), decompose(Q @ updates[order] @ R, nu=nu)
    assert torch.equal(other.contaminated, one.contaminated[order])
    torch.testing.assert_close(other.common_part, Q @ one.common_part @ R, rtol=0, atol=1e-8)
    for name in ("low_rank", "contamination", "dual"):
        expected = Q @ getattr(one, name)[order] @ R
        torch.testing.assert_close(getattr(other, name), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", [(1, 4, 3), (2, 4, 3), (3, 1, 1), (5, 2, 9), (4, 9, 1)])
@pytest.mark.parametrize("nu", [0.0, 0.3])
@pytest.mark.parametrize("common", [True, False])
def test_degenerate_shapes_converge(shape, nu, common):
    updates = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = decompose(updates, nu=nu, with_common=common)
    if shape[0] == 1 and common:
        torch.testing.assert_close(found.common_part, updates[0])
        assert found.certificate.primal == found.certificate.relative_gap == 0
    else:
        assert_certified(updates, found, common)


@pytest.mark.parametrize("nu", [0.0, 0.3])
def test_zero_and_identical_updates(nu):
    one = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 3
    for updates in (torch.zeros(5, 4, 3), one.expand(7, 4, 3)):
        found = decompose(updates, nu=nu)
        torch.testing.assert_close(found.common_part, updates[0].double())
        assert not found.contaminated.any() and not found.low_rank.any()
        assert found.certificate.converged and found.certificate.relative_gap == 0


def test_far_larger_client_is_isolated():
    truth = draw(6, p=12, K=10, q=4, share=0.1)
    updates = truth.updates.clone()
    updates[~truth.benign] *= 1e4
    found = decompose(updates, lam=0.8, tolerance=1e-10)
    assert_certified(updates, found, tolerance=1e-10)
    assert torch.equal(found.contaminated, ~truth.benign)


@pytest.mark.parametrize("nu", [0.0, 0.3])
def test_tolerance_not_reached_is_said(nu):
    updates = draw(7, p=12, K=10, q=4, noise=0.1).updates
    found = decompose(updates, lam=0.5, nu=nu, max_iterations=3)
    assert not found.certificate.converged and found.certificate.iterations == 3
    primal, dual = bounds(updates, found)
    assert found.certificate.relative_gap == pytest.approx((primal - dual) / primal, abs=1e-10)
    assert found.certificate.relative_gap > 1e-6


def test_impossible_tolerance_ends():
    updates = draw(7, p=6, K=5, q=2, noise=0.1).updates
    found = decompose(updates, lam=0.5, tolerance=0.0, max_iterations=200)
    assert found.certificate.iterations == 200 and found.certificate.relative_gap < 1e-9


def test_low_precision_input_is_solved_in_double():
    updates = draw(8, p=8, K=6, q=3).updates.to(torch.bfloat16)
    found = decompose(updates, lam=0.6)
    assert found.common_part.dtype == torch.float64
    assert_certified(updates.double(), found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lam": 0.0}, "lam must be positive"),
        ({"lam": math.nan}, "lam must be positive"),
        ({"nu": -1.0}, "nu must be finite"),
        ({"nu": math.inf}, "nu must be finite"),
        ({"max_iterations": 0}, "max_iterations must be at least 1"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        decompose(torch.ones(3, 2, 2), **arguments)


@pytest.mark.parametrize("shape", [(3, 2), (0, 2, 2)])
def test_bad_shapes_are_named(shape):
    with pytest.raises(ValueError, match="updates must be a non-empty"):
        decompose(torch.ones(shape))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_stays_on_the_device():
    updates = draw(9, p=12, K=10, q=4).updates
    there, here = decompose(updates.cuda()), decompose(updates)
    assert there.common_part.is_cuda
    torch.testing.assert_close(there.contamination.cpu(), here.contamination, rtol=0, atol=1e-6)
