"""Unequal clients: the generator as its docstrings say, the told test, the rules switched off, tables and figures."""

from __future__ import annotations

from dataclasses import replace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from clairlib import CLAIR
from clairlib.core.seeds import derive
from clairlib.linalg.low_rank import as_dense
from clairlib.linalg.subspace import project_out
from clairlib.recovery import detection
from clairlib.recovery.leave_one_out import LeaveOneOut
from studies.unequal_clients import ablation, cases, oracle, plots, study, tables
from studies.unequal_clients.cases import CONDITIONS, DESIGNS, Case, module_attack
from studies.unequal_clients.clients import LARGE, NOISE, Attack, Design, Drawn, Honest, draw

NOBODY = Attack("none")
MANY = Design(K=400)
THREE = Design(K=12, p=20, q=6, modules=3)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def drawn(
    design: Design = MANY, honest: Honest = CONDITIONS["alike"], attack: Attack = NOBODY, index: int = 0
) -> Drawn:
    return draw(design, honest, attack, seed=0, index=index)


def noise_of(own: Drawn, design: Design, name: str = "module_0") -> torch.Tensor:
    """What an honest draw has beyond its targets."""
    return (as_dense(own.updates)[name] - own.targets[name])[own.benign]


def off(own: Drawn, name: str = "module_0") -> torch.Tensor:
    """Parts of the updates off the subspace, without size, common part and noise (of a draw without noise)."""
    clean = own.updates[name] / own.scales[:, None, None] - own.common[name]
    return project_out(own.bases[name], clean)


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr("studies.unequal_clients.clients.NOISE", 0.0)


def test_draws_are_a_function_of_seed_and_names():
    def entries(own: Drawn) -> torch.Tensor:
        return own.updates["module_0"]

    assert torch.equal(entries(drawn()), entries(drawn()))
    others = [drawn(index=1), drawn(honest=Honest(sizes=0.1)), draw(MANY, Honest(), NOBODY, seed=1, index=0)]
    assert not any(torch.allclose(entries(drawn()), entries(other)) for other in others)


@pytest.mark.parametrize("name", CONDITIONS)
def test_sizes_and_noise_levels_are_those_asked_for(name):
    honest = CONDITIONS[name]
    own = drawn(honest=honest)
    assert own.benign.all() and own.scales.log().std() == pytest.approx(honest.sizes, rel=0.15)
    levels = own.noise.square()
    assert honest.samples**0.8 <= float(levels.max() / levels.min()) <= honest.samples * (1 + 1e-9)
    energy = noise_of(own, MANY).square().sum(dim=(1, 2)) / levels
    assert energy.mean() == pytest.approx(1, rel=0.25 if honest.tails != "normal" else 0.03)
    assert levels.log().mean().exp() == pytest.approx(NOISE**2, rel=0.2)


def test_heavy_tails_have_kurtosis_and_rows_are_heavy_as_a_whole():
    normal, entries, rows = (
        noise_of(drawn(honest=Honest(tails=tails)), MANY) for tails in ("normal", "entries", "rows")
    )

    def kurtosis(x: torch.Tensor) -> float:
        return float(x.pow(4).mean() / x.square().mean() ** 2)

    assert kurtosis(normal) < 3.2 < 5 < kurtosis(entries) and kurtosis(rows) > 5
    spread = [float((x.square().sum(dim=2).log()).std()) for x in (normal, entries, rows)]
    assert spread[0] < spread[1] < spread[2]


def test_one_client_is_large_inside_the_subspace(quiet):
    own = drawn(honest=CONDITIONS["one 10 x as large inside"])
    U, M = own.bases["module_0"], own.common["module_0"]
    inside = (U.T @ (own.updates["module_0"] - M)).square().sum(dim=(1, 2)).sqrt()
    assert LARGE * 0.7 < float(inside[0] / inside[1:].median()) < LARGE * 1.3
    assert off(own).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["weak", "towards"])
def test_weak_attackers_have_the_energy_asked_for(quiet, kind):
    own = drawn(replace(MANY, K=20), Honest(sizes=0.3, samples=6.0), Attack(kind, energy=0.12))
    energy = off(own).square().sum(dim=(1, 2))
    assert int((~own.benign).sum()) == 6
    assert torch.allclose(energy[~own.benign], torch.full((6,), 0.12, dtype=torch.float64))
    assert energy[own.benign].max() < 1e-20


