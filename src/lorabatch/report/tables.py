"""Tables as pure functions of the records: one row a quantity, one column a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from lorabatch.errors import visible
from lorabatch.measure.statistics import PERCENTILES
from lorabatch.report.blocks import Cell, Mono, Table
from lorabatch.report.load import Bench, InferRun, Run, TrainRun
from lorabatch.report.words import Words
from lorabatch.settings import Settings

Show = Callable[[Any], Cell]  # a run -> its cell
TRAIN_METRICS = {
    "steps": "",
    "train_s": "s",
    "p50_step_ms": "ms",
    "p95_step_ms": "ms",
    "steps_per_min": "steps/min",
    "tokens_per_s": "tokens/s",
    "total_tokens": "",
    "target_tokens": "",
    "loss": "nats/token",
    "eval_loss_before": "nats/token",
    "eval_loss": "nats/token",
    "perplexity": "",
    "bits_per_byte_before": "bits/byte",
    "bits_per_byte": "bits/byte",
    "best_step": "",
}
INFER_METRICS = {
    "iterations": "",
    "completed": "",
    "failed": "",
    "total_input_tokens": "",
    "total_output_tokens": "",
    "startup_s": "s",
    "duration_s": "s",
    "output_throughput": "tokens/s",
    "tokens_per_s_including_startup": "tokens/s",
    "total_token_throughput": "tokens/s",
    "request_throughput": "requests/s",
    "prefill_tokens_per_s": "tokens/s",
    "decode_tokens_per_s": "tokens/s",
    "mean_running": "",
    "max_running": "",
}
LATENCIES = ("queue_ms", "ttft_ms", "tpot_ms", "itl_ms", "e2el_ms")
MACHINE_METRICS = {
    "peak_memory_bytes": "bytes",
    "max_pss_bytes": "bytes",
    "cpu_percent": "%",
    "cpu_wait_percent": "%",
    "throttled_share": "share",
    "cpu_energy_j": "J",
    "read_bytes_per_s": "bytes/s",
    "write_bytes_per_s": "bytes/s",
    "disk_read_bytes_per_s": "bytes/s",
    "disk_write_bytes_per_s": "bytes/s",
    "sampler_cpu_s": "s",
}
GPU_METRICS = {  # one row where no run measured any of them
    "gpu_util_percent": "%",
    "gpu_sm_active_percent": "%",
    "gpu_tensor_active_percent": "%",
    "gpu_dram_active_percent": "%",
    "max_gpu_memory_bytes": "bytes",
    "gpu_power_w": "W",
    "energy_j": "J",
    "gpu_sm_mhz": "MHz",
    "gpu_pcie_rx_bytes_per_s": "bytes/s",
    "gpu_pcie_tx_bytes_per_s": "bytes/s",
}
PHASES = ("import_s", "tokenise_s", "load_s", "loop_s", "save_s")
DATA_COUNTS = ("documents_read", "documents", "split", "cut", "dropped", "tokens", "target_tokens", "median_tokens", "longest_tokens")


def run_table(
    words: Words, runs: Sequence[Run], rows: Sequence[tuple[str, Show]], *, head: str = "quantity", numeric: bool = True
) -> Table:
    body: list[list[Cell]] = [[name, *(show(run) for run in runs)] for name, show in rows]
    return Table([words(head), *(run.label for run in runs)], body, numeric)


def metric(words: Words, name: str, unit: str) -> Show:
    return lambda run: words.quantity(run.metric(name), unit)


def metric_rows(words: Words, metrics: dict[str, str]) -> list[tuple[str, Show]]:
    return [(words(name), metric(words, name, unit)) for name, unit in metrics.items()]


def overview(words: Words, runs: Sequence[Run]) -> Table:
    def shown(value: object) -> str:
        return words("unknown") if value is None else str(value)

    def moment(run: Run, name: str) -> str:
        return shown(run.record.get(name)).replace("T", " ").replace("+00:00", " UTC")

    rows: list[tuple[str, Show]] = [
        (words("kind"), lambda run: words(run.record["kind"])),
        (words("status"), lambda run: status(words, run)),
        (words("host"), lambda run: shown(run.environment.get("host"))),
        (words("started"), lambda run: moment(run, "started_at")),
        (words("finished"), lambda run: moment(run, "finished_at")),
        (words("folder"), lambda run: Mono(visible(str(run.path)))),
    ]
    return run_table(words, runs, rows, numeric=False)


def status(words: Words, run: Run) -> str:
    known = ("completed", "failed", "interrupted", "running")
    return words(f"{run.status}_status") if run.status in known else run.status


def environment(words: Words, runs: Sequence[Run]) -> Table:
    """One column for each distinct environment, headed by the runs that share it."""

    def rows(run: Run) -> list[tuple[str, Cell]]:
        env, record = run.environment, run.record
        text = {k: words("unknown") if env.get(k) is None else str(env[k]) for k in ("host", "os", "cpu", "python")}
        cores = words("cores_value", usable=env.get("usable_cores", "?"), logical=env.get("logical_cores", "?"))
        gpu = record.get("gpu") or {}
        parts = {k: record.get(k) for k in ("dtype", "device", "threads", "backend")}
        ran = words("execution_value", **parts) if all(v is not None for v in parts.values()) else words("unknown")
        slurm = ", ".join(f"{k} {v}" for k, v in (env.get("slurm") or {}).items())
        return [
            (words("host"), text["host"]),
            (words("os"), text["os"]),
            (words("cpu"), text["cpu"]),
            (words("cores"), cores),
            (words("memory"), words.quantity(env.get("memory_bytes"), "bytes")),
            (words("gpu"), _gpu(words, gpu) if gpu else words("no_gpu")),
            (words("execution"), ran),
            ("Python", text["python"]),
            *((name, version or words("unknown")) for name, version in (env.get("packages") or {}).items()),
            (words("commit"), _commit(words, env.get("git"))),
            (words("slurm"), slurm or words("no_slurm")),
        ]

    columns: dict[tuple[tuple[str, Cell], ...], list[str]] = {}
    for run in runs:
        columns.setdefault(tuple(rows(run)), []).append(run.label)
    names = list(dict.fromkeys(name for column in columns for name, _ in column))
    body: list[list[Cell]] = [[name, *(dict(column).get(name, words("unknown")) for column in columns)] for name in names]
    return Table([words("quantity"), *(", ".join(labels) for labels in columns.values())], body, numeric=False)


def _gpu(words: Words, gpu: dict[str, Any]) -> str:
    memory = words.quantity(gpu.get("memory_bytes"), "bytes")
    return f"{gpu.get('name')}, {memory}, compute capability {gpu.get('capability')}, CUDA {gpu.get('cuda')}"


def _commit(words: Words, git: dict[str, Any] | None) -> Cell:
    if not git:
        return words("no_commit")
    return words("dirty", commit=git["commit"]) if git.get("dirty") else Mono(git["commit"])


def settings(words: Words, runs: Sequence[Run], config_class: type[Settings]) -> Table:
    """Settings that differ from their default in some run; a value that does is strong."""
    defaults = config_class().to_dict()
    known = [*defaults, *dict.fromkeys(name for run in runs for name in run.config if name not in defaults)]
    names = [name for name in known if any(name not in run.config or run.config[name] != defaults.get(name, run) for run in runs)]

    def cell(values: dict[str, Any], name: str) -> Cell:
        if name not in values:
            return words("unknown")
        value, strong = values[name], name not in defaults or values[name] != defaults[name]
        if value is None or value == []:
            return Mono(words("not_set"), strong) if strong else words("not_set")
        if isinstance(value, bool):
            return Mono(str(value).lower(), strong)
        return Mono(" ".join(str(v) for v in value) if isinstance(value, list) else str(value), strong)

    rows: list[list[Cell]] = [[Mono(name), cell(defaults, name), *(cell(run.config, name) for run in runs)] for name in names]
    return Table([words("setting"), words("default"), *(run.label for run in runs)], rows, numeric=False)


def data(words: Words, runs: Sequence[TrainRun]) -> Table | None:
    parts = [
        (words(f"{part}_part", run=run.label), record)
        for run in runs
        for part in ("train", "val")
        if (record := (run.record.get("data") or {}).get(part))
    ]
    if not parts:
        return None
    rows: list[list[Cell]] = [[words(name), *(words.number(record.get(name)) for _, record in parts)] for name in DATA_COUNTS]
    return Table([words("quantity"), *(head for head, _ in parts)], rows)


def training(words: Words, runs: Sequence[TrainRun]) -> Table:
    def epoch(run: TrainRun) -> str:
        """Measured where an epoch was completed, else what one takes at the run's own rate, and said to be so."""
        measured, spent, steps = (run.metric(name) for name in ("epoch_s", "train_s", "steps"))
        documents = ((run.record.get("data") or {}).get("train") or {}).get("documents")
        per_step = (run.config.get("batch_size") or 0) * (run.config.get("grad_accum_steps") or 0)
        if measured is not None or not spent or not steps or not documents or not per_step:
            return words.quantity(measured, "s")
        whole = math.ceil(documents / per_step) * spent / steps
        return words("epoch_estimate", time=words.quantity(whole, "s"))

    rows = metric_rows(words, TRAIN_METRICS)
    return run_table(words, runs, [*rows[:2], (words("epoch_s"), epoch), *rows[2:]])


