"""The smallest deviation that would have been found, verdicts by modules, and honest clients that differ."""

from __future__ import annotations

import statistics

import pytest
import torch
from scipy import stats

from clairlib import CLAIR
from clairlib.core.seeds import derive
from clairlib.recovery.detection import FAMILY_ERROR
from studies.unequal_clients.clients import Attack, Design, Honest, draw

LEVEL = 1e-4  # of every test below that could fail by chance; seeds are fixed


def pushed(X, client, size, seed):
    """The clients, one of them with a further rank-one step of ``size`` times its own norm."""
    g, Y = derive(seed, "push"), X.clone()
    step = torch.outer(*(torch.randn(n, generator=g, dtype=torch.float64) for n in X.shape[1:]))
    Y[client] += size * torch.linalg.matrix_norm(X[client]) * step / torch.linalg.matrix_norm(step)
    return Y


@pytest.mark.parametrize("factor, seen", [(2.0, True), (0.5, False)])
def test_the_smallest_deviation_is_what_is_found_half_of_the_time(factor, seen):
    """Twice as large, most are found; half as large, most are not: the median of five draws decides."""
    found = []
    for index in range(5):
        X = draw(Design(), Honest(), Attack(), seed=1, index=index).updates["module_0"]
        size = float(CLAIR().fit(X).smallest_deviation[3])
        assert 0 < size < 1
        found.append("client_3" in CLAIR().fit(pushed(X, 3, factor * size, index)).contaminated)
    assert statistics.median(found) == seen


def test_one_attacker_in_one_of_eight_modules_is_found_there_and_nobody_else():
    attack, design = Attack("module", count=1, energy=1.0), Design(modules=8)
    one = draw(design, Honest(), attack, seed=0, index=0)
    result = CLAIR().fit(one.updates)
    (client,) = one.attacked
    assert result.found_in == {f"client_{client}": [one.attacked[client]]}
    assert result.contaminated == [f"client_{client}"]
    assert f"client_{client}: found in {one.attacked[client]}" in result.remarks()
    assert CLAIR().fit(one.updates[one.attacked[client]]).found_in == {}  # a single module has no verdict of its own


def test_honest_clients_are_found_in_no_module():
    flagged, draws = 0, 3
    for index in range(draws):
        one = draw(Design(modules=8), Honest(), Attack(), seed=2, index=index)
        flagged += bool(CLAIR().fit(one.updates).found_in)
    assert flagged <= stats.binom.ppf(1 - LEVEL, draws, FAMILY_ERROR)


UNEQUAL = {
    "sizes": Honest(sizes=0.3), "samples": Honest(samples=4.0), "large": Honest(large=True),
    "rows": Honest(tails="rows"),
}  # fmt: skip


@pytest.mark.parametrize("how", UNEQUAL)
def test_nobody_is_flagged_where_honest_clients_differ(how):
    flagged, draws = 0, 4
    for index in range(draws):
        one = draw(Design(), UNEQUAL[how], Attack(), seed=3, index=index)
        flagged += not bool(CLAIR().fit(one.updates).benign.all())
    assert flagged <= stats.binom.ppf(1 - LEVEL, draws, 2 * FAMILY_ERROR)


def test_refined_updates_have_each_clients_own_size_of_the_common_part():
    one = draw(Design(), Honest(sizes=0.3), Attack(), seed=3, index=0)
    X, result = one.updates["module_0"], CLAIR().fit(one.updates["module_0"])
    sizes, U = result.modules["update"].sizes, result.basis
    expected = U @ (U.T @ X) + sizes[:, None, None] * result.common_part
    assert float(sizes.std()) > 0.1
    assert torch.allclose(result.refined, expected, atol=1e-10)