def test_kinds_deviate_as_they_say(quiet):
    def clean(kind: str, share: float = 0.3) -> tuple[torch.Tensor, Drawn]:
        own = drawn(replace(MANY, K=20), attack=Attack(kind, share))
        return off(own), own

    for kind in ("unstructured", "coalition", "population", "sign_flip"):
        R, own = clean(kind)
        bad = R[~own.benign]
        assert R[own.benign].abs().max() < 1e-12 and bad.square().sum(dim=(1, 2)).min() > 0.5
        alike = torch.corrcoef(bad.flatten(1))[0, 1]
        assert (alike > 0.999) == (kind in ("population", "sign_flip")), kind
    R, own = clean("population", 0.4)
    assert int((~own.benign).sum()) == 8
    assert torch.equal(own.targets["module_0"], own.updates["module_0"]), "both populations are honest"
    assert not drawn(THREE, attack=Attack("unstructured", share=1.0)).benign.any()


@pytest.mark.parametrize("placement", cases.PLACEMENTS)
def test_module_attacks_are_one_step_in_the_modules_named(quiet, placement):
    own = drawn(THREE, attack=module_attack(placement, 2.0))
    assert set(own.attacked) == set((~own.benign).nonzero()[:, 0].tolist())
    assert len(own.attacked) == (1 if placement == "one client" else 4)
    if placement in ("four, same module", "four, one step"):
        assert len(set(own.attacked.values())) == 1
    for name in own.updates:
        R = off(own, name)
        here = torch.tensor([own.attacked.get(k) == name for k in range(THREE.K)])
        assert R[~here].abs().max() < 1e-12
        values = torch.linalg.svdvals(R[here])
        assert torch.allclose(values[:, 0], torch.full_like(values[:, 0], 2 * NOISE)), "twice the norm of the noise"
        assert values[:, 1:].numel() == 0 or values[:, 1:].max() < 1e-10
        if placement == "four, one step" and here.any():
            assert (R[here] - R[here][0]).abs().max() < 1e-12
        elif here.sum() > 1:
            assert (R[here][0] - R[here][1]).abs().max() > 1e-3


@pytest.mark.parametrize("geometry", ["frozen", "common", "own"])
def test_adapters_have_their_geometry(geometry):
    design = Design(geometry, K=8, p=30, q=24, adapter_rank=4)
    own = drawn(design)
    A = torch.stack([update.A for update in own.updates["module_0"]])
    assert A.shape == (8, 4, 24) and own.targets["module_0"].shape == (8, 30, 24)
    apart = float(torch.linalg.matrix_norm(A[0] - A[1]) / torch.linalg.matrix_norm(A[0]))
    low, high = {"frozen": (0.0, 0.0), "common": (0.2, 0.7), "own": (1.0, 2.0)}[geometry]
    assert low <= apart <= high
    assert bool(own.common["module_0"].any()) == (geometry != "own")


def test_the_told_test_keeps_its_level_and_sees_what_is_loud():
    level = 0.01
    E = torch.randn(20_000, 17, 6, generator=derive(1, "null"), dtype=torch.float64)
    above = float((oracle.top_energy(E, 2) > oracle.cut(17, 6, 2, level)).double().mean())
    assert above == pytest.approx(level, abs=0.003)
    assert torch.allclose(oracle.top_energy(E[:5], 6), E[:5].square().sum(dim=(1, 2)))
    unequal = Honest(sizes=0.3, samples=6.0)
    own = drawn(attack=Attack("weak", energy=1.0), honest=unequal)
    said = oracle.oracle_flags(own)
    assert said[~own.benign].all() and int(said[own.benign].sum()) <= 1


