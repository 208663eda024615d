"""Client distances against independent computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from scipy.spatial import distance

from clairlib.baselines.scores import CLIENT_SCORES, geometric_median_score, krum_score, norm_score
from clairlib.baselines.weights import geometric_median
from clairlib.core.seeds import derive
from clairlib.simulate import planted


def updates(K: int = 9, p: int = 4, q: int = 3) -> torch.Tensor:
    X = torch.randn(K, p, q, generator=derive(0, "baselines"), dtype=torch.float64)
    X[0] += 5
    return X


def test_norm_score_is_the_absolute_z_score_and_cannot_reach_three_with_ten_clients():
    X = updates()
    norms = np.linalg.norm(X.reshape(len(X), -1).numpy(), axis=1)
    assert norm_score(X).numpy() == pytest.approx(np.abs(stats.zscore(norms, ddof=1)), rel=1e-12)
    lone = torch.ones(10, 2, 2, dtype=torch.float64)
    lone[0] *= 1e6
    assert float(norm_score(lone).max()) == pytest.approx(9 / 10**0.5)
    assert not norm_score(torch.ones(4, 2, 2)).any()


@pytest.mark.parametrize("contaminated", [0, 2, 5, 8])
def test_krum_score_against_scipy(contaminated):
    X = updates()
    pairs = distance.squareform(distance.pdist(X.flatten(1).numpy(), "sqeuclidean"))
    nearest = np.sort(pairs, axis=1)[:, 1 : 1 + max(1, len(X) - contaminated - 2)]
    assert krum_score(X, contaminated).numpy() == pytest.approx(nearest.sum(axis=1), rel=1e-10)


def test_geometric_median_against_a_general_optimiser():
    X = updates()
    points = X.flatten(1).numpy()
    found = optimize.minimize(
        lambda z: np.linalg.norm(points - z, axis=1).sum(), points.mean(axis=0), method="BFGS", options={"gtol": 1e-9}
    )
    assert geometric_median(X).flatten().numpy() == pytest.approx(found.x, abs=1e-6)
    assert geometric_median_score(X).numpy() == pytest.approx(np.linalg.norm(points - found.x, axis=1), abs=1e-6)


def test_geometric_median_stands_on_the_majority_and_stays_finite():
    X = torch.zeros(7, 3, 2, dtype=torch.float64)
    X[:3] = updates(K=3, p=3, q=2)
    assert float(geometric_median(X).abs().max()) < 1e-6
    assert torch.equal(geometric_median(X[3:]), X[3])


@pytest.mark.parametrize("name", CLIENT_SCORES)
def test_every_distance_turns_with_the_updates_and_sees_large_ones(name):
    truth = planted("dense", share=0.25, K=12, generator=derive(1, "baselines"))
    X = truth.updates.clone()
    X[~truth.benign] *= 10
    turn = torch.linalg.qr(torch.randn(50, 50, generator=derive(2, "turn"), dtype=torch.float64))[0]
    score = CLIENT_SCORES[name](X, 3)
    assert CLIENT_SCORES[name](turn @ X, 3).numpy() == pytest.approx(score.numpy(), rel=1e-7)
    assert float(score[~truth.benign].min()) > float(score[truth.benign].max())