def inference(words: Words, runs: Sequence[InferRun]) -> Table:
    def reasons(run: InferRun) -> str:
        counts = [sum(c.finish_reason == reason for c in run.completions) for reason in ("stop", "length")]
        return " / ".join(words.number(count) for count in counts)

    return run_table(words, runs, [*metric_rows(words, INFER_METRICS), (words("finish_reasons"), reasons)])


def latency(words: Words, runs: Sequence[InferRun]) -> Table:
    """One row a latency and run, one column a percentile."""

    def row(run: InferRun, name: str, metric: str) -> list[Cell]:
        head = f"{name}, {run.label}" if len(runs) > 1 else name
        return [head, *(words.quantity(run.metric(metric.format(p=p)), "ms") for p in PERCENTILES)]

    rows = [row(run, words(name), f"p{{p}}_{name}") for name in LATENCIES for run in runs]
    rows += [
        [*cells[:2], words("not_applicable"), cells[3], words("not_applicable")]  # of a few repetitions only two are recorded
        for cells in (row(run, words("batch_latency"), "batch_latency_p{p}_ms") for run in runs)
    ]
    return Table([words("latency"), *(f"p{p}" for p in PERCENTILES)], rows)


def efficiency(words: Words, runs: Sequence[Run], *, grid_g_per_kwh: float) -> Table:
    """Shares always beside what they are shares of; a dash where a quantity does not exist for a kind of run."""

    def of_ceiling(achieved: float | None, ceiling: float | None, unit: str) -> str:
        if achieved is None or not ceiling:
            return words("not_measured")
        share = words.quantity(achieved / ceiling, "share")
        return words("share_of", value=words.quantity(achieved, unit), ceiling=words.quantity(ceiling, unit), share=share)

    def arithmetic(run: Run) -> str:
        return of_ceiling(run.achieved_flops_per_s, run.metric("cold_flops_per_s"), "flop/s")

    def memory(run: Run) -> str:
        if not isinstance(run, InferRun):
            return words("not_applicable")
        share, ceiling = run.metric("mbu"), run.metric("measured_bytes_per_s")
        return of_ceiling(None if share is None or ceiling is None else share * ceiling, ceiling, "bytes/s")

    def padding(run: Run) -> str:
        return words.quantity(run.metric("padding_share"), "share") if isinstance(run, TrainRun) else words("not_applicable")

    def co2e(run: Run) -> str:
        joules = [value for name in ("energy_j", "cpu_energy_j") if (value := run.metric(name)) is not None]
        return words.quantity(sum(joules) / 3.6e6 * grid_g_per_kwh if joules else None, "g")

    measured = any(run.metric(name) is not None for run in runs for name in GPU_METRICS)
    rows = [
        (words("arithmetic"), arithmetic),
        (words("mbu"), memory),
        (words("padding_share"), padding),
        *metric_rows(words, MACHINE_METRICS),
        *(metric_rows(words, GPU_METRICS) if measured else [(words("gpu_figures"), lambda run: words("not_measured"))]),
        (words("co2e"), co2e),
    ]
    return run_table(words, runs, rows)


