"""Paired statistics against vectors that were computed elsewhere, and against simulations of data
whose truth is known."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabatch.metrics.paired import (
    bootstrap_interval,
    cluster_sums,
    holm,
    mcnemar_p,
    sign_flip_p,
    smallest_difference,
    standard_error,
    wilson,
)

ONES = np.ones


def test_mcnemar_and_wilson_and_holm_have_known_values():
    assert mcnemar_p(10, 25) == pytest.approx(0.016674, abs=5e-7)
    assert mcnemar_p(25, 10) == mcnemar_p(10, 25)
    assert mcnemar_p(0, 0) == mcnemar_p(7, 7) == 1
    assert mcnemar_p(600, 700) == pytest.approx(0.00598, rel=0.01)  # large numbers stay exact
    assert wilson(0, 10) == pytest.approx((0, 0.27753), abs=1e-5)
    assert wilson(5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0] and holm([]) == []


@pytest.mark.parametrize(
    ("items", "points"),
    [(90, 9.8), (399, 4.7), (500, 4.2), (631, 3.7), (1000, 2.95), (1273, 2.6), (4183, 1.4)],
)
def test_what_so_many_items_can_show(items, points):
    """With a variance of 1 / 9: the illustration of arXiv 2411.00640, whose 969 items show three
    points."""
    assert 100 * smallest_difference(math.sqrt(1 / 9 / items)) == pytest.approx(points, abs=0.06)
    assert smallest_difference(math.sqrt(1 / 9 / 968.997)) == pytest.approx(0.03, abs=1e-7)


def test_the_error_of_a_mean_and_of_clusters_is_the_textbook_s():
    values = np.array([1.0, 4.0, 2.0, 7.0, 5.0])
    assert standard_error(values, ONES(5)) == pytest.approx(values.std(ddof=1) / math.sqrt(5))
    labels = ["a", "b", "a", "b", "c"]
    change, size = cluster_sums(values, labels), cluster_sums(ONES(5), labels)
    assert change.tolist() == [3, 11, 5] and size.tolist() == [2, 2, 1]
    residuals = [(1 - 3.8) + (2 - 3.8), (4 - 3.8) + (7 - 3.8), 5 - 3.8]
    clustered = math.sqrt(3 / 2 / 25 * sum(r * r for r in residuals))
    assert standard_error(change, size) == pytest.approx(clustered)
    assert standard_error(values[:1], ONES(1)) is None


def test_the_bootstrap_is_bca():
    """Values of scipy.stats.bootstrap(method="BCa") differ by resampling noise only: the interval of
    a skewed sample leans to its long side, which percentiles and plain t do not."""
    values = np.random.default_rng(3).exponential(size=80) - 0.3
    found = bootstrap_interval(values, ONES(80))
    middle, error = values.mean(), standard_error(values, ONES(80))
    assert found.low == pytest.approx(middle - 1.96 * error, abs=0.5 * error)
    assert middle - found.low < found.high - middle
    assert bootstrap_interval(values, ONES(80)) == found  # a function of its seed
    assert bootstrap_interval(values, ONES(80), seed=1) != found


@pytest.mark.parametrize("value", [0.0, 0.1, -1 / 3])
def test_equal_changes_have_no_interval_and_say_so(value):
    found = bootstrap_interval(np.full(20, value), ONES(20))
    assert (found.low, found.high) == (None, None) and "alike" in found.reason
    assert bootstrap_interval(ONES(1), ONES(1)).reason == "one cluster has no interval"
    assert sign_flip_p(np.zeros(20)) == 1


def test_a_single_cluster_that_differs_is_no_crash():
    change = np.zeros(30)
    change[4] = -1.0
    found = bootstrap_interval(change, ONES(30))
    assert found.low < 0 and found.high <= 0.0
    assert sign_flip_p(change) == 1


def test_random_signs_find_a_difference_and_none():
    generator = np.random.default_rng(5)
    noise = generator.normal(size=100)
    assert sign_flip_p(noise - noise.mean() + 0.01) > 0.5
    assert sign_flip_p(noise + 1) == 1 / 10_000
    ten = np.array([1.0] * 9 + [-1.0])  # |sum| >= 8: 2 * (1 + 10) / 1024
    assert sign_flip_p(ten) == pytest.approx(22 / 1024, abs=0.005)


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_keeps_order_and_never_lowers(values):
    adjusted = holm(values)
    assert all(p <= a <= 1 for p, a in zip(values, adjusted, strict=True))
    order = sorted(range(len(values)), key=lambda i: values[i])
    assert [adjusted[i] for i in order] == sorted(adjusted)


# Coverage: 1,000 data sets whose truth is known

SETS = 1000


def covered(change, size, truth, seed):
    found = bootstrap_interval(change, size, rounds=999, seed=seed)
    return found.low <= truth <= found.high


def documents(generator, count):
    """Bytes of documents of very different length, and the bits that they changed by."""
    size = np.ceil(generator.lognormal(6, 0.8, count))
    return size, size * (-0.05 + 0.1 * generator.standard_normal(count))


@pytest.mark.parametrize("count", [100, 150])
def test_95_of_100_intervals_hold_the_truth_of_independent_documents(count):
    generator, hits = np.random.default_rng(11), 0
    for seed in range(SETS):
        size, change = documents(generator, count)
        hits += covered(change, size, -0.05, seed)
    assert 0.93 <= hits / SETS <= 0.97


def test_95_of_100_intervals_hold_the_truth_of_clusters_and_only_if_they_are_known():
    generator, hits, naive = np.random.default_rng(12), 0, 0
    for seed in range(SETS):
        labels = np.repeat(np.arange(80), generator.integers(1, 6, 80))
        size, change = documents(generator, len(labels))
        change += size * 0.1 * generator.standard_normal(80)[labels]
        hits += covered(cluster_sums(change, labels), cluster_sums(size, labels), -0.05, seed)
        naive += covered(change, size, -0.05, seed)
    assert 0.93 <= hits / SETS <= 0.97
    assert naive / SETS < 0.9


def test_95_of_100_intervals_hold_the_truth_of_right_and_wrong_answers():
    generator, hits = np.random.default_rng(13), 0
    for seed in range(SETS):
        change = generator.choice([-1.0, 0.0, 1.0], p=[0.1, 0.75, 0.15], size=200)
        hits += covered(change, ONES(200), 0.05, seed)
    assert 0.93 <= hits / SETS <= 0.97
