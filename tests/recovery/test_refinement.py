"""Refinement: Statement 4's errors, the estimated gain, and when refinement is refused."""

from dataclasses import replace

import pytest
import torch

from clairlib import CLAIR
from clairlib.core.seeds import derive
from clairlib.linalg.subspace import project_out
from clairlib.recovery import refinement
from clairlib.recovery.frame import fit_frame
from clairlib.recovery.refinement import estimate_gain, refined_core
from clairlib.simulate import planted
from clairlib.simulate.attacks import random_frame


def draw(seed, share=0.25, K=16, p=30, q=8, r=3, noise=0.05, **options):
    generator = derive(seed, "refinement")
    return planted(share=share, K=K, p=p, q=q, r=r, noise_std=noise, generator=generator, **options)


def ones(c):
    return torch.ones(len(c.updates), dtype=torch.float64)


def error(c, estimates):
    """Mean squared Frobenius error of the benign clients."""
    return float((estimates - c.targets)[c.benign].square().sum((1, 2)).mean())


def off_subspace_differences(c, rank, size, seed):
    """Clients with client-specific, low-rank parts of a given size outside the subspace, as part of their targets."""
    generator, (K, p, q) = derive(seed, "different"), c.updates.shape
    H = torch.randn(K, p, rank, generator=generator, dtype=torch.float64)
    H = project_out(c.basis, H @ torch.randn(K, rank, q, generator=generator, dtype=torch.float64))
    H = H * (size / H.norm(dim=(1, 2)) * c.benign)[:, None, None]
    return replace(c, updates=c.updates + H, targets=c.targets + H)


@pytest.mark.parametrize("heterogeneity", [0.0, 0.3])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_statement4_errors_with_the_oracle_subspace_and_set(share, heterogeneity):
    """local sigma^2 p q;  refined sigma^2 (r q + (p - r) q / s) + h^2 (1 - 1/s), within 3 standard errors."""
    K, p, q, r, sigma = 16, 30, 8, 3, 0.05
    s, local, refined = round(K * (1 - share)), [], []
    for seed in range(60):
        c = draw(seed, share, heterogeneity=heterogeneity)
        frame = replace(fit_frame(c.updates, ones(c), c.benign, r), basis=c.basis)
        local.append(error(c, c.updates))
        refined.append(error(c, refined_core(c.updates, frame)))
    expected = sigma**2 * (r * q + (p - r) * q / s) + heterogeneity**2 * (1 - 1 / s)
    for values, target in ((local, sigma**2 * p * q), (refined, expected)):
        values = torch.tensor(values)
        assert float(values.mean()) == pytest.approx(target, abs=3 * float(values.std()) / 60**0.5)


def test_statement4_first_order_cost_of_an_estimated_subspace():
    """With P estimated from the set: r (p - r) sigma^2 / s a client more, up to terms of order (noise / signal)^2."""
    K, p, r, sigma, cost = 16, 30, 3, 0.01, []
    for seed in range(60):
        c = draw(seed, share=0.0, noise=sigma)
        frame = fit_frame(c.updates, ones(c), c.benign, r)
        oracle = replace(frame, basis=c.basis)
        cost.append(error(c, refined_core(c.updates, frame)) - error(c, refined_core(c.updates, oracle)))
    values = torch.tensor(cost)
    target = r * (p - r) * sigma**2 / K
    assert float(values.mean()) == pytest.approx(target, abs=4 * float(values.std()) / 60**0.5 + 0.15 * target)


def test_refined_core_keeps_the_inside_and_averages_the_outside():
    c = draw(0)
    frame = fit_frame(c.updates, ones(c), c.benign, 3)
    refined, U = refined_core(c.updates, frame), frame.basis
    assert torch.allclose(U.T @ refined, U.T @ c.updates, atol=1e-13)
    mean = c.updates[c.benign].mean(0)
    assert torch.allclose(project_out(U, refined), project_out(U, mean).expand_as(refined), atol=1e-13)


def test_refinement_with_a_random_basis_loses_the_signal():
    c = draw(0)
    frame = fit_frame(c.updates, ones(c), c.benign, 3)
    wrong = replace(frame, basis=random_frame(30, 3, generator=derive(0, "wrong")))
    assert error(c, refined_core(c.updates, frame)) < 0.3 * error(c, c.updates)
    assert error(c, refined_core(c.updates, wrong)) > 2 * error(c, c.updates)
    assert estimate_gain(c.updates, ones(c), wrong).local > 0


@pytest.mark.parametrize("noise", [0.01, 0.05, 0.1])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_estimated_gain_is_close_to_the_true_one(share, noise):
    """Mean over 12 seeds within .05 of the mean true gain; the estimate costs no knowledge of targets."""
    estimated, true = [], []
    for seed in range(12):
        c = draw(seed, share, noise=noise)
        frame = fit_frame(c.updates, ones(c), c.benign, 3)
        estimated.append(estimate_gain(c.updates, ones(c), frame).relative)
        true.append(1 - error(c, refined_core(c.updates, frame)) / error(c, c.updates))
    assert sum(estimated) / 12 == pytest.approx(sum(true) / 12, abs=0.05)


