"""CLAIR: find contaminated clients and refine the others by the low-rank subspace that benign clients share."""

from clairlib.clair import CLAIR
from clairlib.factors import LowRank
from clairlib.result import ClairResult, ModuleResult

__version__ = "0.1.0"
__all__ = ["CLAIR", "ClairResult", "LowRank", "ModuleResult"]
