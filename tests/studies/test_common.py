"""What the studies have in common: intervals, names of clients, rules, verdicts, colours."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats

from clairlib import LowRank
from clairlib.baselines import AGGREGATORS
from clairlib.core.seeds import derive
from clairlib.plots import COLOURS, colour_of
from clairlib.simulate import planted
from studies.common.federation import draw_names
from studies.common.intervals import mean_interval, rate_interval
from studies.common.rules import FACTOR_RULES, is_common, oracle_updates, server_updates
from studies.common.verdicts import auc, benign_error, verdict_row, wrong_sides

STUDIES = Path(__file__).resolve().parents[2] / "notebooks" / "studies"


def test_intervals_are_those_of_the_textbook():
    x = np.array([1.0, 2.0, 4.0])
    mean, low, high = mean_interval(x)
    expected = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((x.mean(), expected.low, expected.high))
    assert math.isnan(mean_interval([1.0])[1])
    wilson = stats.binomtest(47, 50).proportion_ci(method="wilson")
    assert rate_interval(47, 50) == pytest.approx((0.94, wilson.low, wilson.high))


def test_one_more_client_or_attacker_changes_no_other_clients_side():
    names, bad = draw_names(20, 8, seed=3)
    more_names, more_clients = draw_names(21, 8, seed=3)
    _, more_bad = draw_names(20, 9, seed=3)
    assert len(bad) == 8 and bad < set(names) and more_names[:20] == names
    assert bad < more_bad and len(more_clients - bad) <= 1
    with pytest.raises(ValueError, match="between 0 and the 4 clients, got 5"):
        draw_names(4, 5, seed=0)


def test_every_rule_sends_each_client_an_update_and_is_told_what_it_must_be():
    truth = planted("coalition", share=0.25, K=12, p=12, q=5, r=2, generator=derive(0, "rules"))
    sent = server_updates({"m": truth.updates}, truth.benign, 2)
    assert list(sent) == ["base", *(name for name in AGGREGATORS if name not in FACTOR_RULES)]
    assert all(len(own["m"]) == 12 for own in sent.values())
    assert not torch.as_tensor(sent["base"]["m"]).any()
    mean = truth.updates[truth.benign].mean(dim=0)
    torch.testing.assert_close(sent["FedAvg, benign only"]["m"][0], mean)
    assert all(torch.equal(sent[name]["m"][0], sent[name]["m"][-1]) for name in sent if is_common(name))
    assert not torch.equal(sent["local"]["m"][0], sent["local"]["m"][1])


def test_rules_that_take_factors_get_adapters():
    draws = derive(0, "factors")
    adapters = [LowRank(torch.randn(8, 2, generator=draws), torch.randn(2, 6, generator=draws)) for _ in range(5)]
    sent = server_updates({"m": adapters}, torch.ones(5, dtype=torch.bool), 2, ["local", *FACTOR_RULES])
    assert list(sent) == ["base", "local", *FACTOR_RULES]


def test_the_oracle_keeps_a_clients_own_part_and_averages_the_rest():
    truth = planted("dense", share=0.25, K=12, p=12, q=5, r=2, noise_std=0.05, generator=derive(0, "oracle"))
    refined = oracle_updates({"m": truth.updates}, truth.benign, 2)["m"]
    assert benign_error(refined, truth) < benign_error(truth.updates, truth) / 2
    assert benign_error(truth.targets, truth) == 0


def test_a_verdict_is_counted_against_the_truth():
    benign = torch.tensor([True, True, True, False, False])
    result = SimpleNamespace(benign=torch.tensor([True, False, True, False, True]), scores=torch.arange(5.0))
    row = verdict_row(result, benign)
    assert (row["flagged"], row["hits"], row["wrong"], row["exact"]) == (2, 1, 2, False)
    assert (row["precision"], row["recall"], row["auc"]) == (0.5, 0.5, 1.0)
    assert row["benign_flagged"] == pytest.approx(1 / 3)
    assert wrong_sides(result, benign) == {"exact": False, "missed": 1, "false_alarms": 1}
    assert auc(np.array([0.0, 2.0]), np.array([1.0, 2.0])) == 0.625


def test_a_method_has_one_colour_and_no_two_have_the_same():
    assert len(set(COLOURS.values())) == len(COLOURS)
    assert colour_of("CLAIR") == COLOURS["CLAIR"] and colour_of("a new rule") not in COLOURS.values()
    named = re.compile("|".join(rf'"{re.escape(name)}": "#' for name in [*COLOURS, *AGGREGATORS]))
    assert [path.name for path in STUDIES.rglob("plots.py") if named.search(path.read_text())] == []
