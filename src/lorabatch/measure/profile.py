"""``lorabatch profile``: where the time of a short run goes, by phase and by operator, and what to change first.

Spans are put around functions from outside, for this command only: the hot path of a normal run carries nothing. They
cover the whole run; torch.profiler records a few steps of it, after others that warm up.
"""

from __future__ import annotations

import functools
import importlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorabatch.records import read_json, write_json

WARM_STEPS = 2
STEP = "step"  # the span whose end is one step of the profiler's schedule
FORWARD = "prefill or decode"  # which of the two the segments say
SPANS: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "read data": ("lorabatch.train.run:read_documents",),
        "load": ("lorabatch.model.load:load_model",),
        "tokenise": ("lorabatch.corpus.tokens:tokenise",),
        STEP: ("lorabatch.train.loop:train_step",),
        "pack": ("lorabatch.train.evaluate:pack",),
        "forward": ("lorabatch.model.native:NativeModel.loss_sum", "lorabatch.model.hf:HfModel.loss_sum"),
        "backward": ("torch:Tensor.backward",),
        "optimiser": ("torch.optim:AdamW.step",),
        "evaluate": ("lorabatch.train.loop:evaluate",),
        "save": ("lorabatch.train.saver:Saver.save_adapter", "lorabatch.train.checkpoint:write"),
    },
    "infer": {
        "load": ("lorabatch.model.load:load_model",),
        "tokenise": ("lorabatch.infer.feed:prepare",),
        STEP: ("lorabatch.infer.engine:Engine._step",),
        FORWARD: tuple(
            f"lorabatch.{runner}.forward" for runner in ("infer.runner:ProgramRunner", "infer.runner:NativeRunner", "model.hf:HfRunner")
        ),
        "choose token": ("lorabatch.infer.engine:choose",),
        "text": ("lorabatch.infer.engine:Engine._text",),
        "write": ("lorabatch.records:JsonlWriter.write",),
    },
}
ONCE = ("outside spans", "read data", "tokenise", "load")  # start-up: a profile is short, so its share says nothing
GROUPS = (  # of operators, by what their names contain; the first that fits
    ("own kernels and plain Python", ("lorabatch: ",)),
    ("matrix products", ("mm", "linear", "conv", "AdaptedProduct", "FrozenProduct")),
    ("attention", ("attention", "flash", "softmax")),
    ("copies and type conversions", ("copy", "cat", "clone", "to_", "::to", "contiguous", "index", "gather", "fill", "zero")),
    ("optimiser", ("adam",)),
    ("element-wise and norms", ("mul", "add", "sub", "div", "sum", "mean", "pow", "sqrt", "silu", "gelu", "sigmoid", "exp", "norm", "neg")),
)
ADVICE = {  # phase -> what to change if it costs much
    "evaluate": "evaluate less often (--eval_every_steps) or on fewer documents (--max_val_documents)",
    "backward": "larger blocks keep the products busy (--block_tokens), a smaller rank makes the adapters cheaper (--lora_r)",
    "forward": "larger blocks keep the products busy (--block_tokens); --dtype bf16 where the processor has it",
    "optimiser": "more documents per update (--grad_accum_steps), or adapters on fewer layers (--target_modules attn)",
    "save": "save and evaluate less often (--eval_every_steps)",
    "prefill": "shorter prompts, or more of them at once (--prefill_tokens)",
    "decode": "more requests at once share each read of the weights (--batch_size; lorabatch bench infer finds the knee)",
    "choose token": "output head and sampling: greedy decoding (--temperature 0) and fewer filters cost less",
}


@dataclass
class Spans:
    """Seconds of each span without those inside it, counts, and memory at each end. Main thread only."""

    self_s: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    memory: list[tuple[float, str, int]] = field(default_factory=list)  # (seconds since start, span, bytes)
    start_s: float = field(default_factory=time.perf_counter)
    _inner_s: list[float] = field(default_factory=lambda: [0.0])

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        import torch

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        begin = time.perf_counter()
        self._inner_s.append(0.0)
        try:
            with torch.profiler.record_function(f"lorabatch: {name}"):
                yield
        finally:
            now = time.perf_counter()
            self.self_s[name] = self.self_s.get(name, 0.0) + now - begin - self._inner_s.pop()
            self.calls[name] = self.calls.get(name, 0) + 1
            self._inner_s[-1] += now - begin
            self.memory.append((round(now - self.start_s, 3), name, memory_bytes()))

    def phases(self) -> dict[str, float]:
        """Seconds by phase; together they are the whole time since the start."""
        total = time.perf_counter() - self.start_s
        return {**self.self_s, "outside spans": total - sum(self.self_s.values())}


