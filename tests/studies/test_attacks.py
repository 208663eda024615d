"""The attack study: what its cells measure, and the tables and figures that its claims are computed from."""

from __future__ import annotations

import tomllib
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from clairlib.baselines import AGGREGATORS
from clairlib.core.seeds import derive
from clairlib.linalg.low_rank import as_dense
from clairlib.linalg.subspace import project_out
from clairlib.simulate import ATTACKS, attack
from studies.attacks import study as attack_study
from studies.attacks.study import COPYING
from studies.common import plots as attack_plots
from studies.common import tables as attack_tables
from studies.common.rules import ABLATION, TOLD_NOTHING, TOLD_RANK
from studies.text_copying.base_model import CACHE
from studies.text_copying.dialects import CONTAMINATIONS, make_federation

ROOT = Path(__file__).resolve().parents[2]
SEED = 0
SMALL = {"sequences": 8, "seed": SEED, "clients": 6, "base_cache": str(CACHE)}


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def honest():
    return attack_study.trained_federation("sign_flip", 0.0, 1.0, **SMALL)


def test_the_paper_profile_has_every_kind():
    table = tomllib.loads((ROOT / "notebooks/profiles.toml").read_text())["paper"]["09_attacks"]
    assert set(table["planted_kinds"]) == set(ATTACKS)
    assert set(table["kinds"]) == {*ATTACKS, *CONTAMINATIONS}


def test_a_planted_cell_judges_every_rule_on_the_benign_clients():
    cell = attack_study.planted_cell("coalition", 0.3, 0.1, seed=3)
    table = pd.DataFrame(cell["gain"]).set_index("method")
    assert set(table.index) == {*AGGREGATORS, "CLAIR", TOLD_RANK} - {"FedAvg, factors", "FedSA"}
    assert table.gain["local"] == 0 and (table.worst <= table.gain).all()
    assert table.gain["CLAIR"] == pytest.approx(table.gain[TOLD_RANK], abs=1e-6)  # the same set, the same rank
    truth = attack_study.draw_planted("coalition", 0.3, 0.1 / 10**0.5, seed=3)
    errors = truth.updates - truth.targets, truth.updates.mean(dim=0) - truth.targets
    local, fedavg = (float(e[truth.benign].square().sum()) for e in errors)
    assert table.gain["FedAvg"] == pytest.approx(np.log(local / fedavg))
    (row,) = cell["verdicts"]
    assert row["exact"] and row["refined"] and row["benign_flagged"] == 0 and row["auc"] == 1


def test_attackers_inside_leave_the_model_in_nothing_but_size():
    truth = attack_study.draw_planted(attack_study.INSIDE, 0.25, 0.1, seed=0)
    own = truth.targets - truth.common_part
    assert int((~truth.benign).sum()) == 6
    assert project_out(truth.basis, own).abs().max() < 1e-12
    sizes = torch.linalg.matrix_norm(own)
    assert sizes[~truth.benign].min() > 2 * sizes[truth.benign].max()


def test_clients_that_share_nothing_are_all_benign_and_each_in_a_subspace_of_its_own():
    truth = attack_study.draw_planted(attack_study.NOTHING_SHARED, 0.0, 0.1, seed=0)
    assert bool(truth.benign.all())
    side_by_side = torch.cat(list(truth.targets), dim=1)
    assert int(torch.linalg.matrix_rank(side_by_side)) == 50 and len(truth.targets) == 24
    run = attack_study.trained_federation(attack_study.NOTHING_SHARED, 0.0, 1.0, **SMALL)
    assert bool(run.federation.benign.all())
    symbols = [set(client.dialect.symbols.tolist()) for client in run.federation.clients]
    assert all(not own & set(run.federation.symbols.tolist()) for own in symbols)
    assert len(set(map(frozenset, symbols))) == 6


def test_attacked_adapters_are_those_of_attack_and_the_others_stay(honest):
    run = attack_study.send(honest, "stealth", 2, seed=SEED)
    (module,) = honest.dense
    bad = ~make_federation(6, 2, seed=SEED).benign
    assert torch.equal(run.federation.benign, ~bad)
    draw = derive(SEED, "attacks", "stealth")
    expected = as_dense({module: attack("stealth", honest.updates[module], bad, rank=4, generator=draw)})[module]
    torch.testing.assert_close(run.dense[module], expected, rtol=1e-4, atol=1e-5)  # factors are float32
    assert torch.equal(run.dense[module][~bad], honest.dense[module][~bad])
    assert all(update.rank == 8 for update in run.updates[module])


def test_strength_is_the_part_of_the_way(honest):
    (module,) = honest.dense
    X = honest.dense[module]
    none, half, twice = (
        attack_study.send(honest, "scaled", 2, strength, seed=SEED).dense[module] for strength in (0.0, 0.5, 2.0)
    )
    bad = ~make_federation(6, 2, seed=SEED).benign
    for sent, factor in ((none, 1.0), (half, 5.5), (twice, 19.0)):
        torch.testing.assert_close(sent[bad], factor * X[bad], rtol=1e-3, atol=1e-4)


