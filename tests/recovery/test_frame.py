"""Frames and residuals left one out: against brute force, and their law under pure noise."""

import numpy as np
import pytest
import torch

from clairlib import LowRank
from clairlib.core.seeds import derive
from clairlib.linalg.low_rank import cores_of_factors
from clairlib.linalg.subspace import project_out, sin_theta
from clairlib.recovery.effective_dimensions import EffectiveDimensions
from clairlib.recovery.frame import fit_frame, floor_energy, keep_directions, rank_limit
from clairlib.recovery.leave_one_out import LeaveOneOut
from clairlib.recovery.scores import SCORED_DIRECTIONS_PER_RANK, filtered_energy, log_scores
from clairlib.simulate import planted
from clairlib.simulate.attacks import random_frame


def clients(seed=0, K=12, p=14, q=5, r=2, noise=0.1, share=0.25):
    return planted(K=K, p=p, q=q, r=r, noise_std=noise, share=share, generator=derive(seed, "frames"))


def unequal(K):
    return torch.linspace(0.2, 3.0, K, dtype=torch.float64)


def test_frame_is_the_weighted_mean_and_principal_subspace():
    c, w = clients(), unequal(12)
    frame = fit_frame(c.updates, w, c.benign, 2)
    S, v = c.updates[c.benign].numpy(), w[c.benign].numpy()
    mean = np.average(S, axis=0, weights=v)
    U, s, _ = np.linalg.svd(np.hstack([(x - mean) * k**0.5 for x, k in zip(S, v, strict=True)]))
    assert np.allclose(frame.mean, mean, atol=1e-14)
    assert sin_theta(frame.basis, torch.as_tensor(U[:, :2])) < 1e-12
    assert torch.allclose(frame.basis.T @ frame.basis, torch.eye(2, dtype=torch.float64), atol=1e-13)
    assert np.allclose(frame.eigenvalues, s**2, atol=1e-12)
    assert (frame.rank, frame.size) == (2, 9)
    assert torch.equal(frame.members, c.benign)


def test_contaminated_clients_have_no_part_in_the_frame():
    c, w = clients(), unequal(12)
    moved = c.updates.clone()
    moved[~c.benign] *= 1e6
    first, second = (fit_frame(X, w, c.benign, 2) for X in (c.updates, moved))
    assert torch.equal(first.basis, second.basis) and torch.equal(first.mean, second.mean)


@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_rank_is_estimated_where_it_is_not_given(noise):
    c = clients(K=16, p=30, noise=noise)
    assert fit_frame(c.updates, unequal(16), c.benign).rank == 2


def test_rank_without_noise_is_the_planted_one():
    c = clients(K=16, p=30, noise=0.0)
    assert fit_frame(c.updates, unequal(16), c.benign).rank == 2


def test_rank_of_adapters_whose_noise_fills_few_directions():
    """Twelve clients of adapter rank 2 have cores of 24 rows; the nine members fill 18 of them."""
    generator = derive(0, "adapters")
    U = random_frame(600, 2, generator=generator)
    updates = []
    for _ in range(12):
        B = U @ torch.randn(2, 2, generator=generator, dtype=torch.float64)
        B = B + 0.01 * torch.randn(600, 2, generator=generator, dtype=torch.float64)
        updates.append(LowRank(B, torch.randn(2, 600, generator=generator, dtype=torch.float64) / 600**0.5))
    X = cores_of_factors(updates).core
    assert fit_frame(X, torch.ones(12, dtype=torch.float64), torch.arange(12) < 9).rank == 2


@pytest.mark.parametrize("weights", [torch.ones(12, dtype=torch.float64), unequal(12)], ids=["equal", "unequal"])
@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_leave_one_out_equals_refitting_without_each_member(weights, rank):
    """R_k = P_perp (X_k - M) / sqrt(1 / w_k + 1 / W), frame and W of the members other than k."""
    c = clients()
    frame = fit_frame(c.updates, weights, c.benign, rank)
    expected = torch.empty_like(c.updates)
    for k in range(12):
        others = c.benign.clone()
        others[k] = False
        refit = fit_frame(c.updates, weights, others, rank)
        scale = (1 / weights[k] + 1 / weights[others].sum()).sqrt()
        expected[k] = project_out(refit.basis, c.updates[k] - refit.mean) / scale
    assert (LeaveOneOut(c.updates, weights, frame).R - expected).abs().max() < 1e-10


