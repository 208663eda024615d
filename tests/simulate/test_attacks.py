"""Attacks against byzfl's, their own definitions, and on trained clients' dense updates and adapters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from clairlib import LowRank
from clairlib.core.seeds import derive
from clairlib.linalg.subspace import project_out
from clairlib.simulate import ATTACKS, attack, attacks, planted
from clairlib.simulate.attacks import Model, alie_deviations
from helpers import oracles

K, BAD, RANK = 10, 3, 2
MASK = torch.arange(K) % 4 == 1  # 1, 5, 9
DRAWN = ("unstructured", "dense", "coalition")


def generator():
    return derive(0, "attacks")


def honest(size=1.0, dtype=torch.float64):
    """Noise-free clients of the shared-subspace model, all honest, ``size`` times as large."""
    return (size * planted(share=0.0, K=K, p=12, q=8, r=RANK, noise_std=0.0, generator=generator()).targets).to(dtype)


def sent(kind, updates=None):
    updates = honest() if updates is None else updates
    return attack(kind, updates, MASK, rank=RANK, generator=generator())[MASK]


def vectors(updates):
    return updates.flatten(1).numpy()


def test_alie_is_byzfls_with_baruchs_factor():
    other = oracles.byzfl_attacks.ALittleIsEnough(tau=alie_deviations(K, BAD))(vectors(honest()[~MASK]))
    for update in sent("alie"):
        np.testing.assert_allclose(update.flatten().numpy(), other, rtol=1e-9, atol=1e-12)


def test_ipm_is_byzfls():
    other = oracles.byzfl_attacks.InnerProductManipulation(tau=attacks.IPM_FACTOR)(vectors(honest()[~MASK]))
    for update in sent("ipm"):
        np.testing.assert_allclose(update.flatten().numpy(), other, rtol=1e-9, atol=1e-12)


def test_sign_flip_is_byzfls_of_each_client_alone():
    for own, update in zip(honest()[MASK], sent("sign_flip"), strict=True):
        other = oracles.byzfl_attacks.SignFlipping()(vectors(own[None]))
        np.testing.assert_allclose(update.flatten().numpy(), other, rtol=1e-12)


@pytest.mark.parametrize("clients, contaminated, needed", [(50, 24, 2), (20, 8, 3), (24, 7, 6), (21, 10, 1)])
def test_alie_factor_is_the_quantile_that_hides_among_the_benign(clients, contaminated, needed):
    """Baruch et al.: with n = 50, m = 24 two benign clients are missing for a majority, z_max = quantile(24 / 26)."""
    benign = clients - contaminated
    assert alie_deviations(clients, contaminated) == pytest.approx(stats.norm.ppf((benign - needed) / benign))


def test_alie_factor_past_half_is_that_of_one_supporter():
    assert alie_deviations(20, 12) == pytest.approx(stats.norm.ppf(7 / 8))


def test_scaled_and_free_rider():
    torch.testing.assert_close(sent("scaled"), attacks.SCALED_BY * honest()[MASK])
    assert not sent("free_rider").any()


def test_stealth_is_one_small_common_step_off_the_benign_subspace():
    truth = planted(share=0.0, K=K, p=12, q=8, r=RANK, noise_std=0.0, generator=generator())
    step = ATTACKS["stealth"](truth.targets, MASK, Model(RANK), generator()) - truth.targets[MASK]
    torch.testing.assert_close(step, step[:1].expand_as(step))
    assert float(torch.linalg.matrix_norm(step[0])) == pytest.approx(1)
    assert int(torch.linalg.matrix_rank(step[0], rtol=1e-10)) == 1
    torch.testing.assert_close(project_out(truth.basis, step[0]), step[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("distance", [0.1, 0.5])
def test_planted_strength_sweeps_the_distance_of_stealth(distance):
    truth = planted("stealth", noise_std=0.0, strength=distance, generator=generator())
    off = project_out(truth.basis, truth.targets - truth.common_part)
    sizes = torch.linalg.matrix_norm(off)
    assert sizes[~truth.benign].tolist() == pytest.approx([distance] * 7) and float(sizes[truth.benign].max()) < 1e-12


def test_drawn_kinds_have_the_frames_they_name():
    """Differences of a coalition have rank r; those of unstructured clients more; dense ones full rank."""
    ranks = {
        kind: int(torch.linalg.matrix_rank(torch.cat(list((x := sent(kind))[1:] - x[0]), dim=1), rtol=1e-10))
        for kind in DRAWN
    }
    assert ranks["coalition"] == RANK and ranks["unstructured"] == ranks["dense"] == 12


@pytest.mark.parametrize("size", [1e-3, 50.0])
@pytest.mark.parametrize("kind", ATTACKS)
def test_attacks_follow_the_unit_of_the_updates(kind, size):
    torch.testing.assert_close(sent(kind, honest(size)) / size, sent(kind), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", DRAWN)
def test_drawn_kinds_are_as_large_as_honest_updates(kind):
    """Expected squared norms are equal; the means of 100 clients agree within four standard errors."""
    X, many = honest(7.0).repeat(20, 1, 1), torch.arange(20 * K) % 2 == 0
    out = attack(kind, X, many, rank=RANK, generator=generator())
    energy = out.square().sum(dim=(1, 2))
    error = float(energy[many].std()) / 10
    assert float(energy[many].mean()) == pytest.approx(float(energy[~many].mean()), abs=4 * error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ATTACKS)
def test_honest_clients_and_the_input_stay_as_they_are(kind, dtype):
    X = honest(dtype=dtype)
    before = X.clone()
    out = attack(kind, X, MASK, rank=RANK, generator=generator())
    assert isinstance(out, torch.Tensor) and out.dtype == dtype
    assert torch.equal(X, before) and torch.equal(out[~MASK], X[~MASK])
    assert not torch.isclose(out[MASK], X[MASK]).all(dim=(1, 2)).any()


@pytest.mark.parametrize("kind", ATTACKS)
def test_attackers_among_adapters_send_the_nearest_adapter_of_their_rank(kind):
    ranks = [3, 4, 3, 3, 3, 2, 3, 3, 3, 4]
    draws = [derive(k, "adapters") for k in range(K)]
    adapters = [
        LowRank(torch.randn(12, rho, generator=g), torch.randn(rho, 8, generator=g), 0.5)
        for rho, g in zip(ranks, draws, strict=True)
    ]
    out = attack(kind, adapters, MASK, rank=RANK, generator=generator())
    products = torch.stack([0.5 * a.B.double() @ a.A.double() for a in adapters])
    wanted = attack(kind, products, MASK, rank=RANK, generator=generator())
    for k in range(K):
        if not MASK[k]:
            assert out[k] is adapters[k]
            continue
        values = torch.linalg.svdvals(wanted[k])
        least = float(values[ranks[k] :].norm())  # Eckart-Young
        assert out[k].rank == ranks[k] and out[k].B.dtype == torch.float32
        error, rounding = float((out[k].dense() - wanted[k]).norm()), 1e-5 * float(values.norm())
        assert error == pytest.approx(least, rel=1e-4, abs=rounding)


def test_adapters_of_high_enough_rank_carry_the_whole_attack():
    B, A = torch.randn(K, 12, 3, generator=generator()).double(), torch.randn(K, 3, 8, generator=generator()).double()
    adapters = [LowRank(b, a) for b, a in zip(B, A, strict=True)]
    for kind in ("sign_flip", "scaled", "free_rider"):
        out = attack(kind, adapters, MASK, rank=RANK, generator=generator())
        wanted = attack(kind, B @ A, MASK, rank=RANK, generator=generator())
        torch.testing.assert_close(torch.stack([one.dense() for one in out]), wanted)


def test_nobody_contaminated_changes_nothing():
    X = honest()
    assert all(torch.equal(attack(kind, X, MASK & False, rank=RANK, generator=generator()), X) for kind in ATTACKS)


def test_nonsense_is_refused_in_one_line():
    X = honest()
    with pytest.raises(ValueError, match="contamination must be one of unstructured.*; got 'other'"):
        attack("other", X, MASK, rank=RANK, generator=generator())
    with pytest.raises(ValueError, match="bool mask of 10 clients; got shape"):
        attack("alie", X, MASK[:4], rank=RANK, generator=generator())
    with pytest.raises(ValueError, match="at least two honest clients; 1 of 10 are"):
        attack("alie", X, torch.arange(K) > 0, rank=RANK, generator=generator())