def test_a_copying_cell_judges_every_rule_and_the_backdoor():
    cell = attack_study.copying_cell("backdoor", 0.34, 1.0, **SMALL)
    accuracy, backdoor = pd.DataFrame(cell["accuracy"]), pd.DataFrame(cell["backdoor"])
    methods = {"base", *AGGREGATORS, "CLAIR", TOLD_RANK}
    assert set(accuracy.method) == methods and accuracy.client.nunique() == 4
    assert set(backdoor.method) == {*methods, attack_study.OWN}
    by_method = backdoor.groupby("method").client
    assert by_method.nunique()[attack_study.OWN] == 2 and by_method.nunique()["CLAIR"] == 4
    rates = backdoor.groupby("method").success.mean()
    assert rates[attack_study.OWN] > 0.2 + rates["local"]  # taught, and not taught
    assert "backdoor" not in attack_study.copying_cell("ipm", 0.34, 1.0, **SMALL)


def test_trimming_finds_who_is_far_and_prefers_a_tight_minority():
    draws = derive(0, "trimming")
    crowd = torch.randn(12, 4, 4, generator=draws, dtype=torch.float64)
    far = torch.cat([crowd, 10 + crowd[:8]])
    assert attack_study.trimming_score(far, 8)[12:].min() > attack_study.trimming_score(far, 8)[:12].max()
    tight = torch.cat([crowd, 0.1 * torch.ones(8, 4, 4, dtype=torch.float64)])
    assert attack_study.trimming_score(tight, 8)[12:].max() < attack_study.trimming_score(tight, 8)[:12].min()


def test_points_take_what_they_leave_out_from_the_main_setting(monkeypatch):
    asked = []
    monkeypatch.setattr(attack_study, "sweep", lambda cell, cells, **how: asked.extend(cells))
    attack_study.copying_study([{"kind": "ipm"}, {"kind": "backdoor", "share": 0.6}], 2, seed=5, cache=CACHE)
    expected = {"share": 0.4, "strength": 1.0, "sequences": 32, "clients": 20}
    assert asked[0] == {"kind": "ipm", **expected, "seed": 5}
    assert [(c["share"], c["seed"]) for c in asked] == [(0.4, 5), (0.6, 5), (0.4, 6), (0.6, 6)]


CELL = {"kind": "ipm", "share": 0.4, "strength": 1.0, "sequences": 32}


def accuracy_table() -> pd.DataFrame:
    """CLAIR leads local by .009, .010, .011; the ablation leads CLAIR by .002 in the mean, not surely; FedAvg is low.

    The oracle is above all. Client 1 is .05 more accurate than client 0.
    """
    rows = []
    for seed, (lead, ablation) in enumerate([(0.009, 0.0), (0.010, 0.004), (0.011, 0.002)]):
        values = {"local": 0.9, "FedAvg": 0.7, ABLATION: 0.9 + lead + ablation, "CLAIR": 0.9 + lead}
        for client in (0, 1):
            rows += [
                {**CELL, "seed": seed, "client": f"client-{client}", "method": m, "accuracy": a + 0.05 * client}
                for m, a in (values | {TOLD_RANK: 0.95}).items()
            ]
    return pd.DataFrame(rows)


def verdict_table(**changes) -> pd.DataFrame:
    row = {"exact": True, "precision": 1.0, "recall": 1.0, "benign_flagged": 0.0, "refined": True, "auc": 1.0}
    return pd.DataFrame([{**CELL, "seed": seed, **row, **changes} for seed in range(3)])


def test_bold_is_the_best_and_whoever_is_not_surely_worse():
    draws = attack_tables.draws(accuracy_table(), COPYING)
    table = attack_tables.stress_table(draws, COPYING).set_index("method")
    assert list(table.index) == ["local", "FedAvg", ABLATION, "CLAIR", TOLD_RANK]
    assert table.index[table.best].tolist() == [ABLATION, "CLAIR"]
    assert table.value["CLAIR"] == pytest.approx(0.935) and table.gain["CLAIR"] == pytest.approx(0.01)
    assert table.lead["local"] == pytest.approx(0.01)
    assert table.lead_high["local"] - 0.01 == pytest.approx(4.3027 * 0.001 / 3**0.5, rel=1e-4)  # t, 2 degrees
    one = attack_tables.stress_table(draws[draws.draw == "0"], COPYING).set_index("method")
    assert int(one.best.sum()) == 1  # without an interval nobody is as good as the best


