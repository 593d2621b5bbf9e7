"""The figures of inference from the times of its requests: one formula each, for a run and for
merged shards.

TTFT: from submission to the first token. E2EL: from submission to the last one. TPOT: between these
two, a token after the first. ITL: each single gap between tokens, which only the run itself sees.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lorabatch.metrics.schema import InferMetrics
from lorabatch.metrics.statistics import Summary, rate, summary
from lorabatch.schema import Fields

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def milliseconds(submitted_s: float, at_s: float) -> float:
    """From a request's submission: of its start in the queue, its first token in TTFT, its last one
    in E2EL."""
    return (at_s - submitted_s) * 1e3


def tpot_ms(*, ttft_ms: float | None, e2el_ms: float | None, output_tokens: int) -> float | None:
    """None below two tokens, and where a time was not recorded."""
    if ttft_ms is None or e2el_ms is None or output_tokens < 2:
        return None
    return (e2el_ms - ttft_ms) / (output_tokens - 1)


@dataclass(frozen=True)
class Times:
    """Of one finished request, in milliseconds from its submission; None: not recorded."""

    queue_ms: float | None
    ttft_ms: float | None
    e2el_ms: float | None


class Latencies:
    """The finished requests of one pass over the work: milliseconds in compact arrays, and counts.

    typecode: of ``array``: "f" for times that were just measured, "d" for those of records.
    """

    def __init__(self, typecode: Literal["f", "d"] = "f") -> None:
        self.typecode: Literal["f", "d"] = typecode
        self.queue_ms: array[float] = array(typecode)
        self.ttft_ms: array[float] = array(typecode)
        self.tpot_ms: array[float] = array(typecode)
        self.e2el_ms: array[float] = array(typecode)
        self.completed = self.input_tokens = self.output_tokens = 0

    def add(self, times: Times, *, input_tokens: int, output_tokens: int) -> None:
        tpot = tpot_ms(ttft_ms=times.ttft_ms, e2el_ms=times.e2el_ms, output_tokens=output_tokens)
        for values, ms in (
            (self.queue_ms, times.queue_ms),
            (self.ttft_ms, times.ttft_ms),
            (self.tpot_ms, tpot),
            (self.e2el_ms, times.e2el_ms),
        ):
            if ms is not None:
                values.append(ms)
        self.completed += 1
        self.input_tokens += input_tokens
        self.output_tokens += output_tokens


def pooled(arrays: Iterable[array[float]], typecode: str = "f") -> NDArray[np.floating]:
    """The values of all, as one type."""
    import numpy as np  # here: submit, status, sweep and compare do without it

    return np.concatenate([np.empty(0, typecode), *(np.asarray(a, typecode) for a in arrays)])


def infer_metrics(
    passes: Sequence[Latencies], *, iterations: int, duration_s: float, counts: Fields
) -> InferMetrics:
    """What follows from the requests alone. ``counts``: of ``sink.Tally``."""
    completed = sum(p.completed for p in passes)
    tokens_in, tokens_out = (
        sum(p.input_tokens for p in passes),
        sum(p.output_tokens for p in passes),
    )

    def of(name: str) -> Summary:
        typecode = passes[0].typecode if passes else "f"
        return summary(pooled([getattr(p, name) for p in passes], typecode))

    return InferMetrics(
        iterations=iterations,
        duration_s=duration_s,
        completed=completed,
        **counts,
        total_input_tokens=tokens_in,
        total_output_tokens=tokens_out,
        request_throughput=rate(completed, duration_s),
        output_throughput=rate(tokens_out, duration_s),
        total_token_throughput=rate(tokens_in + tokens_out, duration_s),
        tokens_per_s=rate(tokens_out, duration_s),
        queue_ms=of("queue_ms"),
        ttft_ms=of("ttft_ms"),
        tpot_ms=of("tpot_ms"),
        e2el_ms=of("e2el_ms"),
    )
