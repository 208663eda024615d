"""The window of the convex program's weight."""

import math

import pytest
import torch

from clairlib.clients import planted
from clairlib.decompose import decompose
from clairlib.subspace import sin_theta
from clairlib.theory import lambda_window


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
    updates = planted(share=0.4, K=20, p=15, q=6, r=2, noise=0.0, generator=generator).updates
    for lam in (0.4, 0.6, 0.9):
        found = decompose(updates, lam=lam, tolerance=1e-10)
        low, high = lambda_window(found.low_rank, found.contamination)
        assert low <= lam * (1 + 1e-4) and lam <= high * (1 + 1e-4)


@pytest.mark.parametrize("kind", ["unstructured", "dense"])
@pytest.mark.parametrize("seed", [1, 2])
def test_planted_window_separates_success_from_failure(kind, seed):
    """60 % contaminated about the same common part: exact at the window's centre, not beyond its ends."""
    generator = torch.Generator().manual_seed(seed)
    truth = planted(kind, share=0.6, K=30, p=20, q=20, r=3, noise=0.0, common=0.0, generator=generator)
    benign = truth.benign[:, None, None]
    centred = truth.targets - truth.targets[truth.benign].mean(0)
    low, high = lambda_window(torch.where(benign, centred, 0.0), torch.where(benign, 0.0, truth.targets))
    assert low < high
    inside = decompose(truth.updates, lam=math.sqrt(low * high))
    assert torch.equal(inside.contaminated, ~truth.benign)
    assert subspace_error(inside, truth) < 1e-5
    for outside in (0.8 * low, 1.2 * high):
        assert subspace_error(decompose(truth.updates, lam=outside), truth) > 1e-3
