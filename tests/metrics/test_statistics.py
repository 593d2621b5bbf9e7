"""Percentiles, means and rates on cases worked out by hand, with none, one and two samples."""

import math
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabatch.metrics.statistics import (
    Summary,
    bits_per_byte,
    mean,
    percentile,
    perplexity,
    rate,
    standard_deviation,
    student_t,
    summary,
)


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [
        ([], 50, None),
        ([3.0], 0, 3.0),
        ([3.0], 99, 3.0),
        ([1.0, 2.0], 50, 1.5),
        ([2.0, 1.0], 50, 1.5),
        ([1.0, 2.0], 90, 1.9),
        ([1.0, 2.0], 100, 2.0),
        ([4.0, 1.0, 3.0, 2.0], 50, 2.5),
        ([0.0, 10.0, 20.0], 25, 5.0),
        (list(range(101)), 95, 95),
    ],
)
def test_percentile(values, percent, expected):
    assert percentile(values, percent) == (None if expected is None else pytest.approx(expected))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0, 100))
def test_percentile_is_numpys(values, percent):
    assert percentile(values, percent) == pytest.approx(
        float(np.percentile(values, percent)), abs=1e-6
    )


def test_percentile_leaves_its_input_alone():
    values = [3.0, 1.0, 2.0]
    percentile(values, 50)
    assert values == [3.0, 1.0, 2.0]


def test_mean_and_deviation():
    assert (mean([]), mean([4.0]), mean([1.0, 2.0])) == (None, 4.0, 1.5)
    assert (standard_deviation([]), standard_deviation([4.0])) == (None, None)
    assert standard_deviation([1.0, 3.0]) == pytest.approx(math.sqrt(2))
    assert standard_deviation([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0]) == pytest.approx(
        math.sqrt(32 / 7)
    )
    assert standard_deviation([5.0, 5.0, 5.0]) == 0


def test_summary_of_none_one_and_two_samples():
    assert summary([]) == Summary() and set(astuple(Summary())) == {None}
    assert summary([7.0]) == Summary(7.0, 7.0, None, 7.0, 7.0, 7.0, 7.0)
    two = summary(iter([1.0, 2.0]))
    assert astuple(two) == pytest.approx((1.5, 1.5, math.sqrt(0.5), 1.5, 1.9, 1.95, 1.99))
    assert (two.mean, two.median, two.std) == pytest.approx((1.5, 1.5, math.sqrt(0.5)))
    assert (two.p50, two.p90, two.p95, two.p99) == pytest.approx((1.5, 1.9, 1.95, 1.99))


def test_rate_without_time_is_not_measured():
    assert rate(10, 4.0) == 2.5
    assert rate(0, 4.0) == 0
    assert rate(10, 0.0) is None


def test_perplexity_and_bits_per_byte():
    assert perplexity(0.0) == 1
    assert perplexity(math.log(20)) == pytest.approx(20)
    assert perplexity(1e4) is None
    assert bits_per_byte(8 * math.log(2), 4) == pytest.approx(2)
    assert bits_per_byte(0.0, 4) == 0
    assert bits_per_byte(1.0, 0) is None


@pytest.mark.parametrize(
    ("freedom", "quantile"),  # of any table of the distribution
    [
        (1, 12.706),
        (2, 4.303),
        (10, 2.228),
        (11, 2.201),
        (12, 2.179),
        (15, 2.131),
        (20, 2.086),
        (30, 2.042),
        (60, 2.000),
        (1000, 1.962),
    ],
)
def test_students_t_goes_on_beyond_ten_degrees_of_freedom(freedom, quantile):
    assert student_t(freedom) == pytest.approx(quantile, abs=6e-4)
