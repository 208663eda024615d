"""Detection: p-values of normal scores, the two decisions and their error rates."""

import numpy as np
import pytest
import torch
from scipy import stats

from clairlib.core.seeds import derive
from clairlib.recovery.detection import (
    FAMILY_ERROR,
    LEAST_KEPT_VARIANCE,
    PRIOR_CLIENTS,
    STRANGER_ERROR,
    any_contaminated,
    benign_set,
    calibrate,
    lacks_subspace_energy,
    least_error_set,
    selection,
)

LEVEL = 1e-4  # of every test below that could fail by chance; seeds are fixed


def scores(seed, K, variance=0.04, centre=2.0):
    """Normal scores of K benign clients whose variance is drawn from the prior that calibrate assumes.

    With variance / sigma^2 ~ chi^2_d / d, d = PRIOR_CLIENTS, the moderated t statistic is exactly t (Smyth 2004).
    """
    generator = np.random.default_rng([seed, K])
    spread = (variance * PRIOR_CLIENTS / generator.chisquare(PRIOR_CLIENTS)) ** 0.5
    return torch.as_tensor(centre + spread * generator.standard_normal(K)), variance


def lowest(x, n):
    """The clients (K,) bool with the n lowest scores, as members are selected."""
    return x <= x.sort().values[n - 1]


def test_p_values_are_uniform_where_everybody_is_a_member():
    """One member's p-value a replicate: independent, so Kolmogorov-Smirnov applies."""
    members = torch.ones(12, dtype=torch.bool)
    values = torch.stack([calibrate(x, members, v).p_values[0] for x, v in (scores(s, 12) for s in range(600))])
    assert stats.kstest(values.numpy(), "uniform").pvalue > LEVEL


@pytest.mark.parametrize("K, n", [(12, 8), (30, 20), (30, 15)])
def test_p_values_allow_for_the_selection_of_the_members(K, n, monkeypatch):
    """Honest clients of which the n with the least scores are members: p-values are near uniform, not small.

    Correction is for a normal sample cut at its quantile, so it is not exact for few clients. Without it, clients that
    were left out look foreign.
    """
    def distance():
        drawn = [scores(s, K) for s in range(600)]
        found = torch.stack([calibrate(x, lowest(x, n), v).p_values for x, v in drawn])
        smallest = 1 - (1 - found.min(dim=1).values) ** K  # uniform if independent
        return stats.kstest(found[:, 0].numpy(), "uniform").statistic, float((smallest < FAMILY_ERROR).float().mean())

    corrected = distance()
    monkeypatch.setattr("clairlib.recovery.detection.selection", lambda *_: (0.0, 1.0))
    plain = distance()
    assert corrected[0] < 0.5 * plain[0] and corrected[1] <= stats.binom.ppf(1 - LEVEL, 600, FAMILY_ERROR) / 600
    assert plain[1] > stats.binom.ppf(1 - LEVEL, 600, FAMILY_ERROR) / 600


@pytest.mark.parametrize("K, n", [(400, 200), (400, 280), (400, 380)])
def test_selection_is_the_mean_and_variance_of_the_lowest_of_normals(K, n):
    """Of R samples the mean's standard error is below 2 / (n R)^1/2; order statistics differ from it by 1 / K."""
    x = np.sort(np.random.default_rng(0).standard_normal((500, K)), axis=1)[:, :n]
    lowered, kept = selection(K, n)
    error = 10 / (n * 500) ** 0.5 + 1 / K
    assert -x.mean() == pytest.approx(lowered, abs=error)
    assert x.var(axis=1).mean() == pytest.approx(kept, abs=error)


def test_nothing_is_selected_where_everybody_or_almost_nobody_is_a_member():
    assert selection(20, 20) == (0.0, 1.0) == selection(20, 2)
    assert selection(10**6, 3)[1] == LEAST_KEPT_VARIANCE


