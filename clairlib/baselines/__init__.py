"""Floor 4: the aggregation rules, subspace estimators and client scores that CLAIR is compared with."""

from clairlib.baselines.aggregators import AGGREGATORS, aggregate

__all__ = ["AGGREGATORS", "aggregate"]
