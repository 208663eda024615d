"""The steps and bounds of the convex program's solver."""

import pytest
import torch

from clairlib.recovery.admm import Problem, block_norms, dual_scale, shrink_spectrum


@pytest.mark.parametrize("shape", [(6, 3, 8), (30, 3, 4)])  # wide, tall
@pytest.mark.parametrize("threshold", [0.5, 1e-7])  # Gram, SVD
def test_shrink_spectrum_is_singular_value_thresholding(shape, threshold):
    """On singular values from 1 to 1e-6, where squaring them would cost the small ones their accuracy."""
    blocks = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, s, Vh = torch.linalg.svd(blocks.flatten(1), full_matrices=False)
    s = torch.logspace(0, -6, len(s), dtype=torch.float64)
    expected = (U * (s - threshold).clamp(min=0)) @ Vh
    shrunk, nuclear = shrink_spectrum(((U * s) @ Vh).reshape(shape), threshold)
    torch.testing.assert_close(shrunk.flatten(1), expected, rtol=0, atol=1e-12)
    assert float(nuclear) == pytest.approx(float((s - threshold).clamp(min=0).sum()), rel=1e-12)


@pytest.mark.parametrize("nu", [0.0, 0.1, 3.0])
def test_dual_scale_is_the_best_admissible(nu):
    generator = torch.Generator().manual_seed(0)
    data, dual = (torch.randn(5, 4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    dual = dual * (dual * data).sum().sign() / torch.linalg.matrix_norm(dual.flatten(1), ord=2)
    problem = Problem(data, lam=0.5, nu=nu, with_common=False)
    t, value = dual_scale(problem, dual)
    most = min(1.0, 0.5 / float(block_norms(dual).max()))
    grid = torch.linspace(0, most, 10_001, dtype=torch.float64)
    values = grid * (dual * data).sum() - nu / 2 * grid**2 * dual.square().sum()
    assert 0 <= t <= most and value == pytest.approx(float(values.max()), rel=1e-6)