def test_p_values_follow_from_the_other_members():
    """A member's own score does not enter its comparison, nor does any outsider's."""
    x, v = scores(0, 10)
    members = torch.arange(10) < 7
    first = calibrate(x, members, v)
    moved = x.clone()
    moved[8] += 50.0
    second = calibrate(moved, members, v)
    keep = torch.arange(10) != 8
    assert torch.equal(first.p_values[keep], second.p_values[keep])
    everybody = torch.ones(7, dtype=torch.bool)  # nobody was selected, so high and low count alike
    low, high = x[:7].clone(), x[:7].clone()
    low[0], high[0] = x[1:7].mean() - 3.0, x[1:7].mean() + 3.0
    below, above = (float(calibrate(own, everybody, v).z[0]) for own in (low, high))
    assert below == pytest.approx(-above, rel=1e-9)


def test_calibration_is_the_moderated_t_of_each_client_against_the_others():
    x, v = scores(1, 9)
    members = torch.tensor([True] * 6 + [False] * 3)
    found, (lowered, kept) = calibrate(x, members, v), selection(9, 6)
    for k in range(9):
        others = members & (torch.arange(9) != k)
        rest = x[others].numpy()
        freedom, squares = PRIOR_CLIENTS + len(rest) - 1, np.square(rest - rest.mean()).sum() / kept
        spread = ((PRIOR_CLIENTS * v + squares) / freedom) ** 0.5
        centre = rest.mean() + lowered * min(spread, (squares / (len(rest) - 1)) ** 0.5)
        z = (float(x[k]) - centre) / (spread * (1 + 1 / len(rest)) ** 0.5)
        assert float(found.z[k]) == pytest.approx(z, rel=1e-6)
        assert float(found.p_values[k]) == pytest.approx(stats.t.sf(z, freedom), rel=1e-6)


def test_calibration_does_not_depend_on_where_the_scores_lie():
    x, v = scores(2, 10)
    members = torch.arange(10) < 7
    first, second = calibrate(x, members, v), calibrate(x + 30, members, v)
    assert torch.allclose(first.z, second.z, atol=1e-9)


@pytest.mark.parametrize("members", [24, 16])
def test_family_wise_error_of_anybody(members, monkeypatch):
    """At most FAMILY_ERROR of benign families are rejected; Bonferroni's bound is nearly tight, so some are."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)  # statsmodels collects garbage in every call: 70 ms
    replicates = 1200
    drawn = (scores(s, 24) for s in range(replicates))
    rejected = sum(any_contaminated(calibrate(x, lowest(x, members), v).p_values) for x, v in drawn)
    assert rejected <= stats.binom.ppf(1 - LEVEL, replicates, FAMILY_ERROR)
    assert rejected >= 1


@pytest.mark.parametrize("distance", [8.0, 20.0])
def test_anybody_sees_a_single_client(distance):
    x = torch.as_tensor(np.random.default_rng(0).standard_normal(24)) * 0.2
    x[3] = 0.2 * distance
    assert any_contaminated(calibrate(x, torch.arange(24) != 3, 0.04).p_values)


def components(seed, benign, contaminated, gap):
    generator = np.random.default_rng(seed)
    x = np.concatenate([generator.standard_normal(benign), gap + 1.5 * generator.standard_normal(contaminated)])
    order = generator.permutation(len(x))
    return torch.as_tensor(0.2 * x[order]), torch.as_tensor(order < benign)


@pytest.mark.parametrize("benign, contaminated", [(22, 2), (16, 8), (8, 16), (6, 18)])
@pytest.mark.parametrize("seed", range(3))
def test_separated_components_are_told_apart_from_any_near_start(benign, contaminated, seed):
    x, truth = components(seed, benign, contaminated, gap=14.0)
    assert x[~truth].min() > x[truth].max() + 0.5
    assert torch.equal(least_error_set(x, truth, 0.04), truth)
    missed = truth.clone()  # one benign client suspected, one contaminated client among the members
    missed[truth.nonzero()[0]] = False
    missed[(~truth).nonzero()[0]] = True
    if contaminated > 2:
        assert torch.equal(least_error_set(x, missed, 0.04), truth)
    narrow = truth.clone()
    narrow[truth.nonzero()[: benign // 2]] = False
    assert torch.equal(least_error_set(x, narrow, 0.04), truth)


def test_a_closest_benign_client_is_benign_whatever_the_start():
    x, truth = components(0, 16, 8, gap=14.0)
    start = truth.clone()
    start[x.argmin()] = False
    assert bool(least_error_set(x, start, 0.04)[x.argmin()])


def test_the_cut_is_not_the_most_cautious_one():
    """A contaminated client 4 standard deviations above the benign, where its kind is 9 above, is not benign."""
    x = torch.tensor([-1.5, -1.0, -0.7, -0.4, -0.1, 0.1, 0.4, 0.8, 1.1, 1.4, 4.0, 8.0, 9.0, 10.0], dtype=torch.float64)
    start = torch.arange(14) < 10
    assert torch.equal(least_error_set(x, start, 1.0), start)


def test_nobody_outside_the_members_means_everybody_stays():
    x, v = scores(0, 12)
    everyone = torch.ones(12, dtype=torch.bool)
    assert torch.equal(least_error_set(x, everyone, v), everyone)


def test_permuting_clients_permutes_the_decisions():
    x, truth = components(1, 12, 6, gap=10.0)
    order = torch.randperm(18, generator=derive(0, "order"))
    assert torch.equal(least_error_set(x[order], truth[order], 0.04), least_error_set(x, truth, 0.04)[order])
    first, second = calibrate(x, truth, 0.04), calibrate(x[order], truth[order], 0.04)
    assert torch.allclose(second.p_values, first.p_values[order], rtol=1e-9)


def test_simes_sees_several_clients_that_stand_out_a_little_and_names_them():
    """Three p-values of .8 of the level over K: alone each passes Bonferroni at half the level, together they fail."""
    K, n = 24, 3
    p = torch.linspace(0.3, 0.9, K, dtype=torch.float64)
    p[:n] = 0.8 * FAMILY_ERROR / K
    assert float(p.min()) * K > FAMILY_ERROR / 2 and any_contaminated(p)
    assert not any_contaminated(torch.cat([p[:1], p[n:]]))
    x = torch.zeros(K, dtype=torch.float64)
    x[:n] = 1.0
    kept = benign_set(x, torch.ones(K, dtype=torch.bool), p, 0.01, torch.zeros(K, dtype=torch.float64))
    assert kept.tolist() == [False] * n + [True] * (K - n)


def close_groups():
    """Twelve members and eight suspects whose scores differ by less than Simes' test can tell."""
    lines = torch.linspace(-0.25, 0.25, 12, dtype=torch.float64), torch.linspace(0.55, 0.65, 8, dtype=torch.float64)
    order = torch.randperm(20, generator=derive(0, "close groups"))
    x, truth = torch.cat(lines)[order], order < 12
    p = calibrate(x, truth, 0.04).p_values
    assert not any_contaminated(p)
    return x, truth, p


