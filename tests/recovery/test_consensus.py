"""The consensus solver piece by piece: tuples, their scores, starts, growth and the choice between frames."""

from math import comb

import numpy as np
import pytest
import torch

from clairlib import CLAIR
from clairlib.core.seeds import derive
from clairlib.linalg.subspace import project_out, sin_theta
from clairlib.recovery import consensus
from clairlib.recovery import description_length as description
from clairlib.recovery import start_sets as starts
from clairlib.recovery.frame import fit_frame
from clairlib.simulate import planted
from clairlib.theory.identifiability import rivals
from studies.linear_regression.designs import tian_gu_feng
from studies.linear_regression.least_squares import least_squares

LIMIT = starts.TUPLE_LIMIT


def draw(kind="unstructured", seed=0, K=14, p=20, q=6, r=2, noise=0.02, share=0.4):
    return planted(kind, K=K, p=p, q=q, r=r, noise_std=noise, share=share, generator=derive(seed, "consensus", kind))


def ones(c):
    return torch.ones(len(c.updates), dtype=torch.float64)


def tuples_of(c, seed=0):
    return starts.candidate_tuples(*c.updates.shape, generator=derive(seed, "tuples"))


def members(c, count):
    """The first ``count`` benign clients."""
    chosen = torch.zeros_like(c.benign)
    chosen[c.benign.nonzero().flatten()[:count]] = True
    return chosen


@pytest.mark.parametrize("K", [3, 12, 24])
def test_every_pair_is_a_candidate_up_to_24_clients(K):
    tuples = starts.candidate_tuples(K, 50, 10, generator=derive(0, "tuples"))
    assert len(tuples) == len({tuple(t) for t in tuples.tolist()}) == comb(K, 2) <= LIMIT


@pytest.mark.parametrize("K, q", [(60, 10), (500, 10), (60, 1), (60, 2)])
def test_number_of_tuples_is_bounded(K, q):
    """At most TUPLE_LIMIT, distinct, sorted, of distinct clients; repeated draws cost a few of them."""
    tuples = starts.candidate_tuples(K, 50, q, generator=derive(0, "tuples"))
    rows = [tuple(t) for t in tuples.tolist()]
    assert 0.8 * LIMIT < len(rows) == len(set(rows)) <= LIMIT
    assert all(list(row) == sorted(set(row)) for row in rows)
    assert set(tuples.flatten().tolist()) <= set(range(K))
    again = starts.candidate_tuples(K, 50, q, generator=derive(0, "tuples"))
    assert torch.equal(tuples, again)
    assert not torch.equal(tuples, starts.candidate_tuples(K, 50, q, generator=derive(1, "tuples")))


@pytest.mark.parametrize("q, p", [(1, 30), (2, 30), (3, 30), (10, 30), (1, 2)])
def test_a_tuple_can_span_a_frame(q, p):
    t = starts.candidate_tuples(40, p, q, generator=derive(0, "tuples")).shape[1]
    assert t >= 2 and (t - 1) * q >= min(starts.START_RANK, p)


def test_work_is_bounded_in_the_number_of_clients(monkeypatch):
    """A fit of 60 clients scores at most TUPLE_LIMIT of its 1770 pairs at once, and still finds the set.

    The first set is searched once, then groups among the others until there are none.
    """
    scored = []
    real = starts.score_tuples

    def counted(X, tuples, common):
        scored.append(len(tuples))
        return real(X, tuples, common)

    monkeypatch.setattr(consensus, "score_tuples", counted)
    c = draw(K=60)
    result = CLAIR().fit(c.updates)
    assert torch.equal(result.benign, c.benign) and not result.groups
    others = int((~c.benign).sum())
    assert 0 < scored[0] <= LIMIT and max(scored) <= LIMIT
    assert all(later <= others * (others - 1) / 2 for later in scored[1:])


