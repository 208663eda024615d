"""Subspaces: angles against scipy and known rotations, and the rank of planted spectra."""

import math

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from clairlib.core.seeds import derive
from clairlib.linalg.rank import HELD_OUT_SNR, HELD_OUT_WINDOW, estimate_rank, gap_rank, held_out_rank
from clairlib.linalg.subspace import project_out, sin_theta
from clairlib.simulate.attacks import random_frame

SEEDS = 20
ALLOWED = int(stats.binom.ppf(1 - 1e-4, SEEDS, 0.05))  # misses of 20 seeds, were the rate of misses 5 %


def rotated(p, angles, dtype=torch.float64):
    """Two bases (p, r) with given principal angles, in a random rotation of space and another of each basis."""
    r, generator = len(angles), derive(0, "rotated", p)
    space = random_frame(p, 2 * r, generator=generator)
    angles = torch.tensor(angles, dtype=torch.float64)
    second = space[:, :r] * angles.cos() + space[:, r:] * angles.sin()
    gauges = [random_frame(r, r, generator=generator) for _ in range(2)]
    return (space[:, :r] @ gauges[0]).to(dtype), (second @ gauges[1]).to(dtype)


def planted_spectrum(seed, rank, rho, p=50, n=200, strength=2.0):
    """Squared singular values of U A + noise, the noise with AR(rho) rows and columns; signal above its edge."""
    generator = derive(seed, "spectrum", rank)

    def colour(length):
        places = torch.arange(length, dtype=torch.float64)
        return torch.linalg.cholesky(torch.as_tensor(rho) ** (places[:, None] - places).abs())

    noise = torch.randn(p, n, generator=generator, dtype=torch.float64)
    if rho:
        noise = colour(p) @ noise @ colour(n).T
    U, Vh = random_frame(p, rank, generator=generator), random_frame(n, rank, generator=generator).T
    edge = torch.linalg.matrix_norm(noise, ord=2)
    size = strength * edge * torch.linspace(2, 1, max(rank, 1), dtype=torch.float64)[:rank]
    return torch.linalg.svdvals((U * size) @ Vh + noise).square()


@pytest.mark.parametrize("angle", [1e-5, 1e-9])
def test_small_angle_is_accurate(angle):
    first, second = rotated(30, [angle, angle / 3])
    assert sin_theta(first, second) == pytest.approx(math.sin(angle), rel=1e-5 * 1e-5 / angle, abs=1e-15)


def test_small_angle_in_single_precision():
    """From the arc cosine it would read 0 or 3e-4: float32 cosines are 6e-8 apart."""
    first, second = rotated(30, [1e-5], torch.float32)
    assert sin_theta(first, second) == pytest.approx(1e-5, abs=30**0.5 * 2**-24 * 2)


@pytest.mark.parametrize("angle", [math.pi / 4 - 1e-9, math.pi / 4, math.pi / 4 + 1e-9, 1.0, math.pi / 2])
def test_large_angles_are_accurate(angle):
    first, second = rotated(12, [0.0, 0.3, angle])
    assert sin_theta(first, second) == pytest.approx(math.sin(angle), abs=1e-14)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(2, 12), st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6))
def test_sin_theta_equals_scipy(p, r, s, seed):
    generator = torch.Generator().manual_seed(seed)
    first = random_frame(p, min(r, p), generator=generator)
    second = random_frame(p, min(s, p), generator=generator)
    expected = sorted(scipy.linalg.subspace_angles(first.numpy(), second.numpy()))
    if first.shape == second.shape:
        assert sin_theta(first, second) == pytest.approx(math.sin(expected[-1]), abs=1e-12)
    else:
        assert sin_theta(first, second) == 1.0


def test_subspaces_of_no_dimension():
    nothing, something = torch.zeros(5, 0), torch.eye(5)[:, :1]
    assert sin_theta(nothing, nothing) == 0.0
    assert sin_theta(nothing, something) == 1.0


def test_project_out_is_the_orthogonal_projection():
    generator = derive(0, "projection")
    U, X = random_frame(9, 3, generator=generator), torch.randn(4, 9, 5, generator=generator, dtype=torch.float64)
    R = project_out(U, X)
    assert (U.T @ R).abs().max() < 1e-14
    assert torch.allclose(R, (torch.eye(9, dtype=torch.float64) - U @ U.T) @ X, atol=1e-14)
    assert torch.allclose(project_out(U, R), R, atol=1e-14)
    assert project_out(U, U).abs().max() < 1e-14


