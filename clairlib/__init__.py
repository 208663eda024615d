"""CLAIR: find contaminated clients and refine the others by the low-rank subspace that benign clients share."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clairlib.clair import CLAIR
    from clairlib.factors import LowRank
    from clairlib.result import ClairResult, ModuleResult

__version__ = "0.1.0"
__all__ = ["CLAIR", "ClairResult", "LowRank", "ModuleResult"]

_HOMES = {"CLAIR": "clair", "LowRank": "factors", "ClairResult": "result", "ModuleResult": "result"}


def __getattr__(name: str) -> Any:  # torch loads with the first use, so that `clair --help` answers at once
    if name not in _HOMES:
        raise AttributeError(f"module 'clairlib' has no attribute {name!r}")
    return getattr(import_module(f"clairlib.{_HOMES[name]}"), name)