def test_outcomes_tell_harm_beyond_one_standard_error():
    draws = attack_tables.draws(accuracy_table(), COPYING)
    row = attack_tables.outcomes(draws, verdict_table(), COPYING).iloc[0]
    assert row.gain == pytest.approx(0.01) and row.standard_error == pytest.approx(0.001 / 3**0.5)
    assert row.worst == pytest.approx(0.909) and row.worst_local == pytest.approx(0.9)
    for shift, harmed in ((-0.0105, False), (-0.0107, True)):  # one standard error is .00058
        moved = draws.assign(value=draws.value + shift * (draws.method == "CLAIR"))
        outcome = attack_tables.outcomes(moved, verdict_table(exact=False), COPYING)
        assert bool(outcome.not_worse[0]) != harmed and outcome.exact[0] == 0
        assert len(attack_tables.harmed(outcome, outcome)) == 2 * harmed


def test_draws_are_seeds_or_clients():
    seeds, clients = (attack_tables.draws(accuracy_table(), COPYING, over) for over in ("seed", "client"))
    assert seeds.draw.nunique() == 3 and clients.draw.nunique() == 6
    local = clients[clients.method == "local"]
    assert sorted(local.value.unique()) == pytest.approx([0.9, 0.95]) and (local.value == local.worst).all()


def test_nearest_is_the_rule_that_is_least_behind():
    table = attack_tables.stress_table(attack_tables.draws(accuracy_table(), COPYING), COPYING)
    assert "local" in TOLD_NOTHING and "Krum" not in TOLD_NOTHING
    row = attack_tables.nearest(table, COPYING, TOLD_NOTHING).iloc[0]
    assert (row.method, row.lead) == ("local", pytest.approx(0.01))
    row = attack_tables.nearest(table, COPYING, list(AGGREGATORS)).iloc[0]
    assert (row.method, row.lead) == (ABLATION, pytest.approx(-0.002))


def test_relative_errors_turn_the_interval_round():
    stress = pd.DataFrame({"value": [np.log(4.0)], "low": [np.log(2.0)], "high": [np.log(8.0)]})
    row = attack_tables.as_relative_error(stress).iloc[0]
    assert (row.value, row.low, row.high) == pytest.approx((0.25, 0.125, 0.5))


def test_single_clients_that_lose_are_counted():
    accuracy = accuracy_table()
    hurt = (accuracy.method == "CLAIR") & (accuracy.client == "client-1") & (accuracy.seed == 2)
    accuracy.loc[hurt, "accuracy"] -= 0.031
    row = attack_tables.change_of_clients(accuracy, COPYING).iloc[0]
    assert row.worst == pytest.approx(-0.02) and row.lose_a_point == pytest.approx(1 / 6)


def test_roles_are_swapped_where_exactly_the_benign_are_flagged():
    rows = [{"benign_flagged": b, "recall": r} for b, r in ((1.0, 0.0), (1.0, 0.1), (0.9, 0.0), (0.0, 1.0))]
    assert attack_tables.share_swapped(pd.DataFrame(rows)) == 0.25


def backdoor_table() -> pd.DataFrame:
    rates = {"local": (0.1, 0.2), "CLAIR": (0.1, 0.3), attack_study.OWN: (0.8, 0.9)}
    return pd.DataFrame(
        [{"seed": s, "method": m, "success": r[s] + e} for m, r in rates.items() for s in (0, 1) for e in (-0.1, 0.1)]
    )


def test_success_rates_are_means_over_seeds_and_what_is_added():
    table = attack_tables.success_rates(backdoor_table()).set_index("method")
    assert list(table.index) == ["local", "CLAIR", attack_study.OWN]
    assert table.success["CLAIR"] == pytest.approx(0.2) and table.added["CLAIR"] == pytest.approx(0.05)
    assert table.low["local"] < 0.1 < 0.2 < table.high["local"]  # over two seeds, not four clients


def test_figures_draw_what_their_tables_say():
    values = attack_tables.stress_table(attack_tables.draws(accuracy_table(), COPYING), COPYING)
    values = pd.concat([values, values[:1].assign(method="Krum", best=False)])
    outcomes = attack_tables.outcomes(
        attack_tables.draws(accuracy_table(), COPYING), verdict_table(recall=0.5), COPYING
    )
    stress = attack_plots.stress(values, panel=None, shown=".3f", full_colour=0.1)
    two = pd.concat([values, values.assign(share=0.6)])
    figures = [
        stress,
        attack_plots.stress(two, panel="share", shown=".3f", full_colour=0.1),
        attack_plots.sweep(two, pd.concat([outcomes, outcomes.assign(share=0.6)]), "share", "contaminated share"),
        attack_plots.success_rates(attack_tables.success_rates(backdoor_table())),
    ]
    for figure in figures:
        figure.canvas.draw()
    (axes,) = stress.axes
    bold = [text.get_text() for text in axes.texts if text.get_weight() == "bold"]
    assert bold == ["0.937", "0.935"]
    assert "Krum (told number contaminated)" in [label.get_text() for label in axes.get_yticklabels()]
    caught = [line for line in figures[2].axes[1].lines if line.get_label() == "contaminated clients flagged"]
    assert caught[0].get_ydata().tolist() == [0.5, 0.5]
