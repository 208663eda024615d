"""Copies, and directions that few clients use: reported, without a verdict."""

from __future__ import annotations

import pytest
import torch

from clairlib import CLAIR, LowRank
from clairlib.core.seeds import derive
from clairlib.recovery.frame import fit_frame
from clairlib.recovery.oddities import directions_of_few
from clairlib.simulate import planted

K = 16


def clients(noise=0.05):
    return planted(share=0.0, K=K, p=30, q=8, r=2, noise_std=noise, generator=derive(0, "oddities")).updates


@pytest.mark.parametrize("form", ["dense", "factors"])
def test_a_copy_with_little_noise_of_its_own_is_named(form):
    X, g = clients(), derive(1, "oddities")
    X[9] = X[2] + 0.005 * torch.randn(30, 8, generator=g, dtype=torch.float64)
    own = [LowRank(x, torch.eye(8, dtype=torch.float64)) for x in X] if form == "factors" else X
    result = CLAIR().fit(own)
    assert result.duplicates == [("client_2", "client_9")]
    assert "client_2 and client_9 sent nearly the same update" in result.remarks()


def test_honest_clients_are_no_copies():
    assert CLAIR().fit(clients()).duplicates == []


def test_a_direction_of_three_clients_is_named_and_those_of_all_are_not():
    X, g = clients(), derive(2, "oddities")
    ones, everybody = torch.ones(K, dtype=torch.float64), torch.ones(K, dtype=torch.bool)
    assert directions_of_few(X, ones, fit_frame(X, ones, everybody, 2)) == []
    direction = torch.nn.functional.normalize(torch.randn(30, 1, generator=g, dtype=torch.float64), dim=0)
    X[3:6] += 4 * direction @ torch.randn(3, 1, 8, generator=g, dtype=torch.float64)
    assert [3, 4, 5] in directions_of_few(X, ones, fit_frame(X, ones, everybody, 3))
