"""Pure functions from raw samples to the figures of ``metrics.json``. A figure without samples is
None, never 0."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Summary:
    """Of samples in one unit; all None without any."""

    mean: float | None = None
    median: float | None = None
    std: float | None = None
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear interpolation between order statistics (numpy's default): p50 of [1, 2] is 1.5."""
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def standard_deviation(values: Sequence[float]) -> float | None:
    """Sample standard deviation (n - 1); None below two values."""
    centre = mean(values)
    if centre is None or len(values) < 2:
        return None
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1))


# by degrees of freedom, from one on
STUDENT_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


def student_t(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t, to four digits; ``freedom`` >= 1.

    Beyond the table the expansion around the normal quantile z. Source: Abramowitz and Stegun,
    26.7.5.
    """
    if freedom <= len(STUDENT_T):
        return STUDENT_T[freedom - 1]
    z, n = 1.959963985, freedom
    terms = (
        (z**3 + z) / (4 * n),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3),
    )
    return z + sum(terms)


def summary(values: Iterable[float]) -> Summary:
    """An array is not taken apart."""
    import numpy as np  # here: submit, status, sweep and compare do without it

    samples = values if isinstance(values, np.ndarray) else np.fromiter(values, np.float64)
    if not len(samples):
        return Summary()
    deviation = float(samples.std(ddof=1, dtype=np.float64)) if len(samples) > 1 else None
    middle, *tail = np.percentile(samples, (50, *PERCENTILES)).tolist()
    return Summary(float(samples.mean(dtype=np.float64)), middle, deviation, *tail)


def rate(count: float, seconds: float) -> float | None:
    return count / seconds if seconds > 0 else None


def perplexity(loss_nats: float) -> float | None:
    """exp of a mean negative log-likelihood; None where it overflows."""
    return math.exp(loss_nats) if loss_nats < 700 else None


def bits_per_byte(nll_sum_nats: float, num_bytes: int) -> float | None:
    """Negative log-likelihood of a text in bits, over its UTF-8 bytes: comparable across
    tokenizers."""
    return nll_sum_nats / (math.log(2) * num_bytes) if num_bytes else None
