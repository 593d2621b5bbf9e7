"""``lorabatch profile``: where the time of a short run goes, by phase, by kind of operation inside it, and by operator.

Spans are put around functions from outside, for this command only: the hot path of a normal run carries nothing. They
cover the whole run; torch.profiler records a few steps of it, after others that warm up. torch sees nothing of what goes
on in our C++ kernels, so on CPUs their calls are timed here, and the recorded program times its own operations.
"""

from __future__ import annotations

import ctypes
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

from lorabatch import processor
from lorabatch.config import ProfileInferConfig, ProfileTrainConfig
from lorabatch.measure.explain import ONCE, Facts, explain
from lorabatch.records import read_json, write_json

WARM_STEPS = 2
STEP = "step"  # the span whose end is one step of the profiler's schedule
FORWARD = "prefill or decode"  # which of the two the segments say
WHOLE = "evaluate"  # what goes on inside it is part of it: a forward pass of training is another thing
SPANS: dict[str, dict[str, tuple[str, ...]]] = {
    "train": {
        "read data": ("lorabatch.train.run:read_documents",),
        "load": ("lorabatch.model.load:load_model",),
        "tokenise": ("lorabatch.train.run:tokenise",),
        STEP: ("lorabatch.train.loop:train_step",),
        "pack": ("lorabatch.train.batches:pack",),
        "forward": ("lorabatch.model.native:NativeModel.loss_sum", "lorabatch.model.hf:HfModel.loss_sum"),
        "backward": ("torch:Tensor.backward",),
        "optimiser": ("torch.optim:AdamW.step",),
        WHOLE: ("lorabatch.train.loop:evaluate",),
        "save": ("lorabatch.train.saver:Saver.save_adapter", "lorabatch.train.checkpoint:write"),
    },
    "infer": {
        "load": ("lorabatch.infer.runner:load_model",),
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
PASSES = "lorabatch.model.fused:Passes"
OPERATIONS = {  # on CPUs, where a call returns when it is done
    "products": tuple(
        f"lorabatch.model.{owner}.{method}"
        for owner in ("linear:Prepacked", "linear:Dense", "panels:Panels", "quantised:_Rebuilt", "sharded:Sharded")
        for method in ("forward", "input_grad")
    ),
    "adapters": (f"{PASSES}.lora", f"{PASSES}.lora_grad"),
    "attention": (f"{PASSES}.attend", f"{PASSES}.attend_grad"),
    "norms": (f"{PASSES}.norm", f"{PASSES}.norm_grad"),
    "activation": (f"{PASSES}.swiglu", f"{PASSES}.swiglu_grad"),
    "loss": (f"{PASSES}.loss_rows",),
}
PROGRAM = "lorabatch.infer.program:Program"


@dataclass
class Spans:
    """Seconds of each span without those inside it, counts, and memory at each end. Main thread only."""

    self_s: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    inside: dict[str, dict[str, float]] = field(default_factory=dict)  # span -> kind of operation -> seconds, part of the span's own
    memory: list[tuple[float, str, int]] = field(default_factory=list)  # (seconds since start, span, bytes)
    start_s: float = field(default_factory=time.perf_counter)
    _open: list[str] = field(default_factory=list)
    _inner_s: list[float] = field(default_factory=lambda: [0.0])

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        import torch

        if threading.current_thread() is not threading.main_thread() or WHOLE in self._open:
            yield
            return
        begin = time.perf_counter()
        self._open.append(name)
        self._inner_s.append(0.0)
        try:
            with torch.profiler.record_function(f"lorabatch: {name}"):
                yield
        finally:
            now = time.perf_counter()
            self._open.pop()
            self.self_s[name] = self.self_s.get(name, 0.0) + now - begin - self._inner_s.pop()
            self.calls[name] = self.calls.get(name, 0) + 1
            self._inner_s[-1] += now - begin
            self.memory.append((round(now - self.start_s, 3), name, memory_bytes()))

    def add(self, operation: str, seconds: float) -> None:
        """Seconds of an operation inside the innermost span."""
        if self._open and seconds:
            kinds = self.inside.setdefault(self._open[-1], {})
            kinds[operation] = kinds.get(operation, 0.0) + seconds

    def forget(self) -> None:
        """What was so far counts as start-up, but for what happens once."""
        self.self_s = {name: seconds for name, seconds in self.self_s.items() if name in ONCE}
        self.calls = {name: count for name, count in self.calls.items() if name in ONCE}
        self.inside = {}

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
def wrapped(wrappers: Mapping[str, Callable[[Callable[..., Any]], Callable[..., Any]]]) -> Iterator[None]:
    """Each function ``place`` is replaced by ``wrappers[place](function)`` meanwhile."""
    undo: list[tuple[Any, str, Any]] = []
    try:
        for place, wrap in wrappers.items():
            owner, attribute = resolve(place)
            original = getattr(owner, attribute)
            undo.append((owner, attribute, original))
            setattr(owner, attribute, functools.wraps(original)(wrap(original)))
        yield
    finally:
        for owner, attribute, original in reversed(undo):
            setattr(owner, attribute, original)


def resolve(place: str) -> tuple[Any, str]:
    """``module:Class.method`` -> (class, "method")."""
    module, _, path = place.partition(":")
    *classes, attribute = path.split(".")
    return functools.reduce(getattr, classes, importlib.import_module(module)), attribute


def wrappers(kind: str, spans: Spans, on_step: Callable[[], None], *, synchronous: bool) -> Mapping[str, Callable[..., Any]]:
    """What ``wrapped`` puts around which function; operations are timed where their calls are ``synchronous``."""
    found = {place: functools.partial(_in_span, name, spans, on_step) for name, places in SPANS[kind].items() for place in places}
    if synchronous:
        found |= {place: functools.partial(_timed, name, spans) for name, places in OPERATIONS.items() for place in places}
        found |= {f"{PROGRAM}._call": functools.partial(_self_timed, spans)} if kind == "infer" else {}
    return found


def _in_span(name: str, spans: Spans, on_step: Callable[[], None], original: Callable[..., Any]) -> Callable[..., Any]:
    def run(*values: Any, **named: Any) -> Any:
        with spans.span(_prefill_or_decode(values[1]) if name == FORWARD else name):
            result = original(*values, **named)
        if name == STEP:
            on_step()
        return result

    return run


def _prefill_or_decode(segments: Any) -> str:
    """Tokens of a completion are all wanted, those that speculation guessed too; of a prompt's at most the last."""
    return "prefill" if any(len(segment.token_ids) > segment.num_logits for segment in segments) else "decode"


def _timed(name: str, spans: Spans, original: Callable[..., Any]) -> Callable[..., Any]:
    from torch.profiler import record_function

    def run(*values: Any, **named: Any) -> Any:
        start = time.perf_counter()
        with record_function(f"lorabatch: {name}"):
            result = original(*values, **named)
        spans.add(name, time.perf_counter() - start)
        return result

    return run


def _self_timed(spans: Spans, original: Callable[..., Any]) -> Callable[..., Any]:
    """A call of the recorded program, whose operations add up their own seconds."""
    program = importlib.import_module("lorabatch.infer.program")  # of a higher layer, and only looked at

    def run(self: Any, operations: Any) -> None:
        self.seconds = (ctypes.c_double * len(program.OPERATIONS))()
        original(self, operations)
        for name, seconds in zip(program.OPERATIONS, self.seconds, strict=True):
            spans.add(name, seconds)

    return run


def profile_run(kind: str, run: Callable[[], int], config: ProfileTrainConfig | ProfileInferConfig, *, run_folder: Path) -> int:
    """Run once under spans and profiler; write trace, operators, phases and the summary into the configuration's folder."""
    folder = Path(config.profile_dir)
    folder.mkdir(parents=True, exist_ok=True)
    import torch
    from torch.profiler import ProfilerActivity, profile, schedule

    gpu = torch.cuda.is_available() and not config.no_cuda
    traced: dict[str, Any] = {}

    def keep(profiler: Any) -> None:
        profiler.export_chrome_trace(str(folder / "trace.json.gz"))
        traced["operators"] = profiler.key_averages()

    def on_step() -> None:
        profiler.step()
        if kind == "train" and profiler.step_num == WARM_STEPS:  # weights are packed for the backward pass, memory is taken
            spans.forget()

    spans = Spans()
    plan = schedule(wait=0, warmup=WARM_STEPS, active=config.profile_steps, repeat=1)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if gpu else [])
    with (
        profile(activities=activities, schedule=plan, on_trace_ready=keep) as profiler,
        wrapped(wrappers(kind, spans, on_step, synchronous=not gpu)),
    ):
        code = run()
    phases = spans.phases()
    record, metrics = (read_json(run_folder / name) for name in ("run.json", "metrics.json"))
    lines = explain(Facts(kind, phases, spans.calls, spans.inside, record, metrics, frozenset(processor.native_types())))
    figures = {"phases": phases, "calls": spans.calls, "inside": spans.inside, "memory": spans.memory, "summary": lines}
    write_json(folder / "profile.json", {"schema_version": 1, "kind": f"profile {kind}", **figures})
    if traced:
        sort = "self_cuda_time_total" if gpu else "self_cpu_time_total"
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