def memory_bytes() -> int:
    """What is in use now: on the GPU where one is used, else resident memory of the process."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.memory_allocated())
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def wrapped(targets: Mapping[str, tuple[str, ...]], spans: Spans, on_step: Callable[[], None]) -> Iterator[None]:
    """Every function of ``targets`` runs inside its span meanwhile."""
    undo: list[tuple[Any, str, Any]] = []
    try:
        for name, places in targets.items():
            for place in places:
                owner, attribute = resolve(place)
                original = getattr(owner, attribute)
                undo.append((owner, attribute, original))
                setattr(owner, attribute, _in_span(name, original, spans, on_step if name == STEP else None))
        yield
    finally:
        for owner, attribute, original in reversed(undo):
            setattr(owner, attribute, original)


def resolve(place: str) -> tuple[Any, str]:
    """``module:Class.method`` -> (class, "method")."""
    module, _, path = place.partition(":")
    *classes, attribute = path.split(".")
    return functools.reduce(getattr, classes, importlib.import_module(module)), attribute


def _in_span(name: str, original: Callable[..., Any], spans: Spans, on_end: Callable[[], None] | None) -> Callable[..., Any]:
    @functools.wraps(original)
    def run(*values: Any, **named: Any) -> Any:
        with spans.span(_prefill_or_decode(values[1]) if name == FORWARD else name):
            result = original(*values, **named)
        if on_end:
            on_end()
        return result

    return run


def _prefill_or_decode(segments: Any) -> str:
    return "prefill" if any(len(segment.token_ids) > 1 for segment in segments) else "decode"


def profile_run(kind: str, run: Callable[[], int], *, folder: Path, run_folder: Path, steps: int) -> int:
    """Run once under spans and profiler; write trace, operators, phases and the summary into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    import torch
    from torch.profiler import ProfilerActivity, profile, schedule

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    traced: dict[str, Any] = {}

    def keep(profiler: Any) -> None:
        profiler.export_chrome_trace(str(folder / "trace.json.gz"))
        traced["operators"] = profiler.key_averages()

    spans = Spans()
    plan = schedule(wait=0, warmup=WARM_STEPS, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=keep) as profiler, wrapped(SPANS[kind], spans, profiler.step):
        code = run()
    phases = spans.phases()
    operators = operator_seconds(traced.get("operators") or [])
    metrics = read_json(run_folder / "metrics.json")
    lines = summary(kind, phases, operators, metrics)
    write_json(
        folder / "profile.json",
        {
            "schema_version": 1,
            "kind": f"profile {kind}",
            "phases": phases,
            "calls": spans.calls,
            "operators": operators,
            "memory": spans.memory,
            "summary": lines,
        },
    )
    if traced:
        sort = "self_cuda_time_total" if len(activities) > 1 else "self_cpu_time_total"
        (folder / "operators.txt").write_text(traced["operators"].table(sort_by=sort, row_limit=40), encoding="utf-8")
    (folder / "summary.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw_memory(spans, folder / "memory.svg")
    print("\n" + "\n".join(lines))
    for name, what in (
        ("trace.json.gz", "timeline: open it in ui.perfetto.dev or chrome://tracing"),
        ("operators.txt", "operators"),
        ("memory.svg", "memory"),
        ("profile.json", "all figures"),
    ):
        print(f"  {folder / name}  {what}")
    return code


def operator_seconds(averages: Any) -> dict[str, float]:
    """Seconds inside each operator itself, largest first; device time where a device was used.

    A span's own seconds are those of our C++ kernels, which torch does not see, and of Python.
    """
    found: dict[str, float] = {}
    for event in averages:
        if not event.key.startswith("ProfilerStep"):
            found[event.key] = (getattr(event, "self_device_time_total", 0) or event.self_cpu_time_total) / 1e6
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def grouped(operators: Mapping[str, float]) -> dict[str, float]:
    groups = {name: 0.0 for name, _ in GROUPS} | {"everything else": 0.0}
    for key, seconds in operators.items():
        name = next((name for name, words in GROUPS if any(word in key for word in words)), "everything else")
        groups[name] += seconds
    return dict(sorted(groups.items(), key=lambda item: -item[1]))


def summary(kind: str, phases: Mapping[str, float], operators: Mapping[str, float], metrics: Mapping[str, Any]) -> list[str]:
    """Plain language: the largest costs, how far from the machine's limit, and the two changes that could bring most."""
    total = sum(phases.values())
    ordered = sorted(phases.items(), key=lambda item: -item[1])
    lines = [f"{total:.1f} s in all; most of it in:"]
    lines += [f"  {name:14}{seconds:8.2f} s  {seconds / total:6.1%}" for name, seconds in ordered[:6] if seconds > 0]
    inside = sum(operators.values())
    if inside:
        lines.append("of the profiled steps, by operator:")
        lines += [f"  {name:28}{seconds / inside:6.1%}" for name, seconds in grouped(operators).items() if seconds > 0]
    limits = {
        "train": ("mfu", "measured_flops_per_s", "arithmetic", 1e9, "Gflop/s"),
        "infer": ("mbu", "measured_bytes_per_s", "memory reads in decode", 1e9, "GB/s"),
    }
    share, ceiling, what, scale, unit = limits[kind]
    if metrics.get(share) is not None:
        peak = metrics[ceiling] / scale
        lines.append(
            f"{what}: {metrics[share] * peak:.1f} of {peak:.1f} {unit} measured on this machine ({metrics[share]:.0%}, slowed by profiling)"
        )
    once = sum(phases.get(name, 0.0) for name in ONCE)
    lines.append(f"start-up: {once:.1f} s, paid once per process: put more work into one run")
    lines.append("what to change first:")
    worth = [(seconds, name) for name, seconds in ordered if name in ADVICE][:2]
    return lines + [f"  {i}. {ADVICE[name]} [{name}: {seconds:.2f} s, {seconds / total:.0%}]" for i, (seconds, name) in enumerate(worth, 1)]


def draw_memory(spans: Spans, path: Path) -> None:
    """Memory at the end of every span, coloured by span."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    panel = figure.subplots()
    panel.plot([t for t, _, _ in spans.memory], [b / 2**30 for _, _, b in spans.memory], color="#999999", linewidth=0.8)
    for i, name in enumerate(spans.self_s):
        points = [(t, b / 2**30) for t, span, b in spans.memory if span == name]
        panel.scatter([t for t, _ in points], [b for _, b in points], s=9, color=f"C{i}", marker="osD^v*"[i % 6], label=name, zorder=2)
    panel.set(xlabel="time since start (s)", ylabel="memory (GiB)", ylim=(0, None))
    figure.legend(loc="outside right", fontsize=8)
    figure.savefig(path, format="svg", metadata={"Date": None})
