"""CLAIR: find contaminated clients and refine the others by the low-rank subspace that benign clients share."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clairlib.alignment.align import align
    from clairlib.linalg.low_rank import LowRank
    from clairlib.recovery.clair import CLAIR
    from clairlib.recovery.result import ClairResult, ModuleResult
    from clairlib.training.finetune import finetune

__version__ = "0.1.0"
__all__ = ["CLAIR", "ClairResult", "LowRank", "ModuleResult", "align", "finetune"]

_HOMES = {"CLAIR": "recovery.clair", "ClairResult": "recovery.result", "ModuleResult": "recovery.result"}
_HOMES |= {"LowRank": "linalg.low_rank", "align": "alignment.align", "finetune": "training.finetune"}


def __getattr__(name: str) -> Any:  # torch loads with the first use, so that `clair --help` answers at once
    if name not in _HOMES:
        raise AttributeError(f"module 'clairlib' has no attribute {name!r}")
    return getattr(import_module(f"clairlib.{_HOMES[name]}"), name)