@pytest.mark.parametrize("shape", [dict(), dict(q=1, K=9), dict(p=6, q=9)])
def test_tuple_scores_equal_brute_force(shape):
    c = draw(**shape)
    tuples = tuples_of(c)
    order, distances = starts.score_tuples(c.updates, tuples)
    K, p, q = c.updates.shape
    totals = []
    for clients, found in zip(tuples.tolist(), distances, strict=True):
        group = c.updates[clients]
        D = torch.cat([x - group[0] for x in group[1:]], dim=1)
        U = torch.linalg.svd(D, full_matrices=False).U[:, : max(1, min(D.shape[1], p // 4))]
        expected = project_out(U, c.updates - group.mean(0)).square().sum((1, 2))
        others = [k for k in range(K) if k not in clients]
        assert torch.allclose(found[others], expected[others], rtol=1e-9)
        assert not found[clients].any()
        totals.append(float(expected[others].log().sum()))
    assert sorted(order) == list(range(len(tuples)))
    assert [totals[i] for i in order] == pytest.approx(sorted(totals), rel=1e-9)


@pytest.mark.parametrize("kind", ["unstructured", "dense", "sign_flip"])
def test_best_tuple_is_benign(kind):
    c = draw(kind)
    tuples = tuples_of(c)
    order, _ = starts.score_tuples(c.updates, tuples)
    assert bool(c.benign[tuples[order[0]]].all())


def test_scores_do_not_depend_on_the_chunk(monkeypatch):
    c = draw()
    tuples = tuples_of(c)
    order, distances = starts.score_tuples(c.updates, tuples)
    monkeypatch.setattr(starts, "CHUNK_ENTRIES", 1)
    chunked_order, chunked = starts.score_tuples(c.updates, tuples)
    assert chunked_order == order and torch.allclose(chunked, distances, rtol=1e-9)


def sets_of(c, allowed=None):
    tuples = tuples_of(c)
    order, distances = starts.score_tuples(c.updates, tuples)
    allowed = torch.ones_like(c.benign) if allowed is None else allowed
    return starts.start_sets(c.updates, tuples, order, distances, allowed)


def test_log_determinants_are_those_of_the_scatter():
    """Against numpy on a set that spans every direction, where the floor does not count."""
    c = draw(q=8)
    sets = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    expected = []
    for clients in sets:
        D = c.updates[clients] - c.updates[clients].mean(dim=0)
        expected.append(np.linalg.slogdet(torch.einsum("kpq,krq->pr", D, D).numpy()).logabsdet)
    assert starts.log_determinants(c.updates, sets).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind, share", [("unstructured", 0.7), ("dense", 0.7), ("sign_flip", 0.4)])
def test_the_most_concentrated_start_set_is_benign(kind, share):
    c = draw(kind, share=share, K=20)
    best = sets_of(c)[0]
    assert not bool((best & ~c.benign).any())


def test_starts_are_the_first_three_then_disjoint_ones():
    pairs = [(0, 1), (0, 2), (0, 3), (2, 4), (4, 5), (5, 6), (6, 7), (8, 9), (10, 11), (12, 13)]
    sets = [torch.tensor([k in pair for k in range(14)]) for pair in pairs]
    chosen = [tuple(start.nonzero().flatten().tolist()) for start in starts.spread_starts(sets)]
    assert chosen == [(0, 1), (0, 2), (0, 3), (4, 5), (6, 7), (8, 9)] and starts.STARTS == 6


def test_start_sets_stay_within_the_allowed_clients():
    c = draw()
    allowed = ~c.benign
    assert sets_of(c, allowed) and not any(bool((start & c.benign).any()) for start in sets_of(c, allowed))
    assert sets_of(c, members(c, 3)) == []


def test_sets_are_compared_at_every_rank():
    c = draw()
    frames = [fit_frame(c.updates, ones(c), members(c, n), r) for n, r in ((8, 2), (6, 1))]
    compared = description.at_every_rank(c.updates, ones(c), frames)
    assert sorted((f.size, f.rank) for f in compared) == [(6, 1), (6, 2), (8, 1), (8, 2)]


def test_a_judge_answers_the_same_and_fits_once(monkeypatch):
    c = draw()
    judge = consensus.FrameCache(c.updates, ones(c), None)
    frame, x, variance = judge(c.benign)
    monkeypatch.setattr(consensus, "fit_frame", None)  # a second fit would fail
    again, y, same = judge(c.benign.clone())
    assert again is frame and torch.equal(x, y) and variance == same


@pytest.mark.parametrize("kind, share", [("unstructured", 0.4), ("dense", 0.4), ("sign_flip", 0.3)])
def test_robust_half_is_benign(kind, share):
    c = draw(kind, share=share)
    half = starts.robust_half(c.updates, ones(c), None)
    assert int(half.sum()) == 7 and not bool((half & ~c.benign).any())


@pytest.mark.parametrize("kind", ["unstructured", "dense", "coalition", "sign_flip"])
@pytest.mark.parametrize("level", [0.01, 0.001])
def test_a_set_grows_to_all_benign_clients_and_stops(kind, level):
    c = draw(kind)
    frame = consensus.grow(consensus.FrameCache(c.updates, ones(c), None), members(c, 4), level)
    assert frame is not None and frame.rank == 2
    assert not bool((frame.members & ~c.benign).any())
    assert frame.size >= int(c.benign.sum()) - (level > 0.005)  # one of nine may be unusual at the higher level
    assert sin_theta(frame.basis, c.basis) < 0.1


def test_two_clients_are_no_set():
    c = draw()
    assert consensus.grow(consensus.FrameCache(c.updates, ones(c), None), members(c, 2), 0.01) is None


def test_shortest_description_takes_the_true_frame():
    """Over everybody in one frame of higher rank, and over the contaminated, wherever it stands in the list."""
    c = draw("coalition", share=0.4)
    everyone = torch.ones_like(c.benign)
    frames = [fit_frame(c.updates, ones(c), S, r) for S, r in ((c.benign, 2), (everyone, None), (~c.benign, 2))]
    assert frames[1].rank > 2
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        best = description.shortest_description(c.updates, ones(c), [frames[i] for i in order])
        assert torch.equal(best.members, c.benign)


def test_no_variance_is_below_the_noise_of_the_others():
    """The likelihood of energy x: 1 + log x with its own variance, x with that of the noise; they meet at one."""
    x = torch.tensor([0.0, 0.3, 1.0 - 1e-9, 1.0 + 1e-9, 4.0], dtype=torch.float64)
    cost = description.own_variance(x, torch.ones_like(x))
    assert cost.tolist() == pytest.approx([0.0, 0.3, 1.0, 1.0, 1 + np.log(4.0)], abs=1e-8)
    far, close = description.own_variance(torch.tensor([4.0, 2.0]), torch.tensor([0.5, 0.5])).tolist()
    assert far == close == pytest.approx(1 + np.log(2.0))  # half of 4 is its own, which counts; of 2, too close, all


def test_a_frame_that_only_describes_the_others_is_not_taken():
    """Without noise a wide frame of everybody is a cheap second frame for a coalition, and no frame of its members."""
    c = planted("coalition", share=0.2, K=20, p=20, q=10, r=2, noise_std=0.0, generator=derive(0, "second frame"))
    frames = [fit_frame(c.updates, ones(c), S, r) for S, r in ((c.benign, 2), (torch.ones_like(c.benign), 14))]
    assert torch.equal(description.shortest_description(c.updates, ones(c), frames).members, c.benign)


def test_shortest_description_keeps_everybody_when_everybody_agrees():
    c = draw(share=0.0)
    everyone = torch.ones_like(c.benign)
    frames = [fit_frame(c.updates, ones(c), S, 2) for S in (members(c, 10), everyone, members(c, 13))]
    assert bool(description.shortest_description(c.updates, ones(c), frames).members.all())


@pytest.mark.parametrize("kind", ["unstructured", "dense", "coalition", "sign_flip"])
def test_consensus_finds_set_and_rank(kind):
    c = draw(kind)
    frame = consensus.consensus(c.updates, ones(c), generator=derive(0, "tuples"))
    assert frame.rank == 2 and sin_theta(frame.basis, c.basis) < 0.1
    assert int((frame.members & ~c.benign).sum()) == 0 and frame.size >= int(c.benign.sum()) - 1


def test_a_given_rank_is_kept():
    c = draw()
    for rank in (1, 2, 3):
        assert consensus.consensus(c.updates, ones(c), rank=rank, generator=derive(0, "tuples")).rank == rank


@pytest.mark.parametrize("K", [3, 4, 5])
def test_few_clients_get_a_frame(K):
    c = draw(K=K, share=0.0)
    frame = consensus.consensus(c.updates, ones(c), generator=derive(0, "tuples"))
    assert frame.size >= 3
    if K > 3:
        assert frame.rank == 2 and bool(frame.members.all())


def test_identical_clients_are_one_set_without_a_subspace():
    X = torch.ones(5, 4, 3, dtype=torch.float64)
    frame = consensus.consensus(X, torch.ones(5, dtype=torch.float64), generator=derive(0, "tuples"))
    assert bool(frame.members.all()) and torch.allclose(frame.mean, X[0])


def test_the_closer_part_is_the_lower_group():
    x = torch.tensor([1.0, 5.0, 1.2, 5.5, 0.9, 4.8], dtype=torch.float64)
    assert consensus.closer_part(x).tolist() == [True, False, True, False, True, False]
    assert int(consensus.closer_part(torch.arange(8.0)).sum()) == 4  # even scores are cut in the middle
    assert bool(consensus.closer_part(torch.zeros(8)).all())


def test_splitting_finds_the_benign_clients_where_growing_does_not():
    """In much noise a set grows on into its surroundings; the closer part of everybody holds most benign clients."""
    c = planted(share=0.5, K=60, noise_std=0.6 / 10**0.5, generator=derive(0, "splitting"))
    judge = consensus.FrameCache(c.updates, torch.ones(60, dtype=torch.float64), None)
    everybody = torch.ones(60, dtype=torch.bool)
    part = consensus.split_repeatedly(judge, everybody)
    frame = consensus.consensus(c.updates, judge.weights, generator=derive(0, "tuples"))
    for found in (part, frame.members):
        assert float(c.benign[found].float().mean()) > 0.8 and float(found[c.benign].float().mean()) > 0.8
    grown = consensus.grow(judge, everybody, 0.01)
    assert grown is not None and grown.size > 50


def test_noiseless_clients_with_few_benign_ones_are_described():
    """A frame of higher rank than the one with the least noise leaves an outlier no room off its subspace."""
    c = planted(share=1 - 4 / 24, K=24, noise_std=0.0, generator=derive(0, "few", 4, "0.0", 1))
    assert torch.equal(CLAIR().fit(c.updates).benign, c.benign)


def test_a_set_that_interpolates_a_given_rank_is_not_taken():
    """With the rank given, (n - 1) q clients fit any r directions exactly and would set the noise to nothing."""
    c = planted(share=0.25, K=12, p=30, q=1, r=3, noise_std=0.1, generator=derive(14, "interpolating"))
    judge = consensus.FrameCache(c.updates, ones(c), 3)
    assert judge.least == 5
    for start in (members(c, 3), members(c, 4)):
        frame = consensus.grow(judge, start, 0.01)
        assert frame is None or frame.size >= 5
    assert consensus.consensus(c.updates, ones(c), rank=3, generator=derive(0, "tuples")).size >= 5


def quiet_clients(kind, updates, bad):
    """What ``bad`` contaminated clients send that carry no noise: nothing, all the same, or a frame of their own."""
    honest = updates[bad:].mean(dim=0)
    if kind == "frame of their own":
        return planted(K=bad, share=0.0, noise_std=0.0, generator=derive(0, "quiet")).updates
    sent = {"zero": torch.zeros_like(honest), "minus half the mean": -0.5 * honest}[kind]
    return sent.expand(bad, *honest.shape)


@pytest.mark.parametrize("bad", [4, 9])
@pytest.mark.parametrize("kind", ["zero", "minus half the mean", "frame of their own"])
def test_a_minority_without_noise_does_not_turn_the_verdict_round(kind, bad):
    """It agrees better than honest clients ever do; the larger group that shares a subspace decides all the same."""
    updates = planted(K=20, share=0.0, noise_std=0.3 / 10**0.5, generator=derive(1, "quiet")).updates
    updates[:bad] = quiet_clients(kind, updates, bad)
    benign = CLAIR().fit(updates).benign
    assert bool(benign[bad:].all())


def test_a_larger_group_is_searched_where_the_known_one_shares_nothing():
    """Four clients send nothing, eleven are honest; the largest set known besides is five strangers."""
    c = planted(K=20, share=0.25, noise_std=0.1 / 10**0.5, generator=derive(2, "groups"))
    honest = c.benign & (c.benign.cumsum(0) > 4)
    quiet, strangers = c.benign & ~honest, ~c.benign
    X = torch.where(quiet[:, None, None], 0.0, c.updates)
    best, known = (fit_frame(X, ones(c), members) for members in (quiet, strangers))
    found = consensus.larger_group(X, ones(c), None, best, [best, known], derive(0, "search"))
    assert torch.equal(found.members, honest)


def test_without_a_larger_group_that_shares_a_subspace_the_minority_stays():
    """Five benign clients among 24, the others strangers to one another."""
    c = planted(K=24, share=0.8, noise_std=0.0, generator=derive(2, "quiet"))
    assert torch.equal(CLAIR().fit(c.updates).benign, c.benign)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_halves_of_one_normal_are_not_two_groups(seed):
    x = torch.randn(100, generator=derive(seed, "one"), dtype=torch.float64)
    assert not consensus.are_two_groups(x, consensus.closer_part(x), variance=0.5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_normals_apart_are_two_groups(seed):
    x = torch.randn(100, generator=derive(seed, "two"), dtype=torch.float64)
    x[60:] += 4.0
    assert consensus.are_two_groups(x, consensus.closer_part(x), variance=0.5)


@pytest.mark.parametrize("seed", [2, 3])  # half of the vectors were flagged, as those with more noise
def test_vectors_of_unequal_noise_are_not_split_where_nobody_is_contaminated(seed):
    tasks = tian_gu_feng(100, 50, 5, 0.0, generator=derive(seed, "regression", "small", "0.0"))
    fits = least_squares(tasks.X, tasks.Y)
    assert bool(CLAIR().fit(fits.estimates, weights=fits.weights).benign.all())


@pytest.mark.parametrize("seed", [10, 40])  # pairs of one client of either set made every start, and one frame held all
def test_sets_that_share_a_client_are_not_merged(seed):
    truth, rival = rivals("anchored coalition", 12, 11, 1e-3 / 10**0.5, generator=derive(seed, "shared client"))
    found = CLAIR().fit(truth.updates).benign
    assert torch.equal(found, truth.benign) or torch.equal(found, rival)
