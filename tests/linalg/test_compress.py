"""Cores from Gram matrices, and refined adapters put together from them, against the dense updates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from clairlib import CLAIR, LowRank
from clairlib.core.seeds import derive
from clairlib.linalg import grams
from clairlib.linalg.compress import compress
from clairlib.linalg.grams import stack
from clairlib.linalg.low_rank import cores_of_factors, truncate
from clairlib.linalg.refined_factors import assemble, exact_update, refined_adapters, refined_updates
from clairlib.linalg.subspace import project_out, sin_theta
from clairlib.recovery.description_length import left_out_noise
from clairlib.recovery.frame import fit_frame
from clairlib.recovery.inputs import Module
from clairlib.recovery.leave_one_out import LeaveOneOut
from clairlib.recovery.module_fit import ModuleFit
from clairlib.recovery.refinement import estimate_gain
from clairlib.recovery.scores import log_scores

RANK, STRANGERS = 3, 5


def adapters(K=16, p=300, q=280, *, noise=0.5, ranks=(16,), scales=(1.0,), dtype=torch.float64, seed=1):
    """Benign: shared directions, a common part, own noise; the first ``STRANGERS`` have a frame of their own."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def frame():
        return torch.linalg.qr(normal(p, RANK))[0], normal(p, 1) / p**0.5, normal(1, q) / q**0.5

    shared, updates = frame(), []
    for k in range(K):
        U, left, right = frame() if k < STRANGERS else shared
        rank, scale = ranks[k % len(ranks)], scales[k % len(scales)]
        own = rank - RANK - 1
        B = torch.cat([U, left, noise * normal(p, own) / p**0.5], dim=1)
        A = torch.cat([normal(RANK, q) / q**0.5, right, noise * normal(own, q) / q**0.5])
        gauge = torch.eye(rank, dtype=torch.float64) + 0.3 * normal(rank, rank) / rank**0.5
        updates.append(LowRank((B @ gauge).to(dtype), torch.linalg.solve(gauge, A / scale).to(dtype), scale))
    return updates


MIXED = {"ranks": (6, 16, 9), "scales": (1.0, 0.25)}
BENIGN = torch.arange(16) >= STRANGERS
WEIGHTS = torch.linspace(0.5, 1.5, 16, dtype=torch.float64)


def dense(updates):
    return torch.stack([update.dense().double() for update in updates])


@pytest.mark.parametrize("how", [{}, MIXED], ids=["equal ranks", "mixed ranks and scales"])
def test_cores_hold_everything_when_all_directions_are_common(how):
    updates = adapters(**how)
    X, exact = compress(stack(updates), (400, 400), generator=derive(0, "test")), cores_of_factors(updates)
    assert X.core.square().sum(dim=(1, 2)).tolist() == pytest.approx(exact.core.square().sum(dim=(1, 2)).tolist())
    frame = fit_frame(X.core, WEIGHTS, BENIGN, None, X.shared_block)
    other = fit_frame(exact.core, WEIGHTS, BENIGN)
    assert frame.rank == other.rank == RANK
    ours, theirs = log_scores(LeaveOneOut(X.core, WEIGHTS, frame)), log_scores(LeaveOneOut(exact.core, WEIGHTS, other))
    assert torch.allclose(ours[0], theirs[0], atol=1e-8) and ours[1] == pytest.approx(theirs[1], rel=1e-6)
    left = stack(updates).B @ X.left
    assert torch.allclose(left.T @ left, torch.eye(left.shape[1], dtype=torch.float64), atol=1e-8)


@pytest.mark.parametrize("how", [{}, MIXED], ids=["equal ranks", "mixed ranks and scales"])
def test_own_coordinates_neglect_little(how):
    """64 of some 200 directions in common: scores move by less than a quarter of their benign spread."""
    updates = adapters(p=400, q=400, **how)
    X, exact = compress(stack(updates), (64, 64), generator=derive(0, "test")), cores_of_factors(updates).core
    assert X.shared_block == (64, 64) and X.core.shape[1:] == (80, 80)
    frame, other = fit_frame(X.core, WEIGHTS, BENIGN, None, X.shared_block), fit_frame(exact, WEIGHTS, BENIGN)
    (x, _), (y, _) = log_scores(LeaveOneOut(X.core, WEIGHTS, frame)), log_scores(LeaveOneOut(exact, WEIGHTS, other))
    assert frame.rank == other.rank == RANK
    assert float((x - y).abs().max()) < 0.25 * float(y[BENIGN].std())
    both = (X.core, frame), (exact, other)
    structure = [float(LeaveOneOut(stacked, WEIGHTS, f).explained_variance) for stacked, f in both]
    assert structure[0] == pytest.approx(structure[1], abs=0.02)
    gains = [estimate_gain(stacked, WEIGHTS, f).relative for stacked, f in both]
    assert gains[0] == pytest.approx(gains[1], abs=0.02)