@pytest.mark.parametrize("rho", [0.0, 0.6])
@pytest.mark.parametrize("rank", [1, 2, 3, 6])
def test_planted_rank_is_found(rank, rho):
    found = [gap_rank(planted_spectrum(seed, rank, rho), 40) for seed in range(SEEDS)]
    assert sum(g != rank for g in found) <= ALLOWED, found
    spectrum = planted_spectrum(0, rank, rho)
    assert estimate_rank(spectrum, 40) == gap_rank(spectrum, 40)


@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_pure_noise_has_rank_zero(rho):
    found = [gap_rank(planted_spectrum(seed, 0, rho), 25) for seed in range(SEEDS)]
    assert sum(g != 0 for g in found) <= ALLOWED, found


@pytest.mark.parametrize("rank", [0, 3])
def test_rank_does_not_depend_on_the_unit(rank):
    for seed in range(5):
        spectrum = planted_spectrum(seed, rank, 0.0)
        for factor in (2.0**-60, 2.0**60):
            assert gap_rank(spectrum * factor, 40) == gap_rank(spectrum, 40)
            assert estimate_rank(spectrum * factor, 40) == estimate_rank(spectrum, 40)


@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("shape", [(50, 240), (600, 18)])
def test_rank_without_noise_is_exact(rank, shape):
    """Singular values that should be zero are 1e-16 of the largest: rounding is no direction."""
    p, n = shape
    generator = derive(0, "noiseless")
    X = random_frame(p, rank, generator=generator) @ torch.randn(rank, n, generator=generator, dtype=torch.float64)
    spectrum = torch.linalg.svdvals(X).square()
    assert gap_rank(spectrum, min(shape) // 2) == rank
    assert estimate_rank(spectrum, min(shape) // 2) == rank


def test_rank_stays_within_the_limit():
    spectrum = planted_spectrum(0, 6, 0.0)
    for limit in (0, 1, 4):
        assert 0 <= gap_rank(spectrum, limit) <= limit
        assert 0 <= estimate_rank(spectrum, limit) <= limit
    assert estimate_rank(spectrum, 0) == 0


@pytest.mark.parametrize("length", [0, 1, 5])
def test_zero_spectrum_has_rank_zero(length):
    assert estimate_rank(torch.zeros(length, dtype=torch.float64), 4) == 0


def test_a_spectrum_too_short_for_a_gap_keeps_its_large_directions():
    spectrum = torch.tensor([9.0, 8.0, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25], dtype=torch.float64)
    assert estimate_rank(spectrum, 4) == 2


def test_a_spectrum_with_anything_in_it_has_at_least_one_direction():
    assert all(estimate_rank(planted_spectrum(seed, 0, 0.0), 25) >= 1 for seed in range(5))


def test_held_out_rank_counts_the_directions_that_stand_clear():
    plateau = torch.linspace(1.1, 0.9, 40, dtype=torch.float64)
    for rank in (0, 1, 4, HELD_OUT_WINDOW // 2):
        energies = torch.cat([torch.full((rank,), 1.2 * HELD_OUT_SNR, dtype=torch.float64), plateau])
        assert held_out_rank(energies, 30) == rank
        assert held_out_rank(energies, 3) == min(rank, 3)
    close = torch.cat([torch.full((4,), 0.8 * HELD_OUT_SNR, dtype=torch.float64), plateau])
    assert held_out_rank(close, 30) == 0


def test_one_large_direction_among_the_noise_is_chance():
    energies = torch.linspace(1.1, 0.9, 40, dtype=torch.float64)
    energies[:3], energies[9] = 5.0, 1.2 * HELD_OUT_SNR
    assert held_out_rank(energies, 30) == 3


def test_a_smooth_fall_is_coloured_noise_not_rank():
    """Noise whose energy halves over twice the reach has no direction that stands clear."""
    falling = 0.5 ** (torch.arange(60, dtype=torch.float64) / (2 * HELD_OUT_WINDOW))
    assert held_out_rank(falling, 30) == 0


def test_held_out_rank_without_noise_and_without_anything():
    energies = torch.tensor([3.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    assert held_out_rank(energies, 4) == 2
    assert held_out_rank(torch.zeros(5, dtype=torch.float64), 4) == 0
    assert held_out_rank(torch.zeros(0, dtype=torch.float64), 4) == 0
