"""Pure functions from raw samples to the figures of ``metrics.json``. A figure without samples is None, never 0."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

PERCENTILES = (50, 90, 95, 99)


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


def summary(name: str, values: Iterable[float]) -> dict[str, float | None]:
    """``{mean,median,std,p50,p90,p95,p99}_<name>`` of the samples; ``name`` ends with the unit. An array is not taken apart."""
    import numpy as np  # here: submit, status, sweep and compare do without it

    samples = values if isinstance(values, np.ndarray) else np.fromiter(values, np.float64)
    names = [f"{kind}_{name}" for kind in ("mean", "median", "std", *(f"p{p}" for p in PERCENTILES))]
    if not len(samples):
        return dict.fromkeys(names)
    deviation = float(samples.std(ddof=1, dtype=np.float64)) if len(samples) > 1 else None
    middle, *tail = np.percentile(samples, (50, *PERCENTILES)).tolist()
    return dict(zip(names, [float(samples.mean(dtype=np.float64)), middle, deviation, *tail], strict=True))


def rate(count: float, seconds: float) -> float | None:
    return count / seconds if seconds > 0 else None


def perplexity(loss_nats: float) -> float | None:
    """exp of a mean negative log-likelihood; None where it overflows."""
    return math.exp(loss_nats) if loss_nats < 700 else None


def bits_per_byte(nll_sum_nats: float, num_bytes: int) -> float | None:
    """Negative log-likelihood of a text in bits, over its UTF-8 bytes: comparable across tokenizers."""
    return nll_sum_nats / (math.log(2) * num_bytes) if num_bytes else None
