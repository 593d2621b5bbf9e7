"""Every figure of ``metrics.json``, and of the data in ``run.json``, once: its name there, its
unit, the report's table that shows it.

Seconds, each under one name: ``train_s`` of optimiser steps alone; ``loop_s`` of the training loop,
evaluation and saving included; ``duration_s`` of generation, over all passes, or of merged shards
from the first process's start to the last one's end; ``processes_s`` of generation, summed over the
processes of merged shards; ``startup_s`` of all that a run does before its first pass. The order of
fields is the order of the rows in the report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lorabatch.metrics.fields import Metrics, fact, group, metric, nested, summary_of
from lorabatch.metrics.statistics import PERCENTILES, Summary
from lorabatch.schema import SCHEMA_VERSION, Record

TAIL = tuple(f"p{percent}" for percent in PERCENTILES)  # parts of a ``Summary``


@dataclass(frozen=True)
class KernelFacts(Metrics):
    """What explains a low share of the ceiling; None on GPUs."""

    kernel_variant: str | None = fact(str)
    better_variants: Mapping[str, object] | None = fact(dict)  # -> what each lacks
    native_types: Sequence[str] | None = fact(list)


@dataclass(frozen=True)
class TrainPhases(Metrics):
    """``save_s`` is part of ``loop_s``."""

    sparse = True

    import_s: float | None = metric("s", table="phases")
    tokenise_s: float | None = metric("s", table="phases")
    load_s: float | None = metric("s", table="phases")
    loop_s: float | None = metric("s", table="phases")
    save_s: float | None = metric("s", table="phases")


@dataclass(frozen=True)
class TrainMetrics(Metrics):
    """Of a training run. Evaluations are on the validation set: before, and the best of the run."""

    steps: int | None = metric(table="steps")
    train_s: float | None = metric("s", table="steps")
    epoch_s: float | None = metric("s")  # mean of those completed
    step_ms: Summary = summary_of("ms", "p50", "p95", table="training")
    steps_per_min: float | None = metric("steps/min", table="training")
    tokens_per_s: float | None = metric("tokens/s", table="training")
    total_tokens: int | None = metric(table="training")
    target_tokens: int | None = metric(table="training")
    loss: float | None = metric("nats/token", table="training")
    eval_loss_before: float | None = metric("nats/token", table="training")
    eval_loss: float | None = metric("nats/token", table="training")
    perplexity: float | None = metric(table="training")
    bits_per_byte_before: float | None = metric("bits/byte", table="training")
    bits_per_byte: float | None = metric("bits/byte", table="training")
    best_step: int | None = metric(table="training")
    planned_steps: int | None = metric()
    padding_share: float | None = metric("share")
    trainable_params: int | None = metric()
    base_params: int | None = metric()
    base_bytes: int | None = metric("bytes")
    trainable_share: float | None = metric("share")
    train_flops_per_s: float | None = metric("flop/s")
    cold_flops_per_s: float | None = metric("flop/s")  # the ceiling, with cold weights
    cold_share: float | None = metric("share")
    kernels: KernelFacts | None = group(KernelFacts)
    peak_memory_bytes: float | None = metric("bytes", table="memory")  # of the GPU, else process
    phases: TrainPhases = nested(TrainPhases)
    checkpoints: int | None = metric()
    checkpoint_bytes: int | None = metric("bytes")
    checkpoint_s: Summary = summary_of("s")
    resumed_step: int | None = metric()

    def to_dict(self) -> Record:
        return {"schema_version": SCHEMA_VERSION, "kind": "train", **super().to_dict()}


@dataclass(frozen=True)
class DataCounts(Metrics):
    """Of the training or the validation part of the data, in ``run.json``."""

    documents_read: int | None = metric(table="data")
    documents: int | None = metric(table="data")  # used
    split: int | None = metric(table="data")
    cut: int | None = metric(table="data")
    dropped: int | None = metric(table="data")
    tokens: int | None = metric(table="data")
    target_tokens: int | None = metric(table="data")  # those in the loss
    median_tokens: float | None = metric(table="data")  # of a document
    longest_tokens: int | None = metric(table="data")


@dataclass(frozen=True)
class InferStartup(Metrics):
    """Seconds of each phase before the first request can run; one that was not is left out."""

    sparse = True

    startup_check_s: float | None = metric("s")
    startup_load_s: float | None = metric("s")
    startup_tokenise_s: float | None = metric("s")
    startup_pack_s: float | None = metric("s")
    startup_warm_up_s: float | None = metric("s")


@dataclass(frozen=True)
class InferMetrics(Metrics):
    """Of a run of inference, or of merged shards: counts and times are sums over all measured
    passes, latencies are pooled."""

    iterations: int | None = metric(table="inference")  # passes
    completed: int | None = metric(table="inference")
    failed: int | None = metric(table="inference")
    not_finite: int | None = metric()  # of those that failed
    empty: int | None = metric(table="inference")  # of those completed
    total_input_tokens: int | None = metric(table="inference")
    total_output_tokens: int | None = metric(table="inference")
    startup_s: float | None = metric("s", table="inference", of="run")
    startup: InferStartup = group(InferStartup, InferStartup(), of="run")
    duration_s: float | None = metric("s", table="inference")
    processes_s: float | None = metric("s", of="shards")
    output_throughput: float | None = metric("tokens/s", table="inference")
    tokens_per_s: float | None = metric("tokens/s")  # the same, under the name it has in training
    tokens_per_s_including_startup: float | None = metric("tokens/s", table="inference", of="run")
    total_token_throughput: float | None = metric("tokens/s", table="inference")
    request_throughput: float | None = metric("requests/s", table="inference")
    prefill_tokens_per_s: float | None = metric("tokens/s", table="inference", of="run")
    decode_tokens_per_s: float | None = metric("tokens/s", table="inference", of="run")
    mean_running: float | None = metric(table="inference", of="run")
    max_running: int | None = metric(table="inference", of="run")
    queue_ms: Summary = summary_of("ms", *TAIL, table="latency")
    ttft_ms: Summary = summary_of("ms", *TAIL, table="latency")
    tpot_ms: Summary = summary_of("ms", *TAIL, table="latency")
    itl_ms: Summary = summary_of("ms", *TAIL, table="latency", of="run")
    e2el_ms: Summary = summary_of("ms", *TAIL, table="latency")
    batch_latency_p50_ms: float | None = metric("ms", of="run")
    batch_latency_p95_ms: float | None = metric("ms", of="run")
    # while requests wait: what is left free then is lost
    slots_used_while_waiting: float | None = metric("share", of="run")
    step_filled_while_waiting: float | None = metric("share", of="run")
    prefill_s: float | None = metric("s", table="phases", of="run")
    decode_s: float | None = metric("s", table="phases", of="run")
    decode_steps: int | None = metric(of="run")
    shared_prefix_tokens: int | None = metric(of="run")
    guessed_tokens: int | None = metric(of="run")
    accepted_tokens: int | None = metric(of="run")
    pass_tokens_per_s: Sequence[float | None] | None = fact(list, of="run")
    peak_memory_bytes: float | None = metric("bytes", table="memory", of="run")
    mbu: float | None = metric("share", of="run")  # bytes of decoding, of what memory could deliver
    decode_flops_per_s: float | None = metric("flop/s", of="run")
    measured_bytes_per_s: float | None = metric("bytes/s", of="run")  # the ceiling
    cold_flops_per_s: float | None = metric("flop/s", of="run")  # the ceiling, with cold weights
    cold_share: float | None = metric("share", of="run")  # of whichever of the two binds
    kernels: KernelFacts | None = group(KernelFacts, of="run")
    shards: int | None = metric(of="shards")
    quarantined: Sequence[str] | None = fact(list, of="shards")

    @property
    def scope(self) -> str:
        return "run" if self.shards is None else "shards"

    def to_dict(self) -> Record:
        return {"schema_version": SCHEMA_VERSION, "kind": "infer", **super().to_dict()}


@dataclass(frozen=True)
class SystemMetrics(Metrics):
    """What the machine did during a run: means over time, unless the name says otherwise."""

    max_pss_bytes: float | None = metric("bytes", table="machine")
    cpu_percent: float | None = metric("%", table="machine")  # of one core
    cpu_wait_percent: float | None = metric("%", table="machine")
    throttled_share: float | None = metric("share", table="machine")
    cpu_energy_j: float | None = metric("J", table="machine")  # of the node's processors
    read_bytes_per_s: float | None = metric("bytes/s", table="machine")
    write_bytes_per_s: float | None = metric("bytes/s", table="machine")
    disk_read_bytes_per_s: float | None = metric("bytes/s", table="machine")
    disk_write_bytes_per_s: float | None = metric("bytes/s", table="machine")
    sampler_cpu_s: float | None = metric("s", table="machine")
    gpu_util_percent: float | None = metric("%", table="gpu")
    gpu_sm_active_percent: float | None = metric("%", table="gpu")
    gpu_tensor_active_percent: float | None = metric("%", table="gpu")
    gpu_dram_active_percent: float | None = metric("%", table="gpu")
    max_gpu_memory_bytes: float | None = metric("bytes", table="gpu")
    gpu_power_w: float | None = metric("W", table="gpu")
    energy_j: float | None = metric("J", table="gpu")  # of the GPU
    gpu_sm_mhz: float | None = metric("MHz", table="gpu")
    gpu_pcie_rx_bytes_per_s: float | None = metric("bytes/s", table="gpu")
    gpu_pcie_tx_bytes_per_s: float | None = metric("bytes/s", table="gpu")
    cpu_power_w: float | None = metric("W")
    voluntary_switches_per_s: float | None = metric()
    involuntary_switches_per_s: float | None = metric()
    rss_bytes: float | None = metric("bytes")
    pss_bytes: float | None = metric("bytes")
    processes: float | None = metric()
    os_threads: float | None = metric()
    gpu_memory_bytes: float | None = metric("bytes")
    max_rss_bytes: float | None = metric("bytes")
    max_os_threads: float | None = metric()
    gpu_throttle_share: Mapping[str, float] | None = fact(dict)  # by reason
    missing: Mapping[str, str] | None = fact(dict)  # why a figure is None
    cgroup_memory_bytes: float | None = metric("bytes")
    cgroup_cores: float | None = metric()
    sampled_s: float | None = metric("s")

    @property
    def waited_share(self) -> float | None:
        """How long threads waited for a core, over how long they ran."""
        waited, ran = self.cpu_wait_percent, self.cpu_percent
        return waited / ran if waited is not None and ran else None