def test_gain_terms_are_those_of_statement4():
    """Without differences between clients: noise energy N outside, then r / p_e, 1 / s and r / (q_e s) of it."""
    p, q, r, s, sigma, terms = 30, 8, 3, 16, 0.05, []
    for seed in range(12):
        c = draw(seed, share=0.0, noise=sigma)
        terms.append(estimate_gain(c.updates, ones(c), fit_frame(c.updates, ones(c), c.benign, r)))
    mean = {name: sum(getattr(t, name) for t in terms) / 12 for name in ("local", "inside", "off_subspace")}
    assert mean["local"] == pytest.approx(sigma**2 * p * q, rel=0.05)
    assert mean["inside"] == pytest.approx(sigma**2 * r * q, rel=0.10)
    assert mean["off_subspace"] == pytest.approx(sigma**2 * (p - r) * q / s, rel=0.05)
    assert sum(t.heterogeneity for t in terms) / 12 < 0.05 * mean["local"]
    assert sum(t.subspace_cost for t in terms) / 12 == pytest.approx(sigma**2 * (p - r) * r / s, rel=0.10)


def test_gain_does_not_depend_on_the_unit():
    c = draw(0)
    gains = [estimate_gain(X, ones(c), fit_frame(X, ones(c), c.benign, 3)) for X in (c.updates, 1e4 * c.updates)]
    assert gains[1].relative == pytest.approx(gains[0].relative, rel=1e-9)
    assert gains[1].local == pytest.approx(1e8 * gains[0].local, rel=1e-9)


def test_structured_heterogeneity_is_seen():
    """Energy h^2 of a rank-2 difference, well above a client's own noise, is found to within a third."""
    c = draw(0, share=0.0, K=12, p=40, q=20, r=2, noise=0.02)
    c = off_subspace_differences(c, rank=2, size=1.0, seed=0)
    gain = estimate_gain(c.updates, ones(c), fit_frame(c.updates, ones(c), c.benign, 2))
    assert gain.heterogeneity == pytest.approx(1.0 * (1 - 1 / 12), rel=0.34)
    assert gain.relative < 0


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("seed", range(2))
def test_refinement_is_refused_where_it_would_hurt(rank, seed):
    c = draw(seed, share=0.0, K=12, p=40, q=20, r=2, noise=0.02)
    c = off_subspace_differences(c, rank, size=1.2, seed=seed)
    result = CLAIR(rank=2).fit(c.updates)
    module = result.modules["update"]
    assert not module.is_refined and result.gain <= 0
    assert torch.equal(result.refined, c.updates)
    assert "not refined" in result.summary()
    frame = fit_frame(c.updates, ones(c), c.benign, 2)
    assert error(c, refined_core(c.updates, frame)) > error(c, c.updates)  # it was right to refuse


def test_refinement_is_not_refused_where_it_helps():
    c = draw(0, share=0.0, K=12, p=40, q=20, r=2, noise=0.02)
    result = CLAIR(rank=2).fit(c.updates)
    assert result.modules["update"].is_refined and "estimated gain" in result.summary()
    assert error(c, result.refined) < 0.2 * error(c, c.updates)


def test_nothing_to_gain_without_noise():
    c = draw(0, noise=0.0)
    gain = estimate_gain(c.updates, ones(c), fit_frame(c.updates, ones(c), c.benign, 3))
    assert gain.relative == 0.0


def test_one_client_of_low_rank_does_not_hide_the_heterogeneity_of_the_others():
    c = planted(share=0.0, K=12, p=40, q=20, r=2, noise_std=0.02, heterogeneity=1.0, heterogeneity_rank=2,
                generator=derive(0, "low-rank client"))  # fmt: skip
    X = c.updates.clone()
    U, S, Vh = torch.linalg.svd(X[0], full_matrices=False)
    X[0] = U[:, :4] * S[:4] @ Vh[:4]
    w = torch.ones(12, dtype=torch.float64)
    assert estimate_gain(X, w, fit_frame(X, w, w > 0, 2)).relative < 0


def test_singular_values_raised_by_noise_are_inverted():
    """y^2 = (x^2 + a) (x^2 + b) / x^2 forwards, one direction, then what the estimate makes of it."""
    rows, columns, sigma2, x2 = 40.0, 20.0, 0.01, 3.0
    a, b = sigma2 * rows, sigma2 * columns
    y2 = (x2 + a) * (x2 + b) / x2
    V = x2 + sigma2 * rows * columns
    squares = torch.full((5, 1), y2, dtype=torch.float64)
    assert refinement.energy_above_noise(squares, V, rows, columns) == pytest.approx(x2, rel=1e-6)


def test_known_noise_shows_differences_that_look_like_noise():
    """Dense heterogeneity larger than the noise: taken for noise where that is unknown, refused where it is known."""
    noise = 0.3 / 10**0.5
    size = 1.5 * noise * (47 * 10) ** 0.5
    truth = planted(share=0.0, noise_std=noise, heterogeneity=size, q=10, generator=derive(0, "known"))
    energy = torch.full((24,), 50 * 10 * noise**2, dtype=torch.float64)
    blind, told = CLAIR().fit(truth.updates), CLAIR().fit(truth.updates, expected_sq_error=energy)
    assert blind.modules["update"].is_refined and not told.modules["update"].is_refined
    honest = planted(share=0.0, noise_std=noise, q=10, generator=derive(1, "known")).updates
    assert CLAIR().fit(honest, expected_sq_error=energy).gain == pytest.approx(CLAIR().fit(honest).gain, abs=0.05)


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ([1.0], r"expected_sq_error must have shape \(24,\)"),
        ([-1.0] * 24, "not negative"),
        ({"other": [1.0] * 24}, "module 'other'"),
    ],
)
def test_noise_that_does_not_fit_is_refused(noise, message):
    with pytest.raises(ValueError, match=message):
        CLAIR().fit(planted(share=0.0, generator=derive(0, "known")).updates, expected_sq_error=noise)
