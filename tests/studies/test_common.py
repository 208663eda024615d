"""What the studies have in common: intervals, names of clients, verdicts, colours."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from studies.common.intervals import mean_interval, rate_interval


def test_intervals_are_those_of_the_textbook():
    x = np.array([1.0, 2.0, 4.0])
    mean, low, high = mean_interval(x)
    expected = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((x.mean(), expected.low, expected.high))
    assert math.isnan(mean_interval([1.0])[1])
    wilson = stats.binomtest(47, 50).proportion_ci(method="wilson")
    assert rate_interval(47, 50) == pytest.approx((0.94, wilson.low, wilson.high))
