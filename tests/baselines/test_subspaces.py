"""The robust subspace peers: each against its defining equation, another solver, or a case known in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clairlib.baselines import subspaces as peers
from clairlib.baselines.weights import geometric_median
from clairlib.core.seeds import derive
from clairlib.linalg.subspace import project_out, sin_theta
from clairlib.simulate import planted

BASES = [peers.pca, peers.block_fms, peers.tyler, peers.median_pca, peers.outlier_pursuit]


def draw(kind="unstructured", share=0.3, noise=0.05, common=1.0, seed=0, **sizes):
    sizes = {"p": 12, "q": 5, "K": 16, "r": 2} | sizes
    return planted(kind, share=share, noise_std=noise, common_norm=common, generator=derive(seed, "peers"), **sizes)


@pytest.mark.parametrize("estimator", BASES)
def test_bases_are_orthonormal_and_right_where_nobody_is_contaminated(estimator):
    truth = draw(share=0.0, noise=0.0, common=0.0)
    basis = estimator(truth.updates, 2)
    torch.testing.assert_close(basis.T @ basis, torch.eye(2, dtype=torch.float64))
    assert sin_theta(basis, truth.basis) < 1e-6


@pytest.mark.parametrize("estimator", BASES)
def test_rotated_updates_give_the_rotated_subspace(estimator):
    truth = draw()
    Q = torch.linalg.qr(torch.randn(12, 12, generator=derive(1, "turn"), dtype=torch.float64)).Q
    assert sin_theta(estimator(Q @ truth.updates, 2), Q @ estimator(truth.updates, 2)) < 1e-6


def test_pca_is_numpys():
    X = draw().updates
    wide = np.hstack(list((X - X.mean(0)).numpy()))
    values, vectors = np.linalg.eigh(wide @ wide.T)
    assert sin_theta(peers.pca(X, 3), torch.tensor(vectors[:, -3:].copy())) < 1e-10


def test_tyler_solves_its_equation():
    points = draw(noise=0.3).updates.permute(1, 0, 2).flatten(1)  # noise: the solution exists
    scatter = peers.tyler_scatter(points, iterations=500)
    p, n = points.shape
    weights = p / torch.einsum("pn,pq,qn->n", points, torch.linalg.inv(scatter), points)
    torch.testing.assert_close((points * weights) @ points.T / n, scatter, rtol=0, atol=1e-8)
    assert float(scatter.trace()) == pytest.approx(p)


def test_tyler_is_affine_equivariant_and_ignores_lengths():
    points = draw(noise=0.3).updates.permute(1, 0, 2).flatten(1)
    lengths = torch.rand(points.shape[1], generator=derive(2, "lengths"), dtype=torch.float64) + 0.1
    A = torch.randn(12, 12, generator=derive(2, "map"), dtype=torch.float64)
    expected = A @ peers.tyler_scatter(points, 500) @ A.T
    found = peers.tyler_scatter(A @ points * lengths, 500)
    torch.testing.assert_close(found / found.trace(), expected / expected.trace(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_tyler_is_exact_above_its_share_of_inliers(share):
    """More than r / p of the columns in the subspace, the others dense: exact; PCA of the same is far off."""
    truth = draw("dense", share=share, noise=0.0, common=0.0)
    assert 1 - share > 2 / 12
    assert sin_theta(peers.tyler(truth.updates, 2), truth.basis) < 1e-8
    assert sin_theta(peers.pca(truth.updates, 2), truth.basis) > 1e-2


def test_pairs_cancel_the_common_part():
    truth = draw("dense", share=0.25, noise=0.0, common=3.0)
    pairs = peers.pair_differences(truth.updates)
    assert pairs.shape == (120, 12, 5)
    torch.testing.assert_close(pairs, peers.pair_differences(truth.updates + 7.0))
    assert sin_theta(peers.tyler(pairs, 2), truth.basis) < 1e-8 < sin_theta(peers.tyler(truth.updates, 2), truth.basis)


def test_block_fms_meets_its_first_order_conditions():
    X = draw(noise=0.2).updates
    U = peers.block_fms(X, 2)

    def distances(middle, basis):
        return project_out(basis, X - middle).square().sum(dim=(1, 2)).sqrt()

    middle = X.mean(0)
    for _ in range(1000):  # the best off-subspace centre given the basis
        w = 1 / distances(middle, U)
        middle = torch.einsum("k,kpq->pq", w / w.sum(), X)
    w = 1 / distances(middle, U)
    D = X - middle
    gradient = project_out(U, torch.einsum("k,kpq,krq->pr", w, D, D) @ U)
    assert float(gradient.norm()) < 1e-4 * float(torch.einsum("k,kpq,krq->pr", w, D, D).norm())
    assert distances(middle, U).sum() < distances(X.mean(0), peers.pca(X, 2)).sum()


def test_block_fms_is_exact_with_a_common_part():
    truth = draw("coalition", share=0.25, noise=0.0)
    assert sin_theta(peers.block_fms(truth.updates, 2), truth.basis) < 1e-8


def test_centre_takes_the_geometric_median_away():
    X = draw(noise=0.2).updates
    torch.testing.assert_close(peers.centre(X), X - geometric_median(X))


def test_median_pca_does_not_look_at_lengths():
    X = peers.centre(draw(noise=0.2).updates)
    balanced = torch.cat([X, -X])  # median zero, whatever the lengths
    factors = torch.rand(len(X), generator=derive(3, "lengths"), dtype=torch.float64).add(0.5).repeat(2)[:, None, None]
    assert sin_theta(peers.median_pca(balanced * factors, 2), peers.median_pca(balanced, 2)) < 1e-6


def test_outlier_pursuit_is_cvxpys():
    cvxpy = pytest.importorskip("cvxpy")
    truth = draw("dense", share=0.125, noise=0.0, common=0.0, q=3)
    X = truth.updates.permute(1, 0, 2).flatten(1).numpy()
    lam = 1 / np.sqrt(np.log(X.shape[1]))
    L = cvxpy.Variable(X.shape)
    cost = cvxpy.normNuc(L) + lam * cvxpy.sum(cvxpy.norm(X - L, 2, axis=0))
    cvxpy.Problem(cvxpy.Minimize(cost)).solve(solver="SCS", eps=1e-8, max_iters=100_000)
    oracle = torch.tensor(np.linalg.svd(L.value)[0][:, :2].copy())
    assert sin_theta(peers.outlier_pursuit(truth.updates, 2), oracle) < 1e-4
    assert sin_theta(oracle, truth.basis) < 1e-4


def test_outlier_pursuit_below_its_least_weight_has_no_low_rank_part():
    """3 / (7 sqrt(share n)) <= 1 / sqrt(n) for share >= (3/7)^2: L = 0 is optimal, whatever the data."""
    from clairlib.recovery.convex import decompose

    truth = draw(share=0.25, noise=0.0, common=0.0)
    columns = truth.updates.permute(0, 2, 1).flatten(0, 1)[:, :, None]
    lam = 3 / (7 * (0.25 * len(columns)) ** 0.5)
    assert lam < len(columns) ** -0.5
    assert decompose(columns, lam=lam, with_common=False).low_rank.norm() < 1e-6 * columns.norm()
