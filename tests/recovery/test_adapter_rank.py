"""Refined updates of a stated rank: the best of their rank, with the error of truncation, in little memory."""

from __future__ import annotations

import pytest
import torch

from clairlib import CLAIR, LowRank
from clairlib.bench.alignment import apart
from clairlib.core.seeds import derive
from clairlib.linalg.refined_factors import exact_update
from clairlib.recovery.assembly import Maker, lifted
from clairlib.recovery.inputs import Module, transpose
from helpers.memory import ranks_of_a_fit

K, STRANGERS, RANK = 12, 3, 2
BENIGN = torch.arange(K) >= STRANGERS
EXACT, COMPRESSED = (120, 100), (180, 150)  # (p, q): cores that hold every direction, and cores from Gram matrices


def adapters(p, q, ranks=(6, 9, 12), scales=(1.0, 0.25, -2.0), noise=0.5):
    """Benign clients share directions and a common part of rank 2; the first have directions of their own."""
    g = derive(0, "adapters of a rank")

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    U, left, right, updates = torch.linalg.qr(normal(p, RANK)).Q, normal(p, 2) / p**0.5, normal(2, q) / q**0.5, []
    for k in range(K):
        rank, scale = ranks[k % len(ranks)], scales[k % len(scales)]
        own = rank - RANK - 2
        shared = torch.linalg.qr(normal(p, RANK)).Q if k < STRANGERS else U
        B = torch.cat([shared, left, noise * normal(p, own) / p**0.5], dim=1)
        A = torch.cat([normal(RANK, q) / q**0.5, right, noise * normal(own, q) / q**0.5])
        updates.append(LowRank(B, A / scale, scale))
    return updates


def fit_of(updates, side, **how):
    """The fit, and clients' refined updates before truncation, with the subspace's side as rows."""
    sent = [transpose(u) for u in updates] if side == "input" else updates
    result = CLAIR(side=side).fit(sent, **how)
    module = result.modules["update"]
    assert torch.equal(result.benign, BENIGN) and module.rank == RANK and module.is_refined
    common = transpose(result.common_part) if side == "input" else result.common_part
    return result, torch.stack([exact_update(result.basis, common, u).dense() for u in updates])


@pytest.mark.parametrize("adapter_rank", [None, 4])
@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("shape", [EXACT, COMPRESSED], ids=["exact cores", "compressed cores"])
def test_refined_updates_are_the_best_of_their_rank(shape, side, adapter_rank):
    updates = adapters(*shape)
    result, exact = fit_of(updates, side, adapter_rank=adapter_rank)
    for k, own in enumerate(updates):
        refined = transpose(result.refined[k]) if side == "input" else result.refined[k]
        error = float(result.truncation_errors[k])
        if k < STRANGERS:
            assert torch.equal(refined.B, own.B) and torch.equal(refined.A, own.A) and refined.scale == own.scale
            assert error == 0.0
            continue
        U, s, Vh = torch.linalg.svd(exact[k])
        rank = adapter_rank or own.rank
        measured, least = (refined.dense() - exact[k]).norm() / s.norm(), s[rank:].norm() / s.norm()
        assert refined.rank == rank and refined.scale == 1.0 and refined.shape == own.shape
        assert error == pytest.approx(float(measured), abs=1e-8) and float(least) > 0.01
        if shape is EXACT:
            best = U[:, :rank] * s[:rank] @ Vh[:rank]
            assert (refined.dense() - best).norm() < 1e-9 * s.norm() and error == pytest.approx(float(least), abs=1e-9)
        else:  # of the common part, only the leading 2 rho directions can enter
            assert float(least) - 1e-9 <= error < 1.02 * float(least)


