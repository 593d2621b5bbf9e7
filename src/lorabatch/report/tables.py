"""Tables of what was measured, as pure functions of the records: one row a quantity, one column a
run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import TypeVar

from lorabatch.metrics.fields import Metric, Metrics
from lorabatch.metrics.schema import (
    TAIL,
    InferMetrics,
    SystemMetrics,
    TrainMetrics,
    TrainPhases,
)
from lorabatch.report.blocks import Cell, Mono, Table
from lorabatch.report.load import InferRun, Run, TrainRun
from lorabatch.report.words import Words

R = TypeVar("R", bound=Run)
Row = tuple[str, Callable[[R], Cell]]  # its name, a run -> its cell


def run_table(
    words: Words,
    runs: Sequence[R],
    rows: Sequence[Row[R]],
    *,
    head: str = "quantity",
    numeric: bool = True,
) -> Table:
    body: list[list[Cell]] = [[name, *(show(run) for run in runs)] for name, show in rows]
    return Table([words(head), *(run.label for run in runs)], body, numeric)


def metric_rows(
    words: Words, metrics: Sequence[Metric], record: Callable[[R], Metrics]
) -> list[Row[R]]:
    """``record``: of a run, where the metrics are."""

    def show(metric: Metric) -> Callable[[R], Cell]:
        return lambda run: words.quantity(metric.of(record(run)), metric.unit)

    return [(words(metric.name), show(metric)) for metric in metrics]


def _metrics(run: Run) -> Metrics:
    return run.metrics


def _system(run: Run) -> Metrics:
    return run.system


def training(words: Words, runs: Sequence[TrainRun]) -> Table:
    def epoch(run: TrainRun) -> str:
        """Measured where an epoch was completed, else what one takes at the run's own rate, and
        said to be so."""
        measured, train_s, steps = run.metrics.epoch_s, run.metrics.train_s, run.metrics.steps
        counts, config = run.data("train"), run.config
        documents = counts.documents if counts else None
        per_step = (config.get("batch_size") or 0) * (config.get("grad_accum_steps") or 0)
        if measured is not None or not train_s or not steps or not documents or not per_step:
            return words.quantity(measured, "s")
        whole = math.ceil(documents / per_step) * train_s / steps
        return words("epoch_estimate", time=words.quantity(whole, "s"))

    return run_table(
        words,
        runs,
        [
            *metric_rows(words, TrainMetrics.table("steps"), _metrics),
            (words("epoch_s"), epoch),
            *metric_rows(words, TrainMetrics.table("training"), _metrics),
        ],
    )


def inference(words: Words, runs: Sequence[InferRun]) -> Table:
    def reasons(run: InferRun) -> str:
        counts = [
            sum(c.finish_reason == reason for c in run.completions) for reason in ("stop", "length")
        ]
        return " / ".join(words.number(count) for count in counts)

    rows = metric_rows(words, InferMetrics.table("inference"), _metrics)
    return run_table(words, runs, [*rows, (words("finish_reasons"), reasons)])


def latency(words: Words, runs: Sequence[InferRun]) -> Table:
    """One row a latency and run, one column a percentile."""

    def row(head: str, run: InferRun, values: Iterable[float | None]) -> list[Cell]:
        head = f"{head}, {run.label}" if len(runs) > 1 else head
        return [head, *(words.quantity(value, "ms") for value in values)]

    rows = [
        row(words(name), run, [metric.of(run.metrics) for metric in percentiles])
        for name, found in groupby(InferMetrics.table("latency"), lambda metric: metric.field)
        for percentiles in [list(found)]
        for run in runs
    ]
    for run in runs:
        head, p50, p95 = row(
            words("batch_latency"),
            run,
            (run.metrics.batch_latency_p50_ms, run.metrics.batch_latency_p95_ms),
        )
        # of a few repetitions only two are recorded
        none = words("not_applicable")
        rows.append([head, p50, none, p95, none])
    return Table([words("latency"), *TAIL], rows)


def efficiency(words: Words, runs: Sequence[Run], *, grid_g_per_kwh: float) -> Table:
    """Shares always beside what they are shares of; a dash where a quantity does not exist for a
    kind of run."""

    def co2e(run: Run) -> str:
        energies = (run.system.energy_j, run.system.cpu_energy_j)
        joules = [energy for energy in energies if energy is not None]
        return words.quantity(sum(joules) / 3.6e6 * grid_g_per_kwh if joules else None, "g")

    return run_table(
        words,
        runs,
        [
            *_ceiling_rows(words),
            *metric_rows(words, TrainMetrics.table("memory"), _metrics),  # as in inference
            *metric_rows(words, SystemMetrics.table("machine"), _system),
            *_gpu_rows(words, runs),
            (words("co2e"), co2e),
        ],
    )


def _ceiling_rows(words: Words) -> list[Row[Run]]:
    def arithmetic(run: Run) -> str:
        return _of_ceiling(words, run.achieved_flops_per_s, run.metrics.cold_flops_per_s, "flop/s")

    def memory(run: Run) -> str:
        if not isinstance(run, InferRun):
            return words("not_applicable")
        share, ceiling = run.metrics.mbu, run.metrics.measured_bytes_per_s
        achieved = None if share is None or ceiling is None else share * ceiling
        return _of_ceiling(words, achieved, ceiling, "bytes/s")

    def padding(run: Run) -> str:
        if not isinstance(run, TrainRun):
            return words("not_applicable")
        return words.quantity(run.metrics.padding_share, "share")

    return [
        (words("arithmetic"), arithmetic),
        (words("mbu"), memory),
        (words("padding_share"), padding),
    ]


def _of_ceiling(words: Words, achieved: float | None, ceiling: float | None, unit: str) -> str:
    if achieved is None or not ceiling:
        return words("not_measured")
    return words(
        "share_of" if achieved <= ceiling else "share_above",
        value=words.quantity(achieved, unit),
        ceiling=words.quantity(ceiling, unit),
        share=words.quantity(achieved / ceiling, "share"),
    )


def _gpu_rows(words: Words, runs: Sequence[Run]) -> list[Row[Run]]:
    """One where no run measured any of them."""
    metrics = SystemMetrics.table("gpu")
    if all(metric.of(run.system) is None for run in runs for metric in metrics):
        return [(words("gpu_figures"), lambda run: words("not_measured"))]
    return metric_rows(words, metrics, _system)


def phases(words: Words, runs: Sequence[TrainRun]) -> Table:
    def recorded(run: TrainRun) -> Metrics:
        return run.metrics.phases

    rows = metric_rows(words, TrainPhases.table("phases"), recorded)
    return run_table(words, runs, rows, head="phase")


def inference_phases(words: Words, runs: Sequence[InferRun]) -> Table:
    def startup(run: InferRun) -> str:
        return words.quantity(run.metrics.startup_s, "s")

    def rest(run: InferRun) -> str:
        whole, prefill, decode = (
            run.metrics.duration_s,
            run.metrics.prefill_s,
            run.metrics.decode_s,
        )
        if whole is None or prefill is None or decode is None:
            return words("not_measured")
        return words.quantity(whole - (prefill + decode), "s")

    return run_table(
        words,
        runs,
        [
            (words("startup_phase"), startup),
            *metric_rows(words, InferMetrics.table("phases"), _metrics),
            (words("rest_s"), rest),
        ],
        head="phase_infer",
    )


def failures(words: Words, failed: Sequence[tuple[str, str, str]]) -> Table:
    """(run, request, error) triples."""
    return Table(
        [words("run"), words("id"), words("error")],
        [[run, Mono(id), error] for run, id, error in failed],
        numeric=False,
    )
