"""Leading subspaces of a scatter without each client: the iteration against full eigendecompositions."""

import pytest
import torch

from clairlib.core.seeds import derive
from clairlib.linalg import downdating as downdate
from clairlib.linalg.downdating import CONVERGED, downdated_bases, held_out_energies
from clairlib.simulate import planted


def loads_of(K=12, p=40, q=6, r=3, noise=0.03, share=0.0):
    generator = derive(0, "downdate", K, p, q, noise)
    X = planted(K=K, p=p, q=q, r=r, noise_std=noise, share=share, generator=generator).updates
    D = X - X.mean(dim=0)
    values, vectors = torch.linalg.eigh(torch.einsum("kpq,krq->pr", D, D))
    return values.flip(0).clamp(min=0.0), vectors.flip(1).T @ D * 0.9


def exact(values, loads, rank):
    return torch.linalg.eigh(torch.diag(values) - loads @ loads.mT)[1][..., len(values) - rank :]


def largest_angle(first, second):
    if first.shape[-1] == 0:
        return 0.0
    return torch.linalg.matrix_norm(first - second @ (second.mT @ first), ord=2).max().item()


NOISY = [(noise, rank) for noise in (1e-6, 0.03, 0.3) for rank in (0, 1, 3, 5, 12)]


@pytest.mark.parametrize("noise, rank", [(0.0, 1), (0.0, 3), *NOISY])  # without noise a fourth direction is arbitrary
def test_equal_to_the_full_eigendecomposition(noise, rank):
    values, loads = loads_of(noise=noise)
    found = downdated_bases(values, loads, rank)
    assert found.shape == (12, 40, rank)
    identity = torch.eye(rank, dtype=torch.float64)
    assert torch.allclose(found.mT @ found, identity.expand(12, rank, rank), atol=1e-12)
    assert largest_angle(found, exact(values, loads, rank)) < 10 * CONVERGED


def test_a_wide_gap_needs_no_full_eigendecomposition(monkeypatch):
    values, loads = loads_of(noise=0.03)
    expected = exact(values, loads, 3)
    monkeypatch.setattr(downdate, "exact_bases", lambda *_: pytest.fail("full eigendecomposition"))
    assert largest_angle(downdated_bases(values, loads, 3), expected) < CONVERGED


def test_clients_that_do_not_converge_are_computed_in_full(monkeypatch):
    """One client carries six directions: without it, what takes their place does not stand out from what is damped."""
    values, loads = loads_of(noise=0.03)
    loads[4] = torch.zeros(40, 6, dtype=torch.float64)
    loads[4, range(2, 8), range(6)] = values[2:8].sqrt()
    full = []
    original = downdate.exact_bases
    monkeypatch.setattr(downdate, "exact_bases", lambda v, E, r: full.append(len(E)) or original(v, E, r))
    found = downdated_bases(values, loads, 3)
    assert largest_angle(found, exact(values, loads, 3)) < 10 * CONVERGED
    assert full == [1], "only the client concerned"


def test_a_spectrum_that_spans_many_orders_of_magnitude():
    """The filter lifts the first direction far above the others; what it loses to rounding must be noticed."""
    values, loads = loads_of(noise=0.03)
    scale = torch.ones(40, dtype=torch.float64)
    scale[0] = 1e5
    values, loads = values * scale.square(), loads * scale[:, None]
    reference = exact(values, loads, 3)
    assert largest_angle(downdated_bases(values, loads, 3), reference) < 1e-9


def test_no_clients_and_float_types():
    values, loads = loads_of()
    assert downdated_bases(values, loads[:0], 3).shape == (0, 40, 3)


def test_held_out_energies_are_those_in_the_directions_of_the_others():
    values, loads = loads_of(noise=0.3)
    expected = torch.zeros(40, dtype=torch.float64)
    for E in loads:
        directions = torch.linalg.eigh(torch.diag(values) - E @ E.T)[1].flip(1)
        expected += (directions.T @ E).square().sum(1) / len(loads)
    assert torch.allclose(held_out_energies(values, loads), expected, rtol=1e-9)
    assert torch.allclose(expected.sum(), loads.square().sum() / len(loads))  # nothing is lost
