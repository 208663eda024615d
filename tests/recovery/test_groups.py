"""Groups of clients that agree with one another, trusted clients, and clients of whom nothing can be told."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clairlib import CLAIR, LowRank
from clairlib.core.seeds import derive
from clairlib.recovery.clair import UntrustedError
from clairlib.simulate import planted
from studies.unequal_clients.clients import Attack, Design, Honest, draw

K = 20
NAMES = [f"client_{k}" for k in range(K)]


def drawn(kind, share=0.4, index=0):
    one = draw(Design(K=K), Honest(), Attack(kind, share), seed=0, index=index)
    return one, one.updates["module_0"], one.targets["module_0"]


def named(members):
    return [NAMES[k] for k in members.nonzero()[:, 0].tolist()]


def test_two_honest_populations_are_both_reported_and_refined_within_themselves():
    one, X, targets = drawn("population")
    targets = targets.clone()
    result = CLAIR().fit(X)
    assert torch.equal(result.benign, one.benign) and [g.members for g in result.groups] == [named(~one.benign)]
    (group,) = result.groups
    assert group.subspace["update"] > 0.7 and abs(group.common_part["update"]) < 0.3
    other = ~one.benign  # their own targets: the mean of their residuals is their common part
    U = result.basis
    local = (X[one.benign] - targets[one.benign]).square().sum()
    assert (result.refined[one.benign] - targets[one.benign]).square().sum() < 0.6 * local
    within = X[other].mean(dim=0)
    spread = lambda Y: float((Y - U @ (U.T @ Y)).var(dim=0).sum())  # noqa: E731
    assert spread(result.refined[other]) < 0.3 * spread(X[other]) and within.norm() > 0


def test_a_coalition_is_a_group_whose_subspace_overlaps_by_chance():
    """By chance r / p = .06 of one subspace lies in another; r^2 squared cosines of mean 1 / p, five deviations."""
    one, X, _ = drawn("coalition")
    (group,) = CLAIR().fit(X).groups
    assert group.members == named(~one.benign) and group.size == 8
    assert group.subspace["update"] < 3 / 50 + 5 * (2 / 9) ** 0.5 * 3 / 50


def test_trusted_clients_decide_where_the_coalition_is_the_majority():
    one, X, targets = drawn("coalition", share=0.6)
    assert torch.equal(CLAIR().fit(X).benign, ~one.benign)
    honest = named(one.benign)
    result = CLAIR().fit(X, trusted=honest[:2])
    assert torch.equal(result.benign, one.benign) and [g.members for g in result.groups] == [named(~one.benign)]
    errors = [(Y - targets)[one.benign].square().sum() for Y in (result.refined, X)]
    assert errors[0] < 0.7 * errors[1]


def test_trusted_clients_that_do_not_agree_or_do_not_exist_are_refused():
    one, X, _ = drawn("coalition")
    with pytest.raises(UntrustedError, match="in no group of clients that agree") as told:
        CLAIR().fit(X, trusted=[named(one.benign)[0], named(~one.benign)[0]])
    with pytest.raises(ValueError, match="trusted client 'nobody'") as unknown:
        CLAIR().fit(X, trusted=["nobody"])
    assert "\n" not in str(told.value) + str(unknown.value)


def honest(K=10):
    return planted(share=0.0, K=K, p=20, q=6, r=2, noise_std=0.05, generator=derive(0, "groups")).updates


@pytest.mark.parametrize("form", ["tensor", "numpy", "factors", "modules"])
def test_zero_updates_are_set_aside_in_every_form(form):
    X = honest()
    X[[1, 7]] = 0.0
    eye = torch.eye(6, dtype=torch.float64)
    sent = {"tensor": X, "numpy": X.numpy(), "factors": [LowRank(x, eye) for x in X], "modules": {"a": X, "b": 2 * X}}
    result, rest = CLAIR().fit(sent[form]), CLAIR().fit(X[[0, 2, 3, 4, 5, 6, 8, 9]])
    assert result.set_aside == ["client_1", "client_7"] and result.names == [f"client_{k}" for k in range(10)]
    assert [v for v, name in zip(result.verdicts, result.names, strict=True) if name in result.set_aside] == [
        "cannot tell"
    ] * 2
    assert "client_1: zero update, set aside" in result.summary()
    kept = [k for k in range(10) if k not in (1, 7)]
    for values in (result.scores, result.p_values, result.smallest_deviation):
        assert len(values) == 10 and np.isnan(np.asarray(values)[[1, 7]]).all() and not np.isnan(values[kept]).any()
    assert not result.benign[1] and not result.benign[7] and bool(result.benign[kept].all())
    refined = result.modules["a"].refined if form == "modules" else result.refined
    assert len(refined) == 10
    own = torch.stack([u.dense() if form == "factors" else torch.as_tensor(u) for u in refined])
    assert not own[[1, 7]].any() and torch.allclose(own[kept], rest.refined, atol=1e-8)


def test_too_few_updates_that_are_not_zero_are_refused_in_one_line():
    X = honest(4)
    X[:2] = 0.0
    with pytest.raises(ValueError, match="2 updates are zero, the first that of client 'client_0'") as told:
        CLAIR().fit(X)
    assert "\n" not in str(told.value)


def test_nothing_can_be_told_of_clients_that_share_nothing():
    X = torch.randn(12, 20, 6, generator=derive(0, "nothing"), dtype=torch.float64)
    result = CLAIR().fit(X)
    assert not result.is_shared and result.verdicts == ["cannot tell"] * 12 and result.contaminated == []
    assert "nothing shared found" in result.summary()
