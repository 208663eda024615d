"""The window of the convex program's weight."""

import math

import pytest
import torch

from clairlib.core.seeds import derive
from clairlib.linalg.subspace import project_out, sin_theta
from clairlib.recovery.convex import decompose, lambda_window
from clairlib.simulate import planted
from clairlib.theory.exact_recovery import balanced_window, certified_weight, oracle_program, recovery_certificate


def orthogonal_blocks(K, p, q, r):
    """K blocks U A_k whose joint right singular vectors have ||V_k||_F = sqrt(r / K) exactly."""
    U, signs = torch.eye(p, r, dtype=torch.float64), torch.tensor([1.0, -1.0] * (K // 2), dtype=torch.float64)
    A = torch.eye(r, q, dtype=torch.float64)
    return signs[:, None, None] * (U * torch.arange(1, r + 1)) @ A


def subspace_error(found, truth):
    basis = torch.linalg.svd(torch.cat(list(found.low_rank), 1))[0][:, : truth.rank]
    return sin_theta(basis, truth.basis)


def test_window_ends_on_a_case_known_in_closed_form():
    low_rank = torch.zeros(8, 6, 4, dtype=torch.float64)
    low_rank[:4] = orthogonal_blocks(4, 6, 4, 3)
    contamination = torch.zeros_like(low_rank)
    contamination[4:] = 7 * torch.eye(6, 4, dtype=torch.float64)  # colluders: singular values 1/2, four times
    low, high = lambda_window(low_rank, contamination)
    assert low == pytest.approx(math.sqrt(3 / 4), rel=1e-12)
    assert high == pytest.approx(math.sqrt(4 / 4), rel=1e-12)  # sqrt(r / |S^c|)


def test_rank_given_overrides_the_count():
    low_rank = orthogonal_blocks(4, 6, 4, 3)
    low, _ = lambda_window(low_rank, torch.zeros_like(low_rank), rank=1)
    assert low == pytest.approx(math.sqrt(1 / 4), rel=1e-12)


def test_rounding_counts_neither_as_rank_nor_as_contamination():
    generator = torch.Generator().manual_seed(0)
    low_rank = orthogonal_blocks(4, 6, 4, 3)
    dust = 1e-9 * torch.randn(low_rank.shape, generator=generator, dtype=torch.float64)
    contamination = dust.clone()
    contamination[0] += torch.eye(6, 4)
    low, high = lambda_window(low_rank + dust, contamination)
    assert low == pytest.approx(math.sqrt(3 / 4), abs=1e-6)
    assert high == pytest.approx(2.0, abs=1e-6)


def test_empty_sides():
    blocks = torch.ones(3, 2, 2, dtype=torch.float64)
    assert lambda_window(0 * blocks, 0 * blocks) == (0.0, math.inf)
    low, high = lambda_window(blocks, blocks)
    assert low == 0.0 and math.isfinite(high)


@pytest.mark.parametrize("seed", range(3))
def test_every_optimum_lies_in_its_own_window(seed):
    """Both ends are necessary: whatever lam is, the optimum found with it has low <= lam <= high."""
    generator = torch.Generator().manual_seed(seed)
    updates = planted(share=0.4, K=20, p=15, q=6, r=2, noise_std=0.0, generator=generator).updates
    for lam in (0.4, 0.6, 0.9):
        found = decompose(updates, lam=lam, tolerance=1e-10)
        low, high = lambda_window(found.low_rank, found.contamination)
        assert low <= lam * (1 + 1e-4) and lam <= high * (1 + 1e-4)


@pytest.mark.parametrize("kind", ["unstructured", "dense"])
@pytest.mark.parametrize("seed", [1, 2])
def test_planted_window_separates_success_from_failure(kind, seed):
    """60 % contaminated about the same common part: exact at the window's centre, not beyond its ends."""
    generator = torch.Generator().manual_seed(seed)
    truth = planted(kind, share=0.6, K=30, p=20, q=20, r=3, noise_std=0.0, common_norm=0.0, generator=generator)
    benign = truth.benign[:, None, None]
    centred = truth.targets - truth.targets[truth.benign].mean(0)
    low, high = lambda_window(torch.where(benign, centred, 0.0), torch.where(benign, 0.0, truth.targets))
    assert low < high
    inside = decompose(truth.updates, lam=math.sqrt(low * high))
    assert torch.equal(inside.contaminated, ~truth.benign)
    assert subspace_error(inside, truth) < 1e-5
    for outside in (0.8 * low, 1.2 * high):
        assert subspace_error(decompose(truth.updates, lam=outside), truth) > 1e-3


def noiseless(kind="unstructured", share=0.3, r=2, common=1.0, seed=0):
    generator = derive(seed, "certificate", kind)
    return planted(kind, share=share, K=20, p=15, q=8, r=r, noise_std=0.0, common_norm=common, generator=generator)


def as_planted(truth):
    benign, centred = truth.benign[:, None, None], truth.updates - truth.updates[truth.benign].mean(0)
    return torch.where(benign, centred, 0.0), torch.where(benign, 0.0, centred)


def off_subspace(truth):
    """Updates whose contamination has no part in the subspace: there the balanced window is exact."""
    low_rank, contamination = as_planted(truth)
    return low_rank + project_out(truth.basis, contamination)


@pytest.mark.parametrize("kind", ["unstructured", "dense", "coalition"])
@pytest.mark.parametrize("common", [0.0, 2.0])
def test_balanced_window_is_where_the_certificate_holds(kind, common):
    """Contamination off the subspace: the certificate's two numbers in closed form."""
    truth = noiseless(kind, common=common)
    updates = off_subspace(truth)
    low_rank, contamination = torch.where(truth.benign[:, None, None], updates, 0.0), updates.clone()
    contamination[truth.benign] = 0.0
    low, high = balanced_window(low_rank, contamination)
    planted_low, planted_high = lambda_window(low_rank, contamination)
    assert planted_low <= low and high <= planted_high
    at_low, at_high = (recovery_certificate(updates, truth.benign, truth.basis, lam) for lam in (low, high))
    assert at_low.block == pytest.approx(1, rel=1e-8) and at_high.spectral == pytest.approx(1, rel=1e-8)
    assert at_low.spectral == pytest.approx(low / high, rel=1e-8)


def test_balanced_window_sees_contamination_that_leans():
    """Half of the clients all moved the same way: the planted window is open, the balanced one is not."""
    low_rank = torch.zeros(8, 6, 4, dtype=torch.float64)
    low_rank[:4] = orthogonal_blocks(4, 6, 4, 1)
    contamination = torch.zeros_like(low_rank)
    contamination[4:, 5, 3] = 1.0
    assert lambda_window(low_rank, contamination) == pytest.approx((0.5, 0.5))
    low, high = balanced_window(low_rank, contamination)
    assert math.isinf(low) and high == pytest.approx(1 / math.sqrt(4 + 16 / 4))
    assert balanced_window(low_rank, 0 * contamination) == lambda_window(low_rank, 0 * contamination)


@pytest.mark.parametrize("kind", ["unstructured", "dense", "coalition"])
@pytest.mark.parametrize("r", [1, 3])
def test_certificate_is_feasible_and_agrees_with_the_solvers_multiplier(kind, r):
    truth = noiseless(kind, share=0.25, r=r)
    lam = certified_weight(truth.updates, truth.benign, truth.basis)
    proof = recovery_certificate(truth.updates, truth.benign, truth.basis, lam)
    assert proof.verdict(0.02) == "exact" and proof.spectral == pytest.approx(proof.block, rel=0.03)
    Y = proof.dual
    assert Y.sum(0).norm() < 1e-8
    spectrum = torch.linalg.svdvals(torch.cat(list(Y), 1))
    torch.testing.assert_close(spectrum[:r], torch.ones(r, dtype=torch.float64))
    assert float(spectrum[r]) == pytest.approx(proof.spectral)
    found = decompose(truth.updates, lam=lam, tolerance=1e-9)
    value = float((Y * truth.updates).sum())
    assert value == pytest.approx(found.certificate.primal, rel=1e-8), "strong duality"
    torch.testing.assert_close(truth.basis.T @ found.dual, truth.basis.T @ Y, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.dual[~truth.benign], Y[~truth.benign], rtol=0, atol=1e-3)


def test_no_other_multiplier_has_a_smaller_norm():
    truth = noiseless("dense", share=0.5)
    lam = certified_weight(truth.updates, truth.benign, truth.basis)
    proof = recovery_certificate(truth.updates, truth.benign, truth.basis, lam)
    W, _ = oracle_program(truth.updates, truth.benign, truth.basis, lam)
    Z = project_out(truth.basis, proof.dual)
    inside = torch.cat([torch.eye(8, dtype=W.dtype).expand(20, 8, 8), W], 1)[truth.benign]
    rows = inside.permute(1, 0, 2).flatten(1)
    rows = torch.linalg.qr(rows.T).Q  # (s q, q + r)
    for seed in range(5):
        change = torch.randn(15, rows.shape[0], generator=derive(seed, "other"), dtype=torch.float64)
        change = project_out(truth.basis, change - (change @ rows) @ rows.T).reshape(15, -1, 8).permute(1, 0, 2)
        for size in (1e-3, 0.1):
            other = Z.clone()
            other[truth.benign] += size * change
            assert torch.linalg.matrix_norm(torch.cat(list(other), 1), ord=2) >= proof.spectral - 1e-9
            assert other.norm() > Z.norm()


@pytest.mark.parametrize("kind", ["unstructured", "coalition"])
def test_verdicts_are_what_the_program_does(kind):
    verdicts = set()
    for share in (0.25, 0.45):
        truth = noiseless(kind, share=share, common=0.0, seed=1)
        for lam in (0.3, 0.45, 0.6, 0.8, 1.2):
            verdict = recovery_certificate(truth.updates, truth.benign, truth.basis, lam).verdict(0.01)
            found = decompose(truth.updates, lam=lam, tolerance=1e-8)
            sizes = torch.linalg.matrix_norm(found.contamination)
            right = torch.equal(sizes <= 1e-4 * sizes.max(), truth.benign) and subspace_error(found, truth) < 1e-4
            assert verdict == "undecided" or right == (verdict == "exact"), (share, lam, verdict)
            verdicts.add(verdict)
    assert verdicts >= {"exact", "not exact"}


def test_a_random_basis_is_not_certified():
    truth = noiseless(share=0.25)
    lam = certified_weight(truth.updates, truth.benign, truth.basis)
    basis = torch.linalg.qr(torch.randn(15, 2, generator=derive(0, "random"), dtype=torch.float64)).Q
    Y = recovery_certificate(truth.updates, truth.benign, basis, lam).dual
    value = float((Y * truth.updates).sum())
    optimum = decompose(truth.updates, lam=lam).certificate.primal
    assert abs(value / optimum - 1) > 1e-2, "its multiplier proves nothing about these clients"
