"""The rules of the verdict for unequal clients, each of which can be switched off for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from clairlib.recovery.leave_one_out import LeaveOneOut
from clairlib.recovery.scores import LEAST_VARIANCE, scored_energies
from studies.unequal_clients.cases import NONE


def _same_sizes(X: Tensor, *_: Any) -> Tensor:
    return X.new_ones(len(X))


def _uncut(X: Tensor, *_: Any) -> Tensor:
    return X


def _energies(left_out: LeaveOneOut) -> tuple[Tensor, float]:
    """Return log scores that do not look at the bulk: rho = 0, and clients whose noise is alike."""
    T, _, law = scored_energies(left_out)
    return T, max(law.top, LEAST_VARIANCE)


def _no_leverage(left_out: LeaveOneOut) -> Tensor:
    return torch.zeros_like(left_out.X[:, 0, 0])


def _not_selected(*_: Any) -> tuple[float, float]:
    return 0.0, 1.0


RULES: dict[str, dict[str, Callable[..., Any] | property]] = {
    "sizes": {"clairlib.recovery.module_fit.client_scales": _same_sizes},
    "tails": {"clairlib.recovery.module_fit.cut_tails": _uncut},
    "own bulk": {
        "clairlib.recovery.verdict.log_scores": _energies,
        "clairlib.recovery.consensus.log_scores": _energies,
    },
    "leverage": {"clairlib.recovery.leave_one_out.LeaveOneOut.leverage": property(_no_leverage)},
    "selection": {"clairlib.recovery.detection.selection": _not_selected},
}
"""What replaces each rule, by the name under which the verdict calls it."""


@contextmanager
def without(rule: str) -> Iterator[None]:
    """Switch a rule of ``RULES`` off in this process; ``NONE`` leaves all on."""
    with ExitStack() as stack:
        for target, stand_in in ({} if rule == NONE else RULES[rule]).items():
            stack.enter_context(patch(target, stand_in))
        yield
