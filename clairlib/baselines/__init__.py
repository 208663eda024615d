"""Floor 4: aggregation rules, subspace estimators and client scores of others, to compare CLAIR with."""

from clairlib.baselines.aggregators import AGGREGATORS, aggregate

__all__ = ["AGGREGATORS", "aggregate"]
