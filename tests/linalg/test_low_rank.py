"""Factored updates: cores keep the geometry, truncation is the best one, nothing of size p x q is made."""

import pytest
import torch

from clairlib import CLAIR, LowRank
from clairlib.core.seeds import derive
from clairlib.linalg.low_rank import cores_of_dense, cores_of_factors, truncate
from clairlib.simulate.attacks import random_frame
from helpers.memory import Largest


def rand(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def adapters(p, q, ranks, seed=0):
    """Low-rank updates with given ranks and scales that differ."""
    generator = derive(seed, "factors", p, q)
    made = []
    for k, rho in enumerate(ranks):
        made.append(LowRank(rand(p, rho, generator=generator), rand(rho, q, generator=generator), 0.5 + k))
    return made


def dense(updates):
    return torch.stack([u.dense() for u in updates])


def gram(stack):
    return stack.flatten(1) @ stack.flatten(1).T


SIZES = {  # (p, q, ranks), N = sum of ranks
    "N below p and q": (30, 20, (2, 3, 4)),
    "N above p and q": (6, 5, (2, 3, 4)),
    "N between": (30, 6, (3, 3, 2)),
    "N between, wide": (6, 30, (3, 1, 4)),
    "N equal to p": (9, 12, (4, 3, 2)),
    "rank above the matrix": (4, 3, (6, 5, 1)),
    "rank 1, vector": (12, 1, (1, 1, 1, 1)),
}


@pytest.fixture(params=SIZES, ids=lambda name: name.replace(" ", "-"))
def updates(request):
    return adapters(*SIZES[request.param])


def check_cores(cores, stack):
    """Norms, inner products, singular values and the Gram matrices of products are those of the updates."""
    size = float(gram(stack).diagonal().max())
    assert cores.core.dtype == torch.float64
    assert torch.allclose(gram(cores.core), gram(stack), atol=1e-12 * size)
    ours, full = torch.linalg.svdvals(cores.core), torch.linalg.svdvals(stack)
    common = min(ours.shape[1], full.shape[1])
    assert torch.allclose(ours[:, :common], full[:, :common], atol=1e-12 * size**0.5)
    assert full[:, common:].abs().sum() < 1e-10 * size**0.5
    assert ours[:, common:].abs().sum() < 1e-10 * size**0.5
    rebuilt = cores.lift_rows(cores.lift_columns(cores.core.mT).mT)
    assert torch.allclose(rebuilt, stack, atol=1e-12 * size**0.5)
    wide, core_wide = torch.cat(list(stack), 1), torch.cat(list(cores.core), 1)
    ours, full = torch.linalg.svdvals(core_wide), torch.linalg.svdvals(wide)
    assert torch.allclose(ours[: len(full)], full[: len(ours)], atol=1e-12 * size**0.5)
    for side in (cores.left, cores.right):
        if side is not None:
            assert torch.allclose(side.T @ side, torch.eye(side.shape[1], dtype=torch.float64), atol=1e-13)


def test_cores_of_factors_are_isometric(updates):
    cores = cores_of_factors(updates)
    check_cores(cores, dense(updates))
    p, q, N = *updates[0].shape, sum(u.rank for u in updates)
    assert cores.core.shape == (len(updates), min(p, N), min(q, N))


def test_cores_of_a_dense_stack_are_isometric(updates):
    check_cores(cores_of_dense(dense(updates)), dense(updates))


@pytest.mark.parametrize("shape", [(3, 100, 2), (3, 2, 100), (3, 100, 40), (4, 5, 6)])
def test_a_long_side_of_a_dense_stack_is_compressed(shape):
    K, p, q = shape
    stack = rand(*shape, generator=derive(0, "dense"))
    cores = cores_of_dense(stack)
    check_cores(cores, stack)
    assert cores.core.shape[1] <= min(p, K * q) and cores.core.shape[2] <= min(q, K * p)


def test_lift_inverts(updates):
    cores, stack = cores_of_factors(updates), dense(updates)
    for core, update in zip(cores.core, stack, strict=True):
        lifted = cores.lift(core)
        assert lifted.shape == update.shape
        assert lifted.rank <= max(1, int(torch.linalg.matrix_rank(update)))
        assert torch.allclose(lifted.dense(), update, atol=1e-12 * float(update.norm()))


def test_lift_of_zero_is_zero():
    cores = cores_of_factors(adapters(30, 20, (2, 3)))
    lifted = cores.lift(torch.zeros_like(cores.core[0]))
    assert lifted.shape == (30, 20) and not lifted.dense().any()


def test_shape_rank_and_product():
    update = LowRank(torch.ones(3, 2), torch.ones(2, 4), 0.5)
    assert (update.shape, update.rank) == ((3, 4), 2)
    assert torch.equal(update.dense(), torch.ones(3, 4))


def test_gauge_does_not_move_the_cores_geometry(updates):
    generator = derive(0, "gauge")
    moved = []
    for u in updates:
        G = rand(u.rank, u.rank, generator=generator) + 3 * torch.eye(u.rank, dtype=torch.float64)
        moved.append(LowRank(3.0 * u.B @ G, torch.linalg.solve(G, u.A), u.scale / 3))
    check_cores(cores_of_factors(moved), dense(updates))


@pytest.mark.parametrize("rank", [1, 2, 4, 5, 9])
def test_truncation_is_the_best_and_says_its_error(rank):
    (update,) = adapters(20, 15, (5,))
    cut, error = truncate(update, rank)
    U, s, Vh = torch.linalg.svd(update.dense(), full_matrices=False)
    best = (U[:, :rank] * s[:rank]) @ Vh[:rank]
    assert (cut.rank, cut.scale) == (rank, 1.0)
    assert torch.allclose(cut.dense(), best, atol=1e-12 * float(s[0]))
    assert error == pytest.approx(float(s[rank:].norm() / s.norm()), abs=1e-12)
    assert error == pytest.approx(float((update.dense() - cut.dense()).norm() / update.dense().norm()), abs=1e-12)
    assert torch.allclose(cut.B.norm(dim=0), cut.A.norm(dim=1), atol=1e-12)  # balanced
    assert not cut.B[:, 5:].any() and not cut.A[5:].any()  # padding


def test_truncation_takes_ranks_above_the_matrix():
    (update,) = adapters(4, 3, (6,))
    cut, error = truncate(update, 6)
    assert cut.B.shape == (4, 6) and cut.A.shape == (6, 3)
    assert error < 1e-14 and torch.allclose(cut.dense(), update.dense(), atol=1e-12)


def test_truncation_of_a_zero_update():
    cut, error = truncate(LowRank(torch.zeros(5, 2), torch.ones(2, 4)), 3)
    assert error == 0.0 and cut.rank == 3 and not cut.dense().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_truncation_keeps_the_dtype_and_rounds_only_at_the_end(dtype):
    (update,) = adapters(20, 15, (5,))
    low = LowRank(update.B.to(dtype), update.A.to(dtype), update.scale)
    exact = LowRank(low.B.double(), low.A.double(), low.scale)
    cut, error = truncate(low, 3)
    assert cut.B.dtype == cut.A.dtype == dtype
    assert error == pytest.approx(truncate(exact, 3)[1], abs=1e-12)
    assert torch.equal(cut.B, truncate(exact, 3)[0].B.to(dtype))


@pytest.mark.parametrize("side", ["output", "input"])
def test_a_fit_allocates_nothing_of_size_p_times_q(side):
    """p q = 3.6e9 entries are 14 GB in float32. The largest tensor is a few side lengths times sum of ranks wide."""
    p = q = 60_000
    generator, K, rho = derive(0, "large"), 6, 2
    U = random_frame(p, rho, generator=generator)
    updates = []
    for _ in range(K):
        B = U @ rand(rho, rho, generator=generator) + 1e-4 * rand(p, rho, generator=generator)
        updates.append(LowRank(B.float(), rand(rho, q, generator=generator).float(), 0.5))
    if side == "input":
        updates = [LowRank(u.A.T, u.B.T, u.scale) for u in updates]
    with Largest() as largest:
        result = CLAIR(side=side).fit(updates)
        for update in result.refined:
            truncate(update, 4)
    assert result.basis.shape[0] == p
    assert all(u.shape == (p, q) for u in result.refined) and result.common_part.shape == (p, q)
    # the factors of all clients together are K rho wide; some tensors are float64
    assert largest.entries <= 4 * p * K * rho
