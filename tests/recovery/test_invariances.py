"""What must not matter: order, rotation, scale, shift, gauge, form, side and dtype of the updates."""

import pytest
import torch

from clairlib import CLAIR, LowRank
from clairlib.core.seeds import derive
from clairlib.linalg.low_rank import truncate
from clairlib.linalg.subspace import project_out, sin_theta
from clairlib.simulate import planted
from clairlib.simulate.attacks import random_frame

CLOSE = dict(rtol=1e-8, atol=1e-8)


@pytest.fixture(scope="module")
def clients():
    return planted(K=12, p=20, q=6, r=2, noise_std=0.05, share=0.25, generator=derive(0, "invariances"))


@pytest.fixture(scope="module")
def result(clients):
    """The fit that all others are compared with: exact, so that it is not two failures that agree."""
    result = CLAIR().fit(clients.updates)
    assert torch.equal(result.benign, clients.benign) and result.rank == 2 and result.modules["update"].is_refined
    return result


def same_verdict(first, second, order=slice(None)):
    assert torch.equal(second.benign, first.benign[order])
    assert torch.allclose(second.scores, first.scores[order], rtol=1e-6, atol=1e-6)
    assert torch.allclose(second.p_values, first.p_values[order], rtol=1e-5, atol=1e-12)
    assert second.rank == first.rank
    assert second.gain == pytest.approx(first.gain, abs=1e-8)


def rotation(n, name):
    return random_frame(n, n, generator=derive(0, name))


@pytest.mark.parametrize("seed", range(3))
def test_permuting_clients_permutes_the_result(clients, result, seed):
    order = torch.randperm(12, generator=derive(seed, "order"))
    moved = CLAIR().fit(clients.updates[order])
    same_verdict(result, moved, order)
    assert torch.allclose(moved.refined, result.refined[order], **CLOSE)
    assert torch.allclose(moved.common_part, result.common_part, **CLOSE)
    assert sin_theta(moved.basis, result.basis) < 1e-8


def test_rotating_the_output_side_rotates_the_result(clients, result):
    Q = rotation(20, "output")
    moved = CLAIR().fit(Q @ clients.updates)
    same_verdict(result, moved)
    assert torch.allclose(moved.refined, Q @ result.refined, **CLOSE)
    assert torch.allclose(moved.common_part, Q @ result.common_part, **CLOSE)
    assert sin_theta(moved.basis, Q @ result.basis) < 1e-8


def test_rotating_the_input_side_rotates_the_result(clients, result):
    Q = rotation(6, "input")
    moved = CLAIR().fit(clients.updates @ Q)
    same_verdict(result, moved)
    assert torch.allclose(moved.refined, result.refined @ Q, **CLOSE)
    assert torch.allclose(moved.common_part, result.common_part @ Q, **CLOSE)
    assert sin_theta(moved.basis, result.basis) < 1e-8


@pytest.mark.parametrize("factor", [1e-6, 3.7, -1.0, 1e6])
def test_scaling_the_updates_scales_the_result(clients, result, factor):
    moved = CLAIR().fit(factor * clients.updates)
    same_verdict(result, moved)
    assert torch.allclose(moved.refined / factor, result.refined, **CLOSE)
    assert torch.allclose(moved.common_part / factor, result.common_part, **CLOSE)
    assert sin_theta(moved.basis, result.basis) < 1e-8


def test_a_matrix_added_to_every_client_shifts_the_result(clients, result):
    N = torch.randn(20, 6, generator=derive(0, "shift"), dtype=torch.float64)
    moved = CLAIR().fit(clients.updates + N)  # scores change: an update's size is its distance from the base model
    assert torch.equal(moved.benign, result.benign) and moved.rank == result.rank
    assert torch.allclose(moved.refined, result.refined + N, **CLOSE)
    assert torch.allclose(moved.common_part, result.common_part + project_out(result.basis, N), **CLOSE)
    assert sin_theta(moved.basis, result.basis) < 1e-8


def test_common_part_is_off_the_subspace(clients, result):
    assert (result.basis.T @ result.common_part).abs().max() < 1e-12
    mean = clients.updates[clients.benign].mean(0)
    assert torch.allclose(result.common_part, project_out(result.basis, mean), **CLOSE)
    assert torch.allclose(result.basis.T @ result.basis, torch.eye(2, dtype=torch.float64), atol=1e-12)


def factored(updates, seed=0):
    """Full-rank factors of dense updates in a random gauge, with scales that differ."""
    generator = derive(seed, "gauge")
    made = []
    for k, X in enumerate(updates):
        n = X.shape[1]
        G = torch.randn(n, n, generator=generator, dtype=torch.float64) + 3 * torch.eye(n, dtype=torch.float64)
        made.append(LowRank(X @ G / (k + 1), torch.linalg.inv(G), k + 1.0))
    return made


def dense(updates):
    return torch.stack([u.dense() for u in updates])


@pytest.mark.parametrize("seed", range(2))
def test_factored_and_dense_input_agree_in_any_gauge(clients, result, seed):
    low = CLAIR().fit(factored(clients.updates, seed))
    same_verdict(result, low)
    assert all(isinstance(u, LowRank) for u in low.refined)
    assert torch.allclose(dense(low.refined), result.refined, **CLOSE)
    assert torch.allclose(low.common_part.dense(), result.common_part, **CLOSE)
    assert sin_theta(low.basis, result.basis) < 1e-8


