"""Repeated measurements and what may be concluded from them. Pure: ``lorabatch bench`` and
``compare`` build on it.

Rules of Hoefler and Belli, SC'15 (doi 10.1145/2807591.2807644): medians with nonparametric
intervals instead of means and assumed normality, absolute values beside every ratio, "faster" only
where the intervals do not overlap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from lorabatch.errors import DataError
from lorabatch.machine.environment import environment
from lorabatch.machine.waits import disturbed
from lorabatch.metrics.statistics import mean, percentile
from lorabatch.records import read_json, utc_now
from lorabatch.schema import SCHEMA_VERSION, Fields, Record

CONFIDENCE = 0.95
ESTIMATES = ("tokens_per_s", "weak_tokens_per_s", "batch_latency_ms", "step_ms")
CONCLUSIONS = {
    "batch_size": ("knee",),
    "threads": ("serial_share", "karp_flatt", "weak_serial_share"),
}
# a step up is worth it while it brings at least half of its share: doubling brings 1.5 times
WORTH_IT = 0.5


class Estimate(TypedDict):
    """Of a median: its interval and the coverage of that, None where there are too few values."""

    median: float | None
    low: float | None
    high: float | None
    coverage: float | None
    values: list[float]


def median_interval(
    values: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float, float] | None:
    """(low, high, coverage): order statistics that hold the median of any distribution with at
    least ``confidence``.

    The k-th smallest and the k-th largest miss it when fewer than k of n fair coins fall on one
    side. None below six values: even their extremes hold it with less than 95 %.
    """
    ordered, n = sorted(values), len(values)
    best = None
    for k in range(1, n // 2 + 1):
        coverage = 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n
        if coverage < confidence:
            break
        best = (ordered[k - 1], ordered[n - k], coverage)
    return best


def estimate(values: Sequence[float]) -> Estimate:
    low, high, coverage = median_interval(values) or (None, None, None)
    return {
        "median": percentile(values, 50),
        "low": low,
        "high": high,
        "coverage": coverage,
        "values": list(values),
    }


def alternating(levels: Sequence[int], repetitions: int) -> Iterator[int]:
    """1 2 3, 3 2 1, 1 2 3, …: a slow drift of the machine meets every level alike."""
    for repetition in range(repetitions):
        yield from levels if repetition % 2 == 0 else reversed(levels)


def sweep(
    name: str,
    levels: Sequence[int],
    repetitions: int,
    measure: Callable[[int], Mapping[str, float | None]],
) -> list[Record]:
    """Points ``{name: level, metric: estimate}``; ``measure(level)`` gives the metrics of one
    repetition, warmed up before."""
    taken: dict[int, list[Mapping[str, float | None]]] = {level: [] for level in levels}
    for level in alternating(levels, repetitions):
        taken[level].append(measure(level))
    return [
        {
            name: level,
            **{
                metric: estimate([v for r in rows if (v := r[metric]) is not None])
                for metric in rows[0]
            },
        }
        for level, rows in taken.items()
    ]


def serial_share(workers: Sequence[int], seconds: Sequence[float]) -> float | None:
    """Amdahl's s of t(p) = t(1) (s + (1 - s) / p): least squares of t on 1/p, kept within 0 and 1.
    None below two p."""
    if len(set(workers)) < 2:
        return None
    xs = [1 / p for p in workers]
    x_mean, t_mean = mean(xs) or 0.0, mean(seconds) or 0.0
    slope = math.fsum(
        (x - x_mean) * (t - t_mean) for x, t in zip(xs, seconds, strict=True)
    ) / math.fsum((x - x_mean) ** 2 for x in xs)
    constant = t_mean - slope * x_mean
    return min(1.0, max(0.0, constant / (constant + slope)))


def weak_serial_share(workers: Sequence[int], speedups: Sequence[float]) -> float | None:
    """Gustafson's s of a scaled speedup S(p) = p - s (p - 1): least squares, kept within 0 and 1.
    None below two p.

    speedups: work done per second by p workers on p times the work, over that of one worker on one
    share.
    """
    weight = sum((p - 1) ** 2 for p in workers)
    if not weight:
        return None
    return min(
        1.0,
        max(
            0.0,
            math.fsum((p - s) * (p - 1) for p, s in zip(workers, speedups, strict=True)) / weight,
        ),
    )


def karp_flatt(speedup: float, workers: int) -> float | None:
    """Experimentally determined serial share, (1/S - 1/p) / (1 - 1/p): a rise with p is overhead.
    None for one worker."""
    return (1 / speedup - 1 / workers) / (1 - 1 / workers) if workers > 1 else None


def knee(levels: Sequence[int], rates: Sequence[float]) -> int | None:
    """The level after which a step up stops paying (WORTH_IT); levels ascend. None without two
    levels."""
    if len(levels) < 2:
        return None
    for (level, rate), (above, rate_above) in zip(
        zip(levels, rates, strict=True), zip(levels[1:], rates[1:], strict=True), strict=False
    ):
        if rate_above / rate - 1 < WORTH_IT * (above / level - 1):
            return level
    return levels[-1]


def no_conclusion(name: str, points: Sequence[Fields]) -> str | None:
    """Why nothing may be concluded from a sweep; None where it may. What ``verdict`` asks of two
    estimates is asked of every level."""
    fewest = min(
        len(e["values"])
        for p in points
        for e in (p["tokens_per_s"], p.get("weak_tokens_per_s"))
        if e is not None
    )
    if median_interval([0.0] * fewest) is None:
        return f"too few values to say ({fewest} of a level, six are the least)"
    waited = [
        f"{p[name]} ({p['waited_share']:.0%})" for p in points if disturbed(p.get("waited_share"))
    ]
    return (
        (
            f"the levels {', '.join(waited)} waited for cores (of the time computed): measure "
            "again on a quiet machine"
        )
        if waited
        else None
    )


def bench_record(
    kind: str, name: str, points: Sequence[Fields], *, command: Sequence[str], **facts: object
) -> Record:
    """What ``lorabatch bench`` writes and ``report`` and ``compare`` read.

    kind: ``bench train`` or ``bench infer``; name: what was swept, ``batch_size`` or ``threads``;
    points: of ``sweep``, each with ``tokens_per_s``, with threads also ``weak_tokens_per_s``;
    facts: config, model, device, dtype, threads. What may not be concluded is None, and
    ``no_conclusion`` says why.
    """
    why_not = no_conclusion(name, points)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "sweep": name,
        "measured_at": utc_now(),
        "command": list(command),
        "environment": environment(),
        **facts,
        "no_conclusion": why_not,
        **(dict.fromkeys(CONCLUSIONS[name]) if why_not else _concluded(name, points)),
        "points": [dict(p) for p in points],
    }


def _concluded(name: str, points: Sequence[Fields]) -> Record:
    """The knee of a sweep over batch sizes, the serial shares of one over numbers of threads."""
    if name == "batch_size":
        sizes, medians = zip(*((p[name], p["tokens_per_s"]["median"]) for p in points), strict=True)
        return {"knee": knee(sizes, medians)}
    rates = {p["threads"]: p["tokens_per_s"]["median"] for p in points}
    weak = {p["threads"]: p["weak_tokens_per_s"]["median"] for p in points}
    levels, base, weak_base = list(rates), rates.get(1), weak.get(1)
    return {
        "serial_share": serial_share(levels, [1 / rate for rate in rates.values()]),
        "karp_flatt": _shares_of_levels(rates, base) if base else None,
        "weak_serial_share": weak_serial_share(levels, [weak[p] / weak_base for p in levels])
        if weak_base
        else None,
    }


def _shares_of_levels(rates: Mapping[int, float], base: float) -> dict[int, float | None]:
    return {p: karp_flatt(rate / base, p) for p, rate in rates.items()}


def read_bench(path: Path) -> Record:
    """What ``bench_record`` made. DataError for another file, and for estimates that are not those
    of their own values."""
    fix = "give run folders and files that lorabatch bench train or infer wrote"
    record = read_json(path, "bench", fix=fix)
    if not record["points"]:
        raise DataError(
            "not a file that lorabatch bench train or infer wrote: 'points' is empty",
            where=path,
            fix=fix,
        )
    for point in record["points"]:
        if point.get(record["sweep"]) is None:
            raise DataError(f"a point has no '{record['sweep']}'", where=path, fix=fix)
        for name in ESTIMATES:
            if point.get(name) is not None and not _holds(point[name]):
                raise DataError(
                    f"'{name}' at {point[record['sweep']]} is not what its values give",
                    where=path,
                    fix="measure again",
                )
    return record


def _holds(found: Fields) -> bool:
    """Whether an estimate is that of its own values."""
    expected: Fields = estimate(found["values"])
    return all(_same(found.get(name), expected[name]) for name in ("median", "low", "high"))


def _same(a: float | None, b: float | None) -> bool:
    return a == b if a is None or b is None else math.isclose(a, b, rel_tol=1e-9)


def verdict(a: Fields, b: Fields) -> str:
    """For two estimates of a rate: ``faster``, ``slower`` (b than a), ``overlap``, ``too few``
    values to say, or ``waited``: one of them had to wait for cores, so that neither its rate nor
    their ratio is the program's. ``waited_share`` of each, where it is known.
    """
    if a["low"] is None or b["low"] is None:
        return "too few"
    if any(disturbed(rate.get("waited_share")) for rate in (a, b)):
        return "waited"
    if b["low"] > a["high"]:
        return "faster"
    return "slower" if b["high"] < a["low"] else "overlap"
