"""The public door: every form that is accepted comes back in kind, everything else is refused in one line."""

import numpy as np
import pytest
import torch

from clairlib import CLAIR, LowRank
from clairlib.core.seeds import derive
from clairlib.simulate import planted

CLIENTS = planted(K=8, p=14, q=5, r=2, noise_std=0.03, share=0.25, generator=derive(0, "updates"))
X = CLIENTS.updates


def factors(updates=X):
    eye = torch.eye(updates.shape[2], dtype=torch.float64)
    return [LowRank(x, eye) for x in updates]


def replaced(k, **changes):
    """Factored updates with client k changed."""
    made = factors()
    fields = dict(B=made[k].B, A=made[k].A, scale=1.0) | changes
    made[k] = LowRank(**fields)
    return made


def poisoned(k, value, dtype=torch.float64):
    made = X.to(dtype).clone()
    made[k, 3, 2] = value
    return made


def test_numpy_comes_back_as_numpy():
    result, expected = CLAIR().fit(X.numpy()), CLAIR().fit(X)
    module = result.modules["update"]
    for value in (result.benign, result.scores, result.p_values, result.basis, result.common_part, result.refined):
        assert isinstance(value, np.ndarray)
    assert isinstance(module.scores, np.ndarray) and isinstance(module.spectrum, np.ndarray)
    assert result.benign.dtype == bool
    assert np.array_equal(result.refined, expected.refined.numpy())
    assert result.summary() == expected.summary()


def test_numpy_dtype_is_kept_and_a_list_of_arrays_is_a_stack():
    single = CLAIR().fit([x for x in X.float().numpy()])
    assert single.refined.dtype == single.basis.dtype == np.float32
    assert np.array_equal(single.benign, CLIENTS.benign.numpy())


def test_updates_by_module_come_back_by_module():
    result = CLAIR().fit({"layer.q": X, "layer.v": factors(2 * X)})
    for value in (result.rank, result.basis, result.common_part, result.refined, result.gain, result.certificate):
        assert list(value) == ["layer.q", "layer.v"]
    assert isinstance(result.refined["layer.q"], torch.Tensor)
    assert all(isinstance(u, LowRank) for u in result.refined["layer.v"])
    assert torch.equal(result.benign, CLIENTS.benign)
    assert torch.allclose(result.refined["layer.v"][0].dense(), 2 * result.refined["layer.q"][0], atol=1e-10)


def test_one_module_by_name_is_that_module_alone():
    named, plain = CLAIR().fit({"w": X}), CLAIR().fit(X)
    assert list(named.modules) == ["w"] and list(plain.modules) == ["update"]
    assert torch.equal(named.refined["w"], plain.refined) and torch.equal(named.scores, plain.scores)


def test_clients_are_named():
    names = [f"hospital {k}" for k in range(8)]
    result = CLAIR().fit(X, names=names)
    assert result.names == names
    bad = [name for name, ok in zip(names, CLIENTS.benign.tolist(), strict=True) if not ok]
    assert result.contaminated == bad
    assert f"2 of 8 clients contaminated: {', '.join(bad)}" in result.summary()
    assert CLAIR().fit(X).names == [f"client_{k}" for k in range(8)]


def test_summary_says_every_verdict_rank_and_gain():
    lines = CLAIR().fit(X).summary().splitlines()
    assert len(lines) == 1 + 1 + 8 + 1
    verdicts = [line.split()[1] for line in lines[2:10]]
    assert verdicts == ["benign" if ok else "contaminated" for ok in CLIENTS.benign.tolist()]
    assert lines[-1].startswith("update 14x5: rank 2, shared structure 0.")


def test_progress_names_every_module_once():
    heard = []
    CLAIR().fit({"a": X, "b": X}, progress=heard.append)
    assert heard == ["a", "b"]


def test_results_are_frozen():
    result = CLAIR().fit(X)
    with pytest.raises(AttributeError):
        result.benign = None


