"""Planted clients are what they say: norms, frames, contamination kinds, seeds."""

import pytest
import torch

from clairlib.core.seeds import derive
from clairlib.linalg.subspace import project_out, sin_theta
from clairlib.simulate import ATTACKS, planted
from clairlib.simulate.attacks import random_frame

KINDS = sorted(ATTACKS)


def draw(kind="unstructured", seed=0, **options):
    return planted(kind, generator=derive(seed, "clients"), **options)


def differences(clients, who):
    """Left singular vectors and values of the differences between the targets of some clients."""
    D = clients.targets[who][1:] - clients.targets[who][:1]
    U, s, _ = torch.linalg.svd(torch.cat(list(D), dim=1), full_matrices=False)
    return U, s


def test_random_frame_is_orthonormal_and_uniform():
    """Uniform: E[U U'] = (r / p) I. The entries of U U' have variance below r / p^2; five standard errors."""
    generator, (p, r, n) = derive(0, "frames"), (6, 2, 400)
    frames = [random_frame(p, r, generator=generator) for _ in range(n)]
    assert all(torch.allclose(U.T @ U, torch.eye(r, dtype=torch.float64), atol=1e-14) for U in frames)
    mean = sum(U @ U.T for U in frames) / n
    assert (mean - r / p * torch.eye(p, dtype=torch.float64)).abs().max() < 5 * (r / p**2 / n) ** 0.5
    assert sum(U for U in frames).abs().max() / n < 5 / (p * n) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share, bad", [(0.0, 0), (0.3, 6), (0.75, 15)])
def test_shapes_and_number_of_contaminated(kind, share, bad):
    c = draw(kind, share=share, K=20, p=12, q=5, r=2)
    assert c.updates.shape == c.targets.shape == (20, 12, 5)
    assert c.updates.dtype == torch.float64 and c.benign.dtype == torch.bool
    assert int((~c.benign).sum()) == bad
    assert c.basis.shape == (12, 2) and c.common_part.shape == (12, 5) and c.rank == 2


@pytest.mark.parametrize("kind", KINDS)
def test_benign_clients_share_one_frame(kind):
    c = draw(kind, share=0.4, p=20, q=6, r=3)
    off = project_out(c.basis, c.targets[c.benign] - c.common_part)
    assert off.abs().max() < 1e-14
    U, s = differences(c, c.benign)
    assert s[3] < 1e-12 < s[2] and sin_theta(U[:, :3], c.basis) < 1e-12


def test_norms_of_the_benign_model():
    """||M||_F = common exactly; each of the r rows of A_k has expected squared norm 1 (variance 2 / q)."""
    K, q, r = 400, 10, 3
    c = draw(share=0.0, K=K, q=q, r=r, common_norm=2.0)
    assert float(c.common_part.norm()) == pytest.approx(2.0, rel=1e-12)
    A = c.basis.T @ (c.targets - c.common_part)
    assert torch.allclose(A.square().sum(2).mean(0), torch.ones(r).double(), atol=4 * (2 / (q * K)) ** 0.5)


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_noise_has_the_stated_size(noise):
    c = draw(noise_std=noise)
    E = c.updates - c.targets
    assert c.noise_std == noise
    assert float(E.square().mean()) == pytest.approx(noise**2, rel=4 * (2 / E.numel()) ** 0.5)
    assert abs(float(E.mean())) <= 4 * noise / E.numel() ** 0.5


def test_heterogeneity_is_off_subspace_and_exact_in_size():
    c = draw(share=0.25, heterogeneity=0.7)
    H = project_out(c.basis, c.targets[c.benign] - c.common_part)
    assert torch.allclose(H.norm(dim=(1, 2)), torch.tensor(0.7).double(), atol=1e-12)
    assert float((H[0] * H[1]).sum() / H[0].norm() / H[1].norm()) < 0.5  # each client has its own


def test_heterogeneity_and_noise_do_not_move_the_frame():
    plain, noisy = draw(), draw(heterogeneity=1.0, noise_std=0.5)
    assert torch.equal(plain.basis, noisy.basis) and torch.equal(plain.benign, noisy.benign)


def test_unstructured_clients_have_frames_of_their_own():
    c = draw("unstructured", share=0.5, p=40, q=6, r=2, K=8)
    bad = c.targets[~c.benign]
    pairs = [differences(c, (~c.benign).nonzero().flatten()[[i, i + 1]]) for i in range(len(bad) - 1)]
    assert all(s[4] > 0.05 for _, s in pairs)  # two 2-frames with common parts of their own differ by full rank q
    assert all(sin_theta(U[:, :2], c.basis) > 0.3 for U, _ in pairs)