@pytest.mark.parametrize("weights", [torch.ones(16, dtype=torch.float64), unequal(16)], ids=["equal", "unequal"])
@pytest.mark.parametrize("rank", [0, 2])
def test_noise_has_one_variance_for_members_and_outsiders(weights, rank):
    """Pure noise of variance sigma^2 / w_k: entries of every R_k have variance sigma^2 (p - r) / p.

    The mean square over m clients and p q entries has variance 2 ||C||_F^2 / (m^2 p q), C the correlation between the
    clients' residuals, which share means. Five standard errors.
    """
    (K, p, q), members, sigma = (16, 40, 60), torch.arange(16) < 10, 0.3
    X = sigma * torch.randn(K, p, q, generator=derive(0, "noise"), dtype=torch.float64)
    X = X / weights.sqrt()[:, None, None]
    R = LeaveOneOut(X, weights, fit_frame(X, weights, members, rank)).R
    variance = sigma**2 * (p - rank) / p
    mixing = torch.eye(K, dtype=torch.float64)  # residual = mixing @ (clients scaled to variance 1)
    for k in range(K):
        others = members & (torch.arange(K) != k)
        mixing[k, others] = -weights[others].sqrt() / weights[others].sum() * weights[k].sqrt()
        mixing[k] /= mixing[k].norm()
    for who in (members, ~members):
        C = (mixing @ mixing.T)[who][:, who]
        error = variance * (2 * float(C.square().sum()) / (int(who.sum()) ** 2 * p * q)) ** 0.5
        assert float(R[who].square().mean()) == pytest.approx(variance, abs=5 * error)