@pytest.mark.parametrize("side", ["output", "input"])
def test_parts_of_the_result_give_the_refined_update_of_the_dense_fit(side):
    updates = adapters(*EXACT)
    result, exact = fit_of(updates, side)
    dense = torch.stack([u.dense() for u in updates])
    full = CLAIR(side=side).fit(dense.mT if side == "input" else dense)
    expected = full.refined.mT if side == "input" else full.refined
    assert torch.allclose(exact[BENIGN], expected[BENIGN], atol=1e-10)
    assert full.truncation_errors.tolist() == [0.0] * K
    P, off = result.basis @ result.basis.T, result.common_part.dense()  # as the docstring of ModuleResult says
    formula = (dense.mT @ P if side == "input" else P @ dense) + off
    assert torch.allclose(formula[BENIGN], full.refined[BENIGN], atol=1e-10)


@pytest.mark.parametrize("shape", [EXACT, COMPRESSED], ids=["exact cores", "compressed cores"])
def test_a_rank_that_holds_everything_truncates_nothing(shape):
    """That is r and the sum of the members' ranks; what is beyond is zeros."""
    result, exact = fit_of(adapters(*shape), "output", adapter_rank=100)
    assert {u.rank for u in result.refined[STRANGERS:]} == {100} and float(result.truncation_errors.max()) < 1e-6
    assert (torch.stack([u.dense() for u in result.refined]) - exact)[BENIGN].abs().max() < 1e-6


@pytest.mark.parametrize("side", ["output", "input"])
@pytest.mark.parametrize("form", ["exact cores", "compressed cores", "dense"])
def test_each_client_has_its_own_scale_of_the_common_part(form, side):
    """The scale enters the refined updates of all forms and sides alike."""
    updates = adapters(*(COMPRESSED if form == "compressed cores" else EXACT))
    dense = torch.stack([u.dense() for u in updates])
    module = Module("m", dense if form == "dense" else updates, side == "input", numpy=False)
    fit = CLAIR(side=side).prepare(module, torch.ones(K, dtype=torch.float64), BENIGN)
    fit.scales = torch.linspace(-1.0, 2.0, K, dtype=torch.float64)
    outcome, maker = fit.outcome(BENIGN), Maker(module, True, None, derive(0, "off"))
    parts = fit.parts(outcome.frame, updates)
    U, off = lifted(parts)
    expected = U @ (U.T @ dense) + fit.scales[:, None, None] * off.dense()
    expected[~BENIGN] = dense[~BENIGN]
    refined, errors = maker.refined(fit, outcome, parts)
    refined = refined if form == "dense" else torch.stack([u.dense() for u in refined])
    measured = (refined - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))
    assert torch.allclose(measured, errors, atol=1e-8) and bool((errors > 0).any()) == (form != "dense")
    assert float(errors.max()) < 0.5


@pytest.mark.parametrize("wrong", [0, -1, 2.0, "own"])
def test_a_rank_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="adapter_rank must be a whole number, at least 1"):
        CLAIR().fit(adapters(*EXACT), adapter_rank=wrong)


def test_a_module_without_refinement_keeps_the_clients_own_updates(monkeypatch):
    monkeypatch.setattr("clairlib.recovery.clair.MIN_EXPLAINED_VARIANCE", 2.0)
    updates = adapters(*COMPRESSED)
    result = CLAIR().fit(updates, adapter_rank=4)
    assert not result.truncation_errors.any()
    assert all(torch.equal(u.B, own.B) and u.scale == own.scale for u, own in zip(result.refined, updates, strict=True))


def test_results_hold_no_memory_of_other_clients():
    """The factors of different ranks are not views of one padded array."""
    result, _ = fit_of(adapters(*COMPRESSED), "output")
    for update in result.refined[STRANGERS:]:
        assert all(f.untyped_storage().nbytes() == f.numel() * f.element_size() for f in (update.B, update.A))


def test_peak_memory_is_that_of_a_few_times_the_factors():
    """Refined updates at the rank r + N = 644 would take 1.7 GB, the clients' factors take 40 MB, PyTorch 400 MB."""
    ranks, peak = apart(ranks_of_a_fit, 40, 8192, 16)
    assert ranks == {16} and peak < 1e9
