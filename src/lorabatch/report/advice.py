"""What a good administrator would say after a look at the job's figures: a closed list, each from
the records.

The style is that of Princeton's jobstats: what was asked for, what was used, what to ask for next
time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

from lorabatch.machine.waits import DISTURBED, disturbed
from lorabatch.profile.explain import FEW_ROWS
from lorabatch.report.load import Bench, InferRun, Run, TrainRun
from lorabatch.report.words import Words

GIB = 2**30
ENOUGH_LEFT = 0.5  # less than this share of a request used: ask for less
TIGHT = 0.9
HEADROOM = 1.5  # of the memory used, in what we suggest to ask for
IDLE_GPU_PERCENT = 60
ENOUGH_OF_CEILING = 0.5
SHARE_WORTH_SAYING = 0.25
DRAINED = 0.7  # less than this share of the slots in use


def advice(words: Words, runs: Sequence[Run], benches: Sequence[Bench]) -> list[str]:
    found = [
        line
        for run in runs
        for line in (
            *_memory(words, run),
            *_cores(words, run),
            *_gpu(words, run),
            *_time(words, run),
        )
    ]
    return found + [line for bench in benches for line in _knee(words, bench)]


def _memory(words: Words, run: Run) -> Iterator[str]:
    used, asked = run.system.max_rss_bytes, requested_memory(run)
    if used is None or asked is None:
        return
    share = used / asked
    numbers = {
        "run": run.label,
        "share": words.quantity(share, "share"),
        "used": words.quantity(used, "bytes"),
    }
    numbers["asked"], suggested = (
        words.quantity(asked, "bytes"),
        max(1, math.ceil(used * HEADROOM / GIB)),
    )
    if share < ENOUGH_LEFT and suggested * GIB < asked:
        yield words("advice_memory", **numbers, suggested=suggested)
    elif share > TIGHT:
        yield words("advice_memory_tight", **numbers, suggested=suggested)


def requested_memory(run: Run) -> float | None:
    """Bytes that the job asked for: Slurm's figure (MB per node, or per core), else the control
    group's limit."""
    slurm = run.environment.get("slurm") or {}
    per_node, per_cpu, cpus = (
        _whole(slurm.get(name)) for name in ("mem_per_node", "mem_per_cpu", "cpus_per_task")
    )
    if per_node:
        return per_node * 2.0**20
    if per_cpu:
        return per_cpu * 2.0**20 * (cpus or 1)
    return run.system.cgroup_memory_bytes


def _whole(text: str | None) -> int | None:
    return int(text) if text and re.fullmatch("[0-9]{1,12}", text) else None


def _cores(words: Words, run: Run) -> Iterator[str]:
    used, waited = run.system.cpu_percent, run.system.cpu_wait_percent or 0
    cores = run.environment.get("usable_cores")
    if (
        used is not None
        and waited < DISTURBED * used
        and cores
        and used / 100 < ENOUGH_LEFT * cores
    ):
        suggested = max(1, math.ceil(used / 100))
        if suggested < cores:
            yield words(
                "advice_cores",
                run=run.label,
                used=words.number(used / 100),
                cores=cores,
                suggested=suggested,
            )
    throttled = run.system.throttled_share
    if throttled is not None and throttled > 0.05:
        yield words("advice_throttled", run=run.label, share=words.quantity(throttled, "share"))


def _gpu(words: Words, run: Run) -> Iterator[str]:
    busy = run.system.gpu_util_percent
    if busy is not None and busy < IDLE_GPU_PERCENT:
        way = "advice_gpu_train" if isinstance(run, TrainRun) else "advice_gpu_infer"
        yield words(way, run=run.label, idle=words.quantity(1 - busy / 100, "share"))
    for reason, share in (run.system.gpu_throttle_share or {}).items():
        if share > 0.05:
            yield words(
                "advice_slowed", run=run.label, reason=reason, share=words.quantity(share, "share")
            )


def _time(words: Words, run: Run) -> Iterator[str]:
    share = run.metrics.cold_share
    if share is not None and share > 1:
        yield words("advice_ceiling", run=run.label)
    elif share is not None and share < ENOUGH_OF_CEILING:
        yield words(
            "advice_slow",
            run=run.label,
            share=words.quantity(share, "share"),
            why=_why_slow(words, run),
        )
    if isinstance(run, TrainRun):
        yield from _training_time(words, run)
    if isinstance(run, InferRun):
        yield from _inference_time(words, run)


def _training_time(words: Words, run: TrainRun) -> Iterator[str]:
    loop_s, train_s = run.metrics.phases.loop_s, run.metrics.train_s
    if loop_s and train_s is not None:
        share = (loop_s - train_s) / loop_s
        if share > SHARE_WORTH_SAYING:
            shown = words.quantity(share, "share")
            yield words("advice_evaluation", run=run.label, share=shown)


def _inference_time(words: Words, run: InferRun) -> Iterator[str]:
    startup_s, duration_s = run.metrics.startup_s, run.metrics.duration_s
    if startup_s and duration_s:
        share = startup_s / (startup_s + duration_s)
        if share > SHARE_WORTH_SAYING:
            yield words("advice_startup", run=run.label, share=words.quantity(share, "share"))
    mean, most = run.metrics.mean_running, run.metrics.max_running
    if mean and most and mean / most < DRAINED:
        yield words(
            "advice_drained", run=run.label, mean=words.number(mean), most=words.number(most)
        )


def _why_slow(words: Words, run: Run) -> str:
    """What the records know of it."""
    command = "train" if isinstance(run, TrainRun) else "infer"
    return "; ".join(_causes(words, run)) or words("slow_unknown", command=command)


def _causes(words: Words, run: Run) -> Iterator[str]:
    kernels, waited = run.metrics.kernels, run.system.waited_share
    if kernels and kernels.better_variants and kernels.kernel_variant is None:
        why = dict.fromkeys(map(str, kernels.better_variants.values()))
        yield words("slow_kernels", why="; ".join(why))
    if disturbed(waited):
        yield words("slow_waited", share=words.quantity(waited, "share"))
    if isinstance(run, TrainRun):
        steps, tokens = run.metrics.steps, run.metrics.total_tokens
        if steps and tokens and tokens / steps < FEW_ROWS:
            yield words("slow_few_rows", rows=words.number(tokens / steps))


def _knee(words: Words, bench: Bench) -> Iterator[str]:
    levels = [point[bench.sweep] for point in bench.points]
    knee = bench.record.get("knee")
    if bench.sweep == "batch_size" and knee is not None:
        yield words(
            "advice_knee" if knee != levels[-1] else "advice_no_knee", run=bench.label, knee=knee
        )
    serial = bench.record.get("serial_share")
    if bench.sweep == "threads" and serial is not None:
        limit = words.number(1 / serial) if serial else words("unlimited")
        yield words(
            "advice_serial", run=bench.label, share=words.quantity(serial, "share"), limit=limit
        )
