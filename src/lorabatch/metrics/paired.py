"""Is B better than A on the same items? Statistics of paired comparisons, items in clusters.

What is compared is always a ratio of sums, never a mean of ratios: ``change`` [C] is what B scored
more than A in each cluster (bits, or right answers), ``size`` [C] what that is counted over (bytes,
or items). Clusters (documents of one patient, questions on one text) are independent of each other;
items that belong to none are clusters of one. Sources beside each formula.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from lorabatch.metrics.statistics import student_t

Array = NDArray[np.float64]

ROUNDS = 9999  # of resampling
AT_ONCE = 1 << 21  # numbers of a round of resampling in memory
NORMAL = NormalDist()
Z_95, Z_POWER = NORMAL.inv_cdf(0.975), NORMAL.inv_cdf(0.8)
EQUAL = 1e-12  # relative: what sums of equal numbers may differ by


@dataclass(frozen=True)
class Interval:
    """Of 95 %; both ends None where it is undefined, and why."""

    low: float | None = None
    high: float | None = None
    reason: str | None = None


def cluster_sums(values: Sequence[float], labels: Sequence[Hashable]) -> Array:
    """The sum of each cluster's values, clusters in the order of their first item."""
    places: dict[Hashable, int] = {}
    where = [places.setdefault(label, len(places)) for label in labels]
    sums: Array = np.zeros(len(places))
    np.add.at(sums, where, np.asarray(values, np.float64))
    return sums


def standard_error(change: Array, size: Array) -> float | None:
    """Of the ratio of sums, by linearisation over clusters; None of one cluster.

    ``sqrt(C / (C - 1) * sum of (change - ratio * size)**2) / sum of size``. With equal sizes it is
    the clustered standard error of a mean (arXiv 2411.00640); C / (C - 1) is for small samples.
    """
    count = len(change)
    if count < 2:
        return None
    residual = change - change.sum() / size.sum() * size
    return math.sqrt(count / (count - 1) * float(residual @ residual)) / float(size.sum())


def smallest_difference(error: float) -> float:
    """What a test at 5 % shows with 80 % power, by the standard error of the difference.

    Source: the sample-size formula of arXiv 2411.00640: (z_0.975 + z_0.8) * error.
    """
    return (Z_95 + Z_POWER) * error


def bootstrap_interval(
    change: Array, size: Array, *, seed: int = 0, rounds: int = ROUNDS
) -> Interval:
    """Of the ratio of sums: paired bootstrap over clusters, bias-corrected and accelerated (Efron,
    Better bootstrap confidence intervals, JASA 82, 1987), its levels expanded for small samples
    (``_reach``): without that 92 of 100 intervals held the truth where a few documents are long.
    """
    if len(change) < 2:
        return Interval(reason="one cluster has no interval")
    ratio = change.sum() / size.sum()
    without = (change.sum() - change) / (size.sum() - size)  # jackknife
    away = without.mean() - without
    if np.abs(away).max() <= EQUAL * max(np.abs(without).max(), abs(ratio)):
        return Interval(reason="all clusters changed alike: a bootstrap has nothing to vary")
    acceleration = float((away**3).sum() / (6 * (away**2).sum() ** 1.5))
    drawn = _resampled(change, size, seed, rounds)
    below = float((drawn < ratio).mean() + (drawn == ratio).mean() / 2)
    if not 0 < below < 1:
        return Interval(reason="too few clusters differ for an interval")
    bias = NORMAL.inv_cdf(below)
    reach = _reach(change - ratio * size)
    levels = [NORMAL.cdf(bias + z / (1 - acceleration * z)) for z in (bias - reach, bias + reach)]
    low, high = np.quantile(drawn, levels).tolist()
    return Interval(low, high)


def _reach(residual: Array) -> float:
    """What stands for the normal 1.96 of a 95 % interval of so many clusters.

    ``sqrt(C / (C - 1)) * t``: the expanded percentile interval of Hesterberg, arXiv 1411.5279, with
    Satterthwaite's degrees of freedom (Biometrics 2, 1946): 2 C / (kurtosis - 1), fewer than C
    where few clusters make most of the variance.
    """
    count = len(residual)
    squares = residual**2
    kurtosis = count * float(squares @ squares) / float(squares.sum()) ** 2
    freedom = min(count - 1, int(2 * count / max(kurtosis - 1, 1e-3)))
    return math.sqrt(count / (count - 1)) * student_t(max(1, freedom))


def _resampled(change: Array, size: Array, seed: int, rounds: int) -> Array:
    """The ratio of each of ``rounds`` samples of clusters with replacement."""
    generator, count = np.random.default_rng(seed), len(change)
    drawn = []
    for some in _portions(rounds, count):
        chosen = generator.integers(0, count, (some, count))
        drawn.append(change[chosen].sum(axis=1) / size[chosen].sum(axis=1))
    return np.concatenate(drawn)


def _portions(rounds: int, count: int) -> Iterator[int]:
    most = max(1, AT_ONCE // count)
    while rounds > 0:
        yield min(most, rounds)
        rounds -= most


def sign_flip_p(change: Array, *, seed: int = 0, rounds: int = ROUNDS) -> float:
    """Two-sided p of no difference: how often random signs of the clusters' changes sum to as much.

    Source: permutation test, (1 + hits) / (1 + rounds) of Phipson and Smyth, arXiv 1603.05766.
    """
    generator, hits = np.random.default_rng(seed), 0
    observed = abs(float(change.sum())) * (1 - EQUAL)
    for some in _portions(rounds, len(change)):
        signs = 2.0 * generator.integers(0, 2, (some, len(change))) - 1
        hits += int((np.abs(signs @ change) >= observed).sum())
    return (1 + hits) / (1 + rounds)


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Exact two-sided p that A and B are equally often right, by the items that one of them alone
    has right. Not for items in clusters. Source: McNemar, Psychometrika 12 (1947)."""
    total, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(total, k) for k in range(fewer + 1))
    return float(min(1.0, 2 * (tail / 2**total)))


def holm(values: Sequence[float]) -> list[float]:
    """p values adjusted for being several: any of them below 0.05 by chance has 5 % at most.
    Source: Holm, Scandinavian Journal of Statistics 6 (1979)."""
    adjusted, largest = [0.0] * len(values), 0.0
    for rank, i in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, min(1.0, (len(values) - rank) * values[i]))
        adjusted[i] = largest
    return adjusted


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a share, ``total`` >= 1. Source: Wilson, JASA 22 (1927)."""
    share, z = right / total, Z_95
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z * z / (4 * total**2))
    return max(0.0, centre - half), min(1.0, centre + half)