def test_names_of_cells_and_what_they_draw():
    case = Case("50 x 10, 8 clients", "sizes .3", Attack("module", count=2, energy=0.5), "tails")
    assert Case.of(**case.parameters) == case
    same = draw(DESIGNS[case.design], CONDITIONS[case.condition], case.attack, seed=3, index=2)
    assert torch.equal(case.draw(3, 2).updates["module_0"], same.updates["module_0"])
    assert set(cases.ALL) | {study.WEAK_BESIDE} == set(CONDITIONS) and set(cases.FEW) <= set(cases.ALL)


def test_a_rule_is_off_only_where_it_is_switched_off():
    X = drawn(Design(K=12, p=20, q=8), Honest(sizes=0.4)).updates["module_0"]
    before = CLAIR().fit(X)
    assert float(before.modules["update"].sizes.std()) > 0.1
    with ablation.without("sizes"):
        assert bool((CLAIR().fit(X).modules["update"].sizes == 1).all())
    assert torch.equal(CLAIR().fit(X).scores, before.scores)
    with ablation.without(cases.NONE):
        assert torch.equal(CLAIR().fit(X).scores, before.scores)
    with ablation.without("selection"):
        assert detection.selection(10, 5) == (0.0, 1.0)
    assert detection.selection(10, 5) != (0.0, 1.0)
    kept = LeaveOneOut.leverage
    with ablation.without("leverage"):
        assert LeaveOneOut.leverage is not kept
    assert LeaveOneOut.leverage is kept


SHOWN_BY = {"sizes": Honest(sizes=0.4), "tails": Honest(tails="rows"), "leverage": Honest(large=True)}


@pytest.mark.parametrize("rule", ablation.RULES)
def test_every_stand_in_is_called_by_the_verdict(rule):
    """A rule that has moved would be switched off in vain."""
    honest = SHOWN_BY.get(rule, Honest(samples=10.0))
    X = drawn(Design(K=16, p=40, q=8), honest, Attack("unstructured", count=3)).updates
    before = CLAIR().fit(X).scores
    with ablation.without(rule):
        assert not torch.equal(CLAIR().fit(X).scores, before)


def test_a_run_is_compared_with_the_truth():
    case = Case("50 x 10, 8 clients", "alike", Attack("sign_flip", count=2))
    own = case.draw(0, 0)
    row = study.run_row(own, CLAIR().fit(own.updates))
    assert row["exact"] and row["recall"] == 1 and not row["anybody"] and row["honest_flagged"] == 0
    assert 0 < row["ratio"] <= row["worst"] and np.isnan(row["shown"])


def test_parts_of_a_cell_are_its_draws_once():
    parts = study._parts(23, 10, 5)
    assert [i for part in parts for i in range(part["start"], part["start"] + part["draws"])] == list(range(23))
    whole, half = (study.run_cases([(Case("50 x 10, 8 clients"), 2)], batch=batch, seed=0) for batch in (2, 1))
    assert whole.recall.equals(half.recall) and whole.ratio.equals(half.ratio)


def test_tables_and_figures_of_small_studies():
    how = {"batch": 5, "seed": 0}
    honest = study.run_cases([(Case("50 x 10, 8 clients", c, NOBODY), 2) for c in ("alike", "sizes .3")], **how)
    alarms = tables.false_alarms(honest.assign(claimed=True))
    assert list(alarms.draws) == [2, 2] and (alarms.low <= alarms.anybody).all()
    assert isinstance(plots.false_alarms(alarms, 0.01), Figure)
    weak = tables.recall(study.weak_study([0.5], draws=1, **how))
    assert set(weak.method) == {"CLAIR", "told all"} and isinstance(plots.recall_curves(weak), Figure)
    seen = tables.seen(study.seen_study(["alike"], draws=1, **how))
    assert list(seen.factor) == list(study.FACTORS) and isinstance(plots.seen(seen), Figure)


def test_module_attacks_keep_their_names():
    keys = [study.module_key(where, x) for where in cases.PLACEMENTS for x in (1.0, 2.0)]
    rows = [key | {"design": "d", "recall": 1.0, "shown": 0.0, "honest_flagged": 0.0, "ratio": 0.1} for key in keys]
    table = tables.modules(pd.DataFrame(rows))
    assert len(table) == len(keys) and list(dict.fromkeys(table.placement)) == list(cases.PLACEMENTS)
    assert isinstance(plots.module_heat(table), Figure)