def shared_of(updates, lead=64, rank=None):
    stacked = stack(updates)
    fit = ModuleFit("m", compress(stacked, (lead, lead), generator=derive(0, "test")), WEIGHTS, rank)
    return fit.parts(fit.frame(BENIGN), updates)


@pytest.mark.parametrize("how", [{}, MIXED], ids=["equal ranks", "mixed ranks and scales"])
def test_subspace_and_common_part_are_those_of_the_dense_updates(how):
    updates = adapters(**how)
    shared, exact = shared_of(updates), fit_frame(dense(updates), WEIGHTS, BENIGN, RANK)
    assert sin_theta(shared.lifted_basis(), exact.basis) < 1e-10
    off = project_out(exact.basis, exact.mean)
    assert torch.linalg.matrix_norm(shared.common_part().dense() - off) < 1e-10 * torch.linalg.matrix_norm(off)


def with_foreign_subspaces(K=30, p=600, q=580, strangers=6, foreign=8):
    """Benign clients with ``RANK`` shared directions and noise; the first ones with strong directions of their own."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    shared, updates = torch.linalg.qr(normal(p, RANK))[0], []
    for k in range(K):
        U = torch.linalg.qr(normal(p, foreign))[0] if k < strangers else shared
        r, own = U.shape[1], 12 - U.shape[1]
        B = torch.cat([U, 0.3 * normal(p, own) / p**0.5], dim=1)
        updates.append(LowRank(B, torch.cat([normal(r, q) / q**0.5, 0.3 * normal(own, q) / q**0.5])))
    return updates, torch.arange(K) >= strangers


def test_cores_for_a_set_show_its_rank_whatever_directions_the_others_fill():
    """Chosen by everybody, some common directions are the strangers', and the benign noise ends in a false gap."""
    updates, benign = with_foreign_subspaces()
    module = Module("m", updates, transposed=False, numpy=False)
    weights = torch.ones(len(updates), dtype=torch.float64)
    for members, right in ((None, False), (benign, True)):
        assert (CLAIR().prepare(module, weights, members).frame(benign).rank == RANK) == right
    result = CLAIR().fit(updates)
    assert result.rank == RANK and torch.equal(result.benign, benign)


def test_noise_is_the_same_seen_from_few_members_and_from_many():
    """What others have in a client's own coordinates is neglected; they must not make small sets look quieter."""
    updates, benign = adapters(K=40, p=700, q=600, noise=1.0), torch.arange(40) >= STRANGERS
    fit = CLAIR().prepare(Module("m", updates, transposed=False, numpy=False), torch.ones(40, dtype=torch.float64))
    noise = []
    for size in (4, 8, 30):
        members = benign & (benign.cumsum(0) <= size)
        noise.append(left_out_noise(fit.X, fit.weights, fit.frame(members)))
    assert noise == pytest.approx([noise[-1]] * 3, rel=0.05)


def test_common_directions_do_not_hold_all_that_a_sets_members_span():
    """Else the noise of the members, each in directions of its own, would pass for shared."""
    g, members = torch.Generator().manual_seed(1), torch.arange(17) >= STRANGERS  # 60 directions, of 85
    updates = [
        LowRank(*(f + 0.01 * torch.randn(f.shape, generator=g) for f in (u.B, u.A))) for u in adapters(K=17, ranks=(5,))
    ]
    fit = CLAIR().prepare(Module("m", updates, transposed=False, numpy=False), torch.ones(17), members)
    assert fit.cores.shared_block == (45, 45)


def one_refined(assembly, client, rank):
    (adapter,) = refined_adapters(assembly, [client], [rank])
    return adapter