REFUSED = {
    "NaN": (poisoned(3, torch.nan), ValueError, "client 'client_3' has NaN or Inf"),
    "Inf": (poisoned(5, -torch.inf, torch.float32), ValueError, "client 'client_5' has NaN or Inf"),
    "NaN, bfloat16": (poisoned(0, torch.nan, torch.bfloat16), ValueError, "client 'client_0' has NaN or Inf"),
    "NaN in a module": ({"a": X, "b": poisoned(2, torch.nan)}, ValueError, "'client_2' has NaN or Inf in module 'b'"),
    "NaN in a factor": (replaced(4, A=torch.full((5, 5), torch.nan)), ValueError, "client 'client_4' has NaN or Inf"),
    "Inf in a scale": ({"m": replaced(1, scale=torch.inf)}, ValueError, "'client_1' has NaN or Inf in module 'm'"),
    "two dimensions": (X[0], ValueError, r"must have shape \(K, p, q\); got \(14, 5\)"),
    "two dimensions, module": ({"a": X[:, 0]}, ValueError, r"updates in module 'a' must have shape \(K, p, q\)"),
    "integers": (X.int(), TypeError, "must be floating point; got torch.int32"),
    "no rows": (X[:, :0], ValueError, r"are empty: shape \(8, 0, 5\)"),
    "ragged": ([np.ones((2, 3)), np.ones((3, 3)), np.ones((2, 3))], ValueError, r"must be a \(K, p, q\) array or a"),
    "words": (["a", "b", "c"], ValueError, r"must be a \(K, p, q\) array or a sequence of LowRank"),
    "two clients": (X[:2], ValueError, "need at least 3 clients .*; got 2"),
    "no clients": (X[:0], ValueError, "need at least 3 clients .*; got 0"),
    "no modules": ({}, ValueError, "no modules given"),
    "missing update": ({"a": X, "b": X[:7]}, ValueError, "'b' has 7, 'a' has 8"),
    "other rows": (replaced(6, B=X[6, :9]), ValueError, r"client 'client_6' has \(9, 5\), expected \(14, 5\)"),
    "other columns": ({"m": replaced(2, A=torch.ones(5, 4))}, ValueError, r"'client_2' has \(14, 4\) in module 'm'"),
    "factors that do not fit": (replaced(1, A=torch.ones(4, 5)), ValueError, r"'client_1' has factors \(14, 5\), \(4"),
    "dense among factors": ([*factors()[:7], X[7]], TypeError, "client 'client_7' has Tensor, expected LowRank"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_updates_that_cannot_be_compared_are_refused(case):
    updates, error, message = REFUSED[case]
    with pytest.raises(error, match=message) as caught:
        CLAIR().fit(updates)
    assert "\n" not in str(caught.value)


def test_a_refusal_uses_the_clients_own_name():
    names = [f"hospital {k}" for k in range(8)]
    with pytest.raises(ValueError, match="client 'hospital 3' has NaN or Inf"):
        CLAIR().fit(poisoned(3, torch.nan), names=names)


@pytest.mark.parametrize(
    "names, message",
    [(["a", "b"], "got 2 names for 8 clients"), ([*"abcdefg", "c"], "client names must differ; 'c' is given twice")],
)
def test_names_that_do_not_tell_clients_apart_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        CLAIR().fit(X, names=names)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_that_are_not_positive_are_refused(bad):
    weights = [1.0] * 8
    weights[5] = bad
    with pytest.raises(ValueError, match="weights must be positive; client 'client_5' has"):
        CLAIR().fit(X, weights=weights)


def test_weights_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"weights must have shape \(8,\), one a client; got \(3,\)"):
        CLAIR().fit(X, weights=[1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(solver="magic"), "solver must be 'consensus' or 'convex'; got 'magic'"),
        (dict(side="left"), "side must be 'output' or 'input'; got 'left'"),
        (dict(rank=-1), "rank must be a whole number, not negative; got -1"),
    ],
)
def test_options_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CLAIR(**options)


@pytest.mark.parametrize(
    "updates, rank, message",
    [
        ({"w": X}, 15, "rank 15 is larger than the updates of module 'w' allow, 14"),
        ([LowRank(x[:, :1], torch.ones(1, 5).double()) for x in X], 9, "module 'update' allow, 8"),
        (X[:3, :, :2], 3, "module 'update' allow, 2"),
    ],
    ids=["rows", "adapter ranks", "differences"],
)
def test_a_rank_larger_than_the_updates_allow_is_refused(updates, rank, message):
    with pytest.raises(ValueError, match=message):
        CLAIR(rank=rank).fit(updates)


def test_an_input_side_refusal_says_the_shape_that_was_given():
    with pytest.raises(ValueError, match=r"'client_6' has \(9, 5\), expected \(14, 5\)"):
        CLAIR(side="input").fit(replaced(6, B=X[6, :9]))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_identical_updates_are_fitted(rank):
    same = CLAIR(rank=rank).fit(torch.ones(4, 5, 3))
    assert bool(same.benign.all()) and torch.equal(same.refined, torch.ones(4, 5, 3))
