"""Statement 1: what exact updates determine, where that ends, and the tables of notebook 01."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from clairlib.core.seeds import derive
from clairlib.linalg.subspace import project_out, sin_theta
from clairlib.simulate import attacks, planted
from clairlib.simulate.attacks import random_frame
from clairlib.theory.identifiability import (
    INSIDE_ATTACKS,
    attacked,
    chance_size,
    consensus_frames,
    consensus_set,
    difference_ranks,
    frame_through,
    identified_frame,
    moved_gauge,
    rivals,
    tuple_size,
)
from studies.identifiability import plots as identifiability_plots
from studies.identifiability import study

EPS = float(np.finfo(float).eps)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def benign_tuples(truth, q: int) -> torch.Tensor:
    return torch.combinations(truth.benign.nonzero().flatten(), tuple_size(truth.rank, q))


def revealed(truth, basis, q: int) -> list[bool]:
    """Does each benign tuple reveal span(basis), up to rounding over the smallest singular value of its differences?"""
    outcome = []
    for clients in benign_tuples(truth, q):
        group = truth.targets[clients]
        wide = torch.cat([one - group[0] for one in group[1:]], dim=1)
        smallest = float(torch.linalg.svdvals(wide)[truth.rank - 1])
        tolerance = 100 * EPS * float(torch.linalg.matrix_norm(group).max()) / smallest
        outcome.append(sin_theta(frame_through(truth.targets, clients).basis, basis) <= tolerance)
    return outcome


@pytest.mark.parametrize("q", [1, 2, 3, 10])
@pytest.mark.parametrize("kind", attacks.ATTACKS)
def test_statement1_a_benign_pair_reveals_the_subspace(kind, q):
    truth = planted(kind, share=1 / 3, K=9, q=q, generator=derive(0, "statement1", kind, q))
    assert all(revealed(truth, truth.basis, q))
    off = project_out(truth.basis, truth.common_part)
    for clients in benign_tuples(truth, q):
        frame = frame_through(truth.targets, clients)
        assert torch.equal(frame.members, truth.benign)
        torch.testing.assert_close(frame.common_part, off, rtol=0, atol=1e-9)
    wrong = random_frame(*truth.basis.shape, generator=derive(1, "statement1"))
    assert not any(revealed(truth, wrong, q)), "a random basis must not pass for the shared one"


@pytest.mark.parametrize(("q", "t", "m"), [(1, 4, 4), (2, 3, 2), (3, 2, 2), (10, 2, 1)])
def test_statement1_every_other_frame_holds_fewer_benign_clients_than_a_tuple(q, t, m):
    assert (tuple_size(3, q), chance_size(3, q)) == (t, m)
    truth = planted("coalition", share=0.4, K=10, q=q, generator=derive(2, "others", q))
    frames = consensus_frames(truth.targets, 3)
    assert torch.equal(frames[0].members, truth.benign)
    assert all(int((frame.members & truth.benign).sum()) <= t - 1 for frame in frames[1:])


def test_difference_ranks_are_those_of_numpy():
    truth = planted("coalition", share=0.4, K=6, p=8, q=5, generator=derive(0, "ranks"))
    targets = truth.targets.clone()
    targets[1] = targets[0]  # a copy
    expected = [[np.linalg.matrix_rank((a - b).numpy(), tol=1e-10) for b in targets] for a in targets]
    assert difference_ranks(targets).tolist() == expected


@pytest.mark.parametrize(
    ("q", "benign", "unique"), [(10, 2, True), (3, 2, False), (3, 3, True), (1, 4, False), (1, 5, True)]
)
def test_as_many_benign_clients_are_needed_as_stated(q, benign, unique):
    truth = planted("dense", share=1 - benign / 9, K=9, q=q, generator=derive(3, "needed", q, benign))
    found = identified_frame(consensus_frames(truth.targets, 3), 3, q)
    assert (found is not None) is unique
    assert not unique or torch.equal(found.members, truth.benign)


@pytest.mark.parametrize(
    ("kind", "count", "winner"),
    [
        ("coalition", 4, "benign"),
        ("coalition", 5, "tie"),
        ("coalition", 6, "rivals"),
        ("anchored coalition", 3, "benign"),
        ("anchored coalition", 4, "tie"),
        ("sign_flip", 5, "tie"),
        ("sign_flip", 6, "rivals"),
    ],
)
def test_the_counting_condition_is_sharp(kind, count, winner):
    truth, rival = rivals(kind, 5, count, 0.0, generator=derive(4, "sharp", kind, count))
    frames = consensus_frames(truth.targets, 3)
    found = identified_frame(frames, 3, 10)
    if winner == "tie":
        assert found is None and frames[0].size == frames[1].size == 5
    else:
        assert found is not None and torch.equal(found.members, truth.benign if winner == "benign" else rival)
    if kind == "sign_flip":
        assert all(sin_theta(frame.basis, truth.basis) < 1e-12 for frame in frames), "both sides reveal the subspace"


def test_sign_flips_without_a_common_part_are_members():
    truth = planted("sign_flip", share=0.5, K=8, common_norm=0.0, noise_std=0.0, generator=derive(5, "flip"))
    found = identified_frame(consensus_frames(truth.targets, 3), 3, 10)
    assert found is not None and found.size == 8


@pytest.mark.parametrize("attack", INSIDE_ATTACKS)
def test_attacks_inside_the_subspace_stay_members_and_touch_nothing_outside(attack):
    honest = planted(share=0.0, K=8, generator=derive(6, "inside"))
    truth = attacked(honest, attack, 3, 100.0, generator=derive(6, "attack"))
    assert torch.equal(truth.targets[3:], honest.targets[3:])
    assert bool(torch.linalg.matrix_norm(truth.targets[:3] - truth.common_part).min() > 30)
    off = project_out(truth.basis, truth.targets - truth.common_part)
    assert float(off.abs().max()) < 1e-11
    assert bool(consensus_set(truth.targets, truth.basis, project_out(truth.basis, truth.common_part)).all())
    noise = project_out(truth.basis, truth.updates - truth.targets - honest.updates + honest.targets)
    assert float(noise.abs().max()) < 1e-11, "the same noise as without attack"


def test_copies_are_no_evidence_of_a_subspace():
    targets = torch.randn(6, 8, 5, generator=derive(7, "copies"), dtype=torch.float64)
    targets[1:4] = targets[0]
    frames = consensus_frames(targets, 3)
    assert frames[0].size == 4 and frames[0].rank == 0
    assert identified_frame(frames, 3, 5) is None


def test_too_many_tuples_are_refused():
    with pytest.raises(ValueError, match="tuples of 4 among 80"):
        consensus_frames(torch.zeros(80, 5, 1, dtype=torch.float64), 3)


def test_moving_the_gauge_changes_no_update():
    truth = planted(share=0.0, K=4, generator=derive(8, "gauge"))
    U, M, A = truth.basis, truth.common_part, truth.basis.T @ (truth.targets - truth.common_part)
    generator = derive(9, "gauge")
    shift = torch.randn(3, 10, generator=generator, dtype=torch.float64)
    V, N, B = moved_gauge(U, M, A, shift, random_frame(3, 3, generator=generator))
    torch.testing.assert_close(N + V @ B, truth.targets, rtol=0, atol=1e-13)
    torch.testing.assert_close(project_out(V, N), project_out(U, M), rtol=0, atol=1e-13)
    assert float((N - M).norm()) > 1 and float((B - A).norm()) > 1
    table = study.gauge_table().set_index("move")
    assert table[["updates", "P", "P_perp M"]].to_numpy().max() < 1e-14
    assert table.loc["P M moved into every A_k", "M"] > 0.05 and table.loc["U turned", "U"] > 0.05


def test_the_exact_tables_say_what_statement_1_does():
    reveal = study.summarise_reveal(study.reveal_study(["coalition"], [1, 10], 1)).set_index("q")
    assert (reveal.pairs[1], reveal.tuples[1], reveal.pairs[10]) == (0.0, 1.0, 1.0)
    small, crowd = study.needed_study([3, 10], [2, 3], [40], 1)
    assert list(small.unique) == [False, True, True, True] and bool(small.as_stated.all())
    assert crowd.unique.tolist() == [1.0] and float(crowd.sin_theta.iloc[0]) < 1e-12
    exact = study.exact_attacks(2, [100])
    assert exact[["flagged by algebra", "flagged by CLAIR"]].to_numpy().max() == 0
    assert exact.error.max() < 1e-9


def test_rival_cell_and_its_summary():
    rows = pd.DataFrame(study.rival_cell("coalition", 6, 5, 1e-3, 1, 0)["rivals"])
    assert rows.loc[0, ["largest", "second", "algebra", "CLAIR"]].tolist() == [6, 5, "benign", "benign"]
    fixed = {"kind": "anchored coalition", "benign": 6, "sin_theta": 0.1}
    draws = [(5, "tie", "rivals"), (5, "tie", "other"), (6, "rivals", "rivals"), (6, "rivals", "benign")]
    table = study.summarise_rivals(pd.DataFrame([{**fixed, "count": c, "algebra": a, "CLAIR": w} for c, a, w in draws]))
    assert table.stated.tolist() == ["tie", "rivals"] and table.as_stated.tolist() == [0.5, 0.5]
    identifiability_plots.rival_outcomes(table, 6).canvas.draw()


def test_attack_rows_and_their_summary():
    rows = pd.DataFrame(study.in_subspace_cell([1], [1.0], 8, 0.1, 0)["attacks"])
    assert len(rows) == len(INSIDE_ATTACKS) and bool((rows.ratio_local < 1).all())
    twice = pd.concat([rows.assign(ratio=1.0), rows.assign(ratio=4.0, ratio_local=2.0)])
    table = study.summarise_attacks(twice)
    assert table.ratio.tolist() == pytest.approx([2.0, 2.0]) and table.worst_ratio_local.tolist() == [2.0, 2.0]
    identifiability_plots.in_subspace_attacks(table, 8).canvas.draw()


def test_few_table_counts_and_figures_draw():
    table = study.few_study([6], [0.02], 2)
    assert table.loc[0, ["benign", "draws", "exact"]].tolist() == [6, 2, 1.0]
    ranks = study.rank_table(["coalition"], K=6)
    inside = ranks[ranks.benign & (ranks["first"] != ranks["second"])]
    assert len(inside) == 4 * 3 and set(inside["rank"]) == {3}
    needed, _ = study.needed_study([10], [2], [], 1)
    for figure in (
        identifiability_plots.few_benign(table),
        identifiability_plots.difference_ranks(ranks, 3),
        identifiability_plots.needed(needed),
    ):
        figure.canvas.draw()