def low_rank_clients():
    """Adapters of ranks 4 and 6 that together span all of 24 x 40."""
    generator = derive(0, "mixed")
    c = planted(K=12, p=24, q=4, r=2, noise_std=0.03, share=0.25, common_norm=0.0, generator=generator)
    updates = []
    for k, X in enumerate(c.updates):
        A = torch.randn(4, 40, generator=generator, dtype=torch.float64) / 40**0.5
        pad = 2 * (k % 2)
        B, A = torch.nn.functional.pad(X, (0, pad)), torch.nn.functional.pad(A, (0, 0, 0, pad))
        updates.append(LowRank(B, A, 2.0))
    return c, updates


@pytest.mark.parametrize("solver", ["consensus", "convex"])
def test_adapters_of_different_ranks_agree_with_their_products(solver):
    c, updates = low_rank_clients()
    low, full = CLAIR(rank=2, solver=solver).fit(updates), CLAIR(rank=2, solver=solver).fit(dense(updates))
    assert torch.equal(low.benign, c.benign)
    same_verdict(full, low)
    identity = torch.eye(40, dtype=torch.float64)
    best = [truncate(LowRank(X, identity), u.rank) for X, u in zip(full.refined, updates, strict=True)]
    assert torch.allclose(dense(low.refined), dense([update for update, _ in best]), **CLOSE)
    assert low.truncation_errors.tolist() == pytest.approx([error for _, error in best], abs=1e-8)
    assert not full.truncation_errors.any() and float(low.truncation_errors[c.benign].min()) > 0.01
    assert torch.allclose(low.common_part.dense(), full.common_part, **CLOSE)
    kept = [k for k in range(12) if not c.benign[k]]
    assert all(torch.equal(low.refined[k].B, updates[k].B) and low.refined[k].scale == 2.0 for k in kept)


@pytest.mark.parametrize("solver", ["consensus", "convex"])
def test_input_side_is_the_output_side_of_the_transpose(clients, solver):
    out, into = CLAIR(solver=solver).fit(clients.updates), CLAIR(solver=solver, side="input").fit(clients.updates.mT)
    same_verdict(out, into)
    assert into.modules["update"].shape == (6, 20)
    assert torch.allclose(into.refined, out.refined.mT, **CLOSE)
    assert torch.allclose(into.common_part, out.common_part.mT, **CLOSE)
    assert sin_theta(into.basis, out.basis) < 1e-8


def test_input_side_of_adapters(clients, result):
    low = [LowRank(u.A.T, u.B.T, u.scale) for u in factored(clients.updates)]
    into = CLAIR(side="input").fit(low)
    same_verdict(result, into)
    assert into.basis.shape == (20, 2) and into.refined[0].shape == (6, 20)
    assert torch.allclose(dense(into.refined), result.refined.mT, **CLOSE)


@pytest.mark.parametrize("dtype, digits", [(torch.float32, 2**-20), (torch.bfloat16, 2**-5)])
def test_low_precision_goes_in_and_comes_out(clients, result, dtype, digits):
    low = CLAIR().fit(clients.updates.to(dtype))
    assert low.refined.dtype == low.basis.dtype == low.common_part.dtype == dtype
    assert low.scores.dtype == low.p_values.dtype == torch.float64 and low.benign.dtype == torch.bool
    assert torch.equal(low.benign, result.benign) and low.rank == 2
    assert torch.allclose(low.refined.double(), result.refined, atol=digits)
    assert torch.equal(low.refined[~low.benign], clients.updates.to(dtype)[~low.benign])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_adapters(clients, dtype):
    updates = [LowRank(u.B.to(dtype), u.A.to(dtype), u.scale) for u in factored(clients.updates)]
    low = CLAIR().fit(updates)
    assert {u.B.dtype for u in low.refined} | {u.A.dtype for u in low.refined} == {dtype}
    assert low.common_part.B.dtype == low.basis.dtype == dtype
    assert torch.equal(low.benign, clients.benign)


def test_statistics_of_low_precision_are_done_in_double(clients):
    """What rounding float32 input moves is the input, not the arithmetic."""
    rounded = clients.updates.float()
    low, high = CLAIR().fit(rounded), CLAIR().fit(rounded.double())
    assert torch.allclose(low.scores, high.scores, rtol=1e-12, atol=1e-12)
    assert torch.equal(low.refined, high.refined.float())


def test_a_fit_is_a_function_of_data_and_seed():
    """K = 30: tuples are drawn. The global generator plays no part and is left alone."""
    c = planted(K=30, p=20, q=6, r=2, noise_std=0.05, generator=derive(1, "invariances"))
    torch.manual_seed(1)
    first = CLAIR(seed=5).fit(c.updates)
    torch.manual_seed(2)
    expected = torch.rand(3)
    torch.manual_seed(2)
    second = CLAIR(seed=5).fit(c.updates)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.refined, second.refined) and torch.equal(first.scores, second.scores)
    other = CLAIR(seed=6).fit(c.updates)
    assert torch.equal(first.benign, other.benign)


def test_input_is_left_alone(clients):
    kept = clients.updates.clone()
    result = CLAIR().fit(clients.updates)
    result.refined.zero_()
    assert torch.equal(clients.updates, kept)


def test_noiseless_verdict_does_not_depend_on_the_axes():
    """Directions beyond the numerical rank are arbitrary; along the axes they can be an attacker's own."""
    draw = derive(0, "axes")
    X = torch.zeros(10, 4, 6, dtype=torch.float64)
    X[:, :2] = torch.randn(10, 2, 6, generator=draw, dtype=torch.float64)
    for client, row in ((8, 2), (9, 3)):
        X[client, row] = torch.randn(6, generator=draw, dtype=torch.float64)
    turned = random_frame(4, 4, generator=draw) @ X
    for updates in (X, turned):
        assert CLAIR().fit(updates).contaminated == ["client_8", "client_9"]