def test_refined_adapters_are_the_same_one_by_one_and_together():
    assembly = assemble(shared_of(adapters(**MIXED)), 32, derive(0, "off"))
    clients, ranks = [0, 3, 6, 7, 15], [4, 16, 1, 8, 16]
    for k, rank, (ours, error) in zip(clients, ranks, refined_adapters(assembly, clients, ranks), strict=True):
        alone, its_error = one_refined(assembly, k, rank)
        assert ours.rank == rank and error == pytest.approx(its_error, abs=1e-12)
        assert torch.allclose(ours.dense(), alone.dense(), atol=1e-10)
        norms = torch.linalg.vector_norm(ours.B), torch.linalg.vector_norm(ours.A)
        assert ours.scale == 1.0 and float(norms[0]) == pytest.approx(float(norms[1]))


@pytest.mark.parametrize("exact", [True, False], ids=["exact parts", "combinations"])
def test_each_clients_common_part_has_its_own_scale(exact):
    updates = adapters(**MIXED)
    shared, D = shared_of(updates), dense(updates)
    U, off = shared.lifted_basis(), shared.common_part()
    scales, clients = torch.linspace(-0.5, 3.0, 16, dtype=torch.float64), [15, 6, 9]
    parts = (U, off) if exact else shared
    made = refined_updates(parts, updates, clients, [4, 16, 9], derive(0, "off"), scales)
    for k, rank, (ours, error) in zip(clients, [4, 16, 9], made, strict=True):
        refined = U @ (U.T @ D[k]) + scales[k] * off.dense()
        torch.testing.assert_close(exact_update(U, off, updates[k], float(scales[k])).dense(), refined)
        s = torch.linalg.svdvals(refined)
        least = float(s[rank:].norm() / s.norm())
        measured = float((ours.dense() - refined).norm() / s.norm())
        assert ours.rank == rank and measured == pytest.approx(error, abs=1e-8)
        assert least - 1e-8 <= error < (1 + 1e-8 if exact else 1.02) * least
    assert least > 0.01


@pytest.mark.parametrize("how", [{}, MIXED], ids=["equal ranks", "mixed ranks and scales"])
def test_refined_adapters_are_the_best_truncation_of_the_dense_ones(how):
    updates = adapters(**how)
    shared, D = shared_of(updates), dense(updates)
    exact = fit_frame(D, WEIGHTS, BENIGN, RANK)
    off = project_out(exact.basis, exact.mean)
    everything, part = (assemble(shared, count, derive(0, "off")) for count in (len(shared.shares), 2 * 16))
    for k in (6, 15):
        refined = exact.basis @ (exact.basis.T @ D[k]) + off
        identity = torch.eye(refined.shape[1], dtype=torch.float64)
        best, least = truncate(LowRank(refined, identity), 4)  # where the spectrum has a gap, the best is one only
        ours, error = one_refined(everything, k, 4)
        assert torch.linalg.matrix_norm(ours.dense() - best.dense()) < 1e-8 * torch.linalg.matrix_norm(refined)
        assert error == pytest.approx(least, abs=1e-8) and ours.rank == 4
        best, least = truncate(LowRank(refined, identity), 8)
        assert one_refined(everything, k, 8)[1] == pytest.approx(least, abs=1e-8)
        near, error = one_refined(part, k, 8)
        measured = torch.linalg.matrix_norm(near.dense() - refined) / torch.linalg.matrix_norm(refined)
        assert float(measured) == pytest.approx(error, abs=1e-8)
        assert least <= error < 1.02 * least


def test_single_precision_moves_the_result_by_rounding():
    updates = adapters()
    single = [LowRank(u.B.float(), u.A.float(), u.scale) for u in updates]
    exact = fit_frame(dense(updates), WEIGHTS, BENIGN, RANK)
    assert sin_theta(shared_of(single).lifted_basis().double(), exact.basis) < 1e-5


MATMUL = getattr(torch.backends.mkldnn, "matmul", None)
settable = pytest.mark.skipif(not hasattr(MATMUL, "fp32_precision"), reason="PyTorch before 2.9 cannot set it")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_gram_matrices_are_as_exact_as_single_precision_whatever_the_files_hold(dtype):
    updates = [LowRank(u.B.to(dtype), u.A.to(dtype), u.scale) for u in adapters(K=40, p=512)]
    stacked = stack(updates)
    for G, F in ((stacked.G_B, stacked.B.double()), (stacked.G_A, stacked.A.T.double())):
        sizes = torch.linalg.vector_norm(F, dim=0)
        assert float(((G - F.T @ F) / (sizes[:, None] * sizes)).abs().max()) < 1e-6  # bfloat16 rounds at 4e-3