def test_suspects_with_little_inside_the_subspace_are_strangers():
    x, truth, p = close_groups()
    inside = torch.where(truth, 5.0, 1.0) + 0.1 * torch.arange(20)
    assert lacks_subspace_energy(inside, ~truth)
    found = benign_set(x, truth, p, 0.04, inside)
    assert torch.equal(found, least_error_set(x, truth, 0.04)) and not bool(found.all())
    for other in (-inside, inside[torch.randperm(20, generator=derive(0, "strangers"))]):  # more inside, or as much
        assert bool(benign_set(x, truth, p, 0.04, other).all())


def test_energy_inside_never_decides_who():
    """A member with nothing inside the subspace stays a member."""
    x, truth, p = close_groups()
    inside = torch.where(truth, 5.0, 1.0) + 0.1 * torch.arange(20)
    found = benign_set(x, truth, p, 0.04, inside)
    inside[found.nonzero()[0]] = 0.0
    assert lacks_subspace_energy(inside, ~found)
    assert torch.equal(benign_set(x, truth, p, 0.04, inside), found)


def test_strangers_at_their_level_when_all_are_alike():
    """Exchangeable energies, three suspects of ten: 1 of 120 orders is the lowest possible, above the level."""
    suspects = torch.arange(10) < 3
    assert not lacks_subspace_energy(torch.arange(10.0), suspects)
    draw, suspects, replicates = derive(0, "alike"), torch.arange(20) < 8, 4000
    rejected = sum(lacks_subspace_energy(torch.randn(20, generator=draw), suspects) for _ in range(replicates))
    assert 1 <= rejected <= stats.binom.ppf(1 - LEVEL, replicates, STRANGER_ERROR)
    assert not lacks_subspace_energy(torch.arange(20.0), torch.zeros(20, dtype=torch.bool))