def test_coalition_shares_one_frame_that_is_not_the_benign_one():
    c = draw("coalition", share=0.4, r=3)
    U, s = differences(c, ~c.benign)
    assert s[3] < 1e-12 < s[2]
    assert sin_theta(U[:, :3], c.basis) > 0.5
    off = project_out(U[:, :3], c.targets[~c.benign])
    assert torch.allclose(off, off[:1].expand_as(off), atol=1e-12)
    assert float(off[0].norm()) > 0.8  # a common part of its own, of unit size less its part inside the frame


def test_sign_flip_is_the_negative_of_an_honest_update():
    honest, flipped = draw(share=0.0), draw("sign_flip", share=0.3)
    assert torch.equal(flipped.targets[~flipped.benign], -honest.targets[~flipped.benign])
    assert torch.equal(flipped.targets[flipped.benign], honest.targets[flipped.benign])


def test_dense_contamination_has_full_rank_and_the_benign_energy():
    c = draw("dense", share=0.5, K=200, r=3, common_norm=1.0)
    bad = c.targets[~c.benign]
    energy = bad.square().sum((1, 2))
    assert float(energy.mean()) == pytest.approx(4.0, rel=4 * (2 / bad.numel()) ** 0.5)
    assert torch.linalg.svdvals(bad)[:, -1].min() > 0.05
    honest = c.targets[c.benign].square().sum((1, 2))
    assert float(honest.mean()) == pytest.approx(4.0, rel=4 * float(honest.std()) / 4 / len(honest) ** 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_clients_and_another_seed_others(kind):
    first, again, other = draw(kind), draw(kind), draw(kind, seed=1)
    assert torch.equal(first.updates, again.updates) and torch.equal(first.benign, again.benign)
    assert not torch.equal(first.updates, other.updates)
    assert sin_theta(first.basis, other.basis) > 0.1


def test_global_generator_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    draw()
    assert torch.equal(torch.rand(3), expected)


def test_contaminated_clients_stand_at_random_places():
    """Each place is contaminated in 3 of 10 draws; 60 draws, binomial bound at 1e-4 / 10 a side."""
    counts = sum((~draw(seed=seed, K=10, p=4, q=2, r=1).benign).int() for seed in range(60))
    assert 4 <= int(counts.min()) and int(counts.max()) <= 36


def test_unknown_kind_and_impossible_rank_are_refused():
    with pytest.raises(ValueError, match="stealth, free_rider; got 'other'"):
        draw("other")
    with pytest.raises(ValueError, match="r = 5 leaves no room in p = 4"):
        draw(p=4, r=5)


def test_strength_is_the_part_of_the_way_to_the_attack():
    honest, half, full = (draw("coalition", share=0.4, strength=x).targets for x in (0.0, 0.5, 1.0))
    assert torch.equal(honest, draw("coalition", share=0.0).targets)
    assert torch.allclose(half, (honest + full) / 2) and not torch.equal(half, honest)


def test_heterogeneity_has_the_rank_asked_for():
    c = draw(share=0.0, noise_std=0.0, p=20, q=6, r=2, heterogeneity=0.5, heterogeneity_rank=1)
    H = project_out(c.basis, c.targets - c.common_part)
    values = torch.linalg.svdvals(H)
    assert torch.allclose(values[:, 0], torch.full((24,), 0.5, dtype=torch.float64)) and values[:, 1].max() < 1e-14


def test_noise_is_coloured_along_rows_and_scaled_by_weights():
    """Correlation of neighbours and variances by client, from 24 x 1,000 columns: standard errors below .01."""
    weights = torch.tensor([1.0, 4.0]).repeat(12)
    c = draw(share=0.0, p=20, q=1000, noise_std=0.2, row_correlation=0.6, weights=weights)
    E = c.updates - c.targets
    assert float((E[:, 1:] * E[:, :-1]).mean() / E.square().mean()) == pytest.approx(0.6, abs=0.02)
    assert float(E[weights == 1].std()) == pytest.approx(0.2, rel=0.02)
    assert float(E[weights == 4].std()) == pytest.approx(0.1, rel=0.02)


def test_a_correlation_of_one_is_refused():
    with pytest.raises(ValueError, match="row_correlation"):
        draw(row_correlation=1.0)