def test_in_sample_residuals_would_not_do():
    """The point of leaving one out: in sample, members look closer than outsiders of the same law by (1 - 1/n)."""
    X = torch.randn(16, 40, 60, generator=derive(0, "noise"), dtype=torch.float64)
    w, members = torch.ones(16, dtype=torch.float64), torch.arange(16) < 6
    frame = fit_frame(X, w, members, 3)
    inside = project_out(frame.basis, X - frame.mean).square().sum((1, 2))
    left_out = LeaveOneOut(X, w, frame).R.square().sum((1, 2))
    assert float(inside[members].mean() / inside[~members].mean()) < 0.8
    assert float(left_out[members].mean() / left_out[~members].mean()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("shape", [(5, 8, 3), (5, 3, 8)])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_filtered_energy_is_that_of_the_top_singular_values(shape, rank):
    R = torch.randn(*shape, generator=derive(0, "filter"), dtype=torch.float64)
    expected = torch.linalg.svdvals(R)[:, : max(SCORED_DIRECTIONS_PER_RANK * rank, 1)].square().sum(1)
    assert torch.allclose(filtered_energy(R, rank), expected, rtol=1e-12)


@pytest.mark.parametrize("p, q", [(20, 8), (8, 20), (30, 1)])
def test_isotropic_noise_fills_every_dimension(p, q):
    R = torch.randn(400, p, q, generator=derive(0, "isotropic"), dtype=torch.float64)
    assert EffectiveDimensions(R).effective_dimensions() == pytest.approx((p, q), rel=0.02)


def test_effective_dimensions_of_coloured_noise():
    """(tr C)^2 / tr C^2 of the covariance that made the noise."""
    spread = torch.tensor([4.0, 2.0, 1.0, 1.0, 0.5], dtype=torch.float64)
    R = torch.randn(2000, 5, 6, generator=derive(0, "coloured"), dtype=torch.float64) * spread[:, None]
    rows, columns = EffectiveDimensions(R).effective_dimensions()
    assert rows == pytest.approx(float(spread.square().sum() ** 2 / spread.pow(4).sum()), rel=0.05)
    assert columns == pytest.approx(6, rel=0.02)


@pytest.mark.parametrize("how", [{"noise": 0.05}, {"p": 30, "q": 10}], ids=["less noise", "more columns"])
def test_contaminated_clients_score_high(how):
    """With noise .1 in 14 x 5 entries, they are within what another level of noise explains."""
    c, w = clients(**how), torch.ones(12, dtype=torch.float64)
    x, variance = log_scores(LeaveOneOut(c.updates, w, fit_frame(c.updates, w, c.benign, 2)))
    assert x[~c.benign].min() > x[c.benign].max() + 4 * variance**0.5


def test_scores_do_not_depend_on_the_unit():
    c, w = clients(), unequal(12)
    first, second = (log_scores(LeaveOneOut(X, w, fit_frame(X, w, c.benign, 2))) for X in (c.updates, 1e6 * c.updates))
    assert torch.allclose(second[0], first[0] + 2 * np.log(1e6), atol=1e-9)
    assert second[1] == pytest.approx(first[1], rel=1e-9)


@pytest.mark.parametrize("size", [0.0, 1.0, 1e-8])
def test_identical_clients_score_at_the_floor(size):
    X = size * torch.ones(5, 4, 3, dtype=torch.float64)
    w, everyone = torch.ones(5, dtype=torch.float64), torch.ones(5, dtype=torch.bool)
    x, _ = log_scores(LeaveOneOut(X, w, fit_frame(X, w, everyone)))
    assert x.isfinite().all() and float(x.max()) == pytest.approx(np.log(floor_energy(X)))


def test_explained_variance_tells_a_subspace_from_noise():
    w, everyone = torch.ones(12, dtype=torch.float64), torch.ones(12, dtype=torch.bool)
    signal, noise = clients(noise=0.01, share=0), torch.randn(12, 14, 5, generator=derive(0, "n"), dtype=torch.float64)
    strong = fit_frame(signal.updates, w, everyone, 2)
    assert 0.8 < float(LeaveOneOut(signal.updates, w, strong).explained_variance) <= 1
    half = clients(noise=0.01, share=0.5)
    assert float(LeaveOneOut(half.updates, w, fit_frame(half.updates, w, half.benign, 2)).explained_variance) > 0.8
    assert 0 < float(LeaveOneOut(noise, w, fit_frame(noise, w, everyone, 2)).explained_variance) < 0.1
    assert 0 < float(LeaveOneOut(signal.updates, w, fit_frame(signal.updates, w, everyone, 0)).explained_variance) < 0.1


def test_rank_limit_leaves_enough_clients_to_leave_one_out():
    assert rank_limit(2, 10, 5) == 0
    for n, p, q in [(3, 10, 5), (4, 10, 1), (9, 50, 10), (20, 6, 30)]:
        assert 0 < rank_limit(n, p, q) <= min(p - 1, (n - 2) * q)


@pytest.mark.parametrize("weights", [torch.ones(12, dtype=torch.float64), unequal(12)], ids=["equal", "unequal"])
def test_energy_inside_the_subspace_is_left_one_out(weights):
    c = clients()
    frame = fit_frame(c.updates, weights, c.benign, 2)
    for k, energy in enumerate(LeaveOneOut(c.updates, weights, frame).inside.exp().tolist()):
        others = c.benign & (torch.arange(12) != k)
        basis = fit_frame(c.updates, weights, others, 2).basis
        assert energy == pytest.approx(float((basis.T @ c.updates[k]).square().sum()), rel=1e-9)


def test_a_direction_that_one_client_alone_uses_is_not_kept(monkeypatch):
    """In sample the fourth direction stands out, by more than those after it differ; held out it is empty."""
    draw = derive(0, "keep")
    U = random_frame(40, 4, generator=draw)
    X = U[:, :3] @ torch.randn(12, 3, 8, generator=draw, dtype=torch.float64)
    X += 0.2 * torch.randn(12, 40, 8, generator=draw, dtype=torch.float64)
    X[0] += 3.5 * U[:, 3:] @ torch.randn(1, 8, generator=draw, dtype=torch.float64) / 8**0.5
    w, everybody = torch.ones(12, dtype=torch.float64), torch.ones(12, dtype=torch.bool)
    one = fit_frame(X, w, everybody, 1)
    assert float(one.eigenvalues[3]) > 1.4 * float(one.eigenvalues[4])
    monkeypatch.setattr("clairlib.recovery.frame.gap_rank", lambda *_: 0)
    assert keep_directions(X, w, one).rank == 3


def test_directions_are_kept_up_to_the_gap():
    c, w = clients(noise=0.02), torch.ones(12, dtype=torch.float64)
    frame = fit_frame(c.updates, w, c.benign)
    assert frame.rank == 2 and keep_directions(c.updates, w, frame) is frame