def phases(words: Words, runs: Sequence[TrainRun]) -> Table:
    def seconds(name: str) -> Show:
        return lambda run: words.quantity(((run.metrics or {}).get("phases") or {}).get(name), "s")

    return run_table(words, runs, [(words(name), seconds(name)) for name in PHASES], head="phase")


def inference_phases(words: Words, runs: Sequence[InferRun]) -> Table:
    def rest(run: Run) -> str:
        whole, *parts = (run.metric(name) for name in ("duration_s", "prefill_s", "decode_s"))
        return words.quantity(None if whole is None or None in parts else whole - sum(p for p in parts if p is not None), "s")

    rows = [(words("startup_phase"), metric(words, "startup_s", "s")), *metric_rows(words, {"prefill_s": "s", "decode_s": "s"})]
    return run_table(words, runs, [*rows, (words("rest_s"), rest)], head="phase_infer")


def sweep(words: Words, bench: Bench) -> list[Table]:
    """Medians with their intervals; for threads what Karp and Flatt make of them, and a table of work that grows with the threads."""

    def table(metric: str, head: str, last: Callable[[dict[str, Any]], list[Cell]], *heads: str) -> Table:
        first = bench.points[0][metric].get("median")
        rows: list[list[Cell]] = []
        for point in bench.points:
            rate, low, high = point[metric].get("median"), point[metric].get("low"), point[metric].get("high")
            interval = words("not_applicable") if low is None or high is None else f"{words.number(low)} … {words.number(high)}"
            times = words("not_applicable") if rate is None or not first else words.number(rate / first)
            rows.append([words.number(point[bench.sweep]), words.quantity(rate, "tokens/s"), interval, times, *last(point)])
        return Table([words(f"level_{bench.sweep}"), words(head), words("sweep_interval"), words("sweep_speedup"), *heads], rows)

    def duration(point: dict[str, Any]) -> list[Cell]:
        of = next((point[name].get("median") for name in ("batch_latency_ms", "step_ms") if point.get(name)), None)
        return [words.quantity(of, "ms")]

    serial = bench.record.get("karp_flatt") or {}
    if bench.sweep == "batch_size":
        return [table("tokens_per_s", "sweep_rate", duration, words("sweep_latency"))]

    def karp_flatt(point: dict[str, Any]) -> list[Cell]:
        level = point[bench.sweep]
        return [words("not_applicable") if level == 1 else words.quantity(serial.get(str(level)), "share")]

    tables = [table("tokens_per_s", "sweep_rate", karp_flatt, words("sweep_karp_flatt"))]
    grown = all(point.get("weak_tokens_per_s") for point in bench.points)
    return [*tables, table("weak_tokens_per_s", "sweep_weak_rate", lambda p: [])] if grown else tables


def failures(words: Words, failed: Sequence[tuple[str, str, str]]) -> Table:
    """(run, request, error) triples."""
    return Table([words("run"), words("id"), words("error")], [[run, Mono(id), error] for run, id, error in failed], numeric=False)