@settable
def test_products_are_in_bfloat16_only_where_all_factors_are(monkeypatch):
    seen, before = [], MATMUL.fp32_precision
    monkeypatch.setattr(grams, "gram", lambda B: seen.append(MATMUL.fp32_precision) or B.T @ B)
    half, single = ([LowRank(u.B.to(d), u.A.to(d)) for u in adapters(K=3)] for d in (torch.bfloat16, torch.float32))
    for updates in (half, single, [*half[:2], single[2]], [LowRank(half[0].B, single[0].A)] * 3):
        stack(updates)
    assert seen == ["bf16"] * 2 + [before] * 6
    with pytest.raises(ValueError), grams.bfloat16_products(torch.device("cpu"), True):
        raise ValueError
    assert MATMUL.fp32_precision == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ranks_are_those_of_the_updates_whatever_the_factors_ranks(dtype):
    g = torch.Generator().manual_seed(0)

    def factor(p, rank):
        return torch.randn(p, rank, generator=g, dtype=torch.float64) @ torch.randn(rank, 16, generator=g).double()

    ranks = [(4, 16), (16, 4), (16, 16), (3, 5), (16, 16)]
    updates = [LowRank(factor(300, b).to(dtype), factor(200, a).T.to(dtype), 2.0) for b, a in ranks]
    updates[-1] = replace(updates[-1], scale=0.0)
    assert compress(stack(updates), (64, 64), generator=derive(0, "ranks")).ranks.tolist() == [4, 4, 16, 3, 0]


def test_subspace_is_exact_where_no_gap_ends_it():
    updates = adapters()
    exact = fit_frame(dense(updates), WEIGHTS, BENIGN, RANK + 2)
    assert sin_theta(shared_of(updates, rank=RANK + 2).lifted_basis(), exact.basis) < 1e-10


def test_a_rank_that_the_members_do_not_have_is_cut():
    updates = adapters(noise=0.0)
    shared = shared_of(updates, rank=40)
    assert RANK <= shared.basis.shape[1] < 40
    exact = fit_frame(dense(updates), WEIGHTS, BENIGN, RANK)
    assert sin_theta(shared.lifted_basis()[:, :RANK], exact.basis) < 1e-6


def test_no_noise_and_clients_without_update():
    updates = adapters(noise=0.0)
    updates[0] = LowRank(torch.zeros_like(updates[0].B), updates[0].A)
    shared, exact = shared_of(updates), fit_frame(dense(updates), WEIGHTS, BENIGN, RANK)
    assert sin_theta(shared.lifted_basis(), exact.basis) < 1e-7
    adapter, error = one_refined(assemble(shared, 32, derive(0, "off")), 9, 16)
    assert error < 1e-6 and torch.allclose(adapter.dense(), updates[9].dense(), atol=1e-6)


def test_clair_finds_the_same_by_either_way(monkeypatch):
    updates = adapters(noise=0.8)
    by_gram = CLAIR().fit(updates)
    monkeypatch.setattr("clairlib.recovery.clair.FILLED", 10**6)
    exact = CLAIR().fit(updates)
    assert by_gram.benign.tolist() == exact.benign.tolist() == BENIGN.tolist()
    assert by_gram.rank == exact.rank == RANK
    assert sin_theta(by_gram.basis, exact.basis) < 1e-10
    off, own = exact.common_part.dense(), ~exact.benign
    assert torch.linalg.matrix_norm(by_gram.common_part.dense() - off) < 1e-8 * torch.linalg.matrix_norm(off)
    assert torch.equal(dense(by_gram.refined)[own], dense(exact.refined)[own])
    ours, least = by_gram.truncation_errors, exact.truncation_errors  # the one by twice the rank's directions of off
    assert bool((ours >= least).all() and (ours <= 1.02 * least).all()) and torch.equal(least > 0, BENIGN)


def test_no_p_times_q_array_is_formed():
    """A module whose dense update would take 80 GB."""
    g = torch.Generator().manual_seed(0)
    p = q = 100_000
    updates = [LowRank(torch.randn(p, 4, generator=g), torch.randn(4, q, generator=g)) for _ in range(3)]
    with pytest.raises(RuntimeError, match="alloc|memory"):
        torch.empty(p * 10_000, q, dtype=torch.float64).fill_(1.0)
    assert CLAIR().fit(updates).basis.shape[0] == p
