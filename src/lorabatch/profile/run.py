"""``lorabatch profile``: where the time of a short run goes, by phase, by kind of operation inside
it, and by operator.

Spans (``lorabatch.spans``) cover the whole run; torch.profiler records a few steps of it, after
others that warm up. torch sees nothing of what goes on in our C++ kernels, so on CPUs their calls
are timed here, and the recorded program times its own operations.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from lorabatch import processor
from lorabatch.config_measure import ProfileInferConfig, ProfileTrainConfig
from lorabatch.errors import LorabatchError, UsageError
from lorabatch.infer.run import run_inference
from lorabatch.profile.explain import ONCE, Facts, explain
from lorabatch.records import read_json, write_json
from lorabatch.spans import recording
from lorabatch.train.run import run_training

WARM_STEPS = 2
FILES = (
    ("trace.json.gz", "timeline: open it in ui.perfetto.dev or chrome://tracing"),
    ("operators.txt", "operators"),
    ("memory.svg", "memory"),
    ("profile.json", "all figures"),
)
STEP = "step"  # the span whose end is one step of the profiler's schedule
# what goes on inside it is part of it: a forward pass of training is another thing
WHOLE = "evaluate"


@dataclass
class Spans:
    """What ``lorabatch.spans`` tells: seconds of each span without those inside it, counts, and
    memory at each end. Main thread only.

    ``on_step`` is called at the end of each step. ``wait`` returns when the device has done all
    that it was given, so that a span has the time of its own work. ``synchronous``: a kernel's call
    returns when it is done, so operations are timed.
    """

    on_step: Callable[[], None] = lambda: None
    wait: Callable[[], None] = lambda: None
    synchronous: bool = True

    self_s: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    # span -> kind of operation -> seconds, part of the span's own
    inside: dict[str, dict[str, float]] = field(default_factory=dict)
    # (seconds since start, span, bytes)
    memory: list[tuple[float, str, int]] = field(default_factory=list)
    start_s: float = field(default_factory=time.perf_counter)
    _open: list[str] = field(default_factory=list)
    _inner_s: list[float] = field(default_factory=lambda: [0.0])

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        import torch

        if threading.current_thread() is not threading.main_thread() or WHOLE in self._open:
            yield
            return
        self.wait()
        begin = time.perf_counter()
        self._open.append(name)
        self._inner_s.append(0.0)
        try:
            with torch.profiler.record_function(f"lorabatch: {name}"):
                yield
                self.wait()
        finally:
            self._close(name, begin, time.perf_counter())
            if name == STEP:
                self.on_step()

    def _close(self, name: str, begin: float, now: float) -> None:
        self._open.pop()
        self.self_s[name] = self.self_s.get(name, 0.0) + now - begin - self._inner_s.pop()
        self.calls[name] = self.calls.get(name, 0) + 1
        self._inner_s[-1] += now - begin
        self.memory.append((round(now - self.start_s, 3), name, memory_bytes()))

    @contextmanager
    def operation(self, name: str) -> Iterator[None]:
        import torch

        start = time.perf_counter()
        with torch.profiler.record_function(f"lorabatch: {name}"):
            yield
        if self.synchronous:
            self.add(name, time.perf_counter() - start)

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
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf(
        "SC_PAGE_SIZE"
    )


def _refuse(config: ProfileTrainConfig | ProfileInferConfig, *names: str) -> None:
    for name in names:
        if getattr(config, name):
            raise UsageError("no run to profile", where=f"--{name}", fix="leave it out")


def run_profile_train(config: ProfileTrainConfig, command: list[str]) -> int:
    """A short run into a folder below the profile's own."""
    if config.jobs:
        raise UsageError(
            "profiles one run",
            where="--jobs",
            fix="leave it out, and give the settings of one of the runs as flags",
        )
    _refuse(config, "dry_run")
    folder = Path(config.profile_dir) / "run"
    short = replace(
        config,
        save_dir=str(folder),
        overwrite=True,
        data_checks="off",
        max_steps=config.max_steps or WARM_STEPS + config.profile_steps,
        max_val_documents=config.max_val_documents or 8,
    )
    return profile_run("train", lambda: run_training(short, command), config, run_folder=folder)


def run_profile_infer(config: ProfileInferConfig, command: list[str]) -> int:
    _refuse(config, "dry_run", "prompt")
    folder = Path(config.profile_dir) / "run"
    moved = replace(config, output_dir=str(folder), overwrite=True, resume=False)
    return profile_run("infer", lambda: run_inference(moved, command), config, run_folder=folder)


def profile_run(
    kind: str,
    run: Callable[[], int],
    config: ProfileTrainConfig | ProfileInferConfig,
    *,
    run_folder: Path,
) -> int:
    """Run once under spans and profiler; write trace, operators, phases and the summary into the
    configuration's folder."""
    folder = Path(config.profile_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name, _ in FILES:
        (folder / name).unlink(missing_ok=True)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler tells of itself below that
    import torch

    gpu = torch.cuda.is_available() and not config.no_cuda
    spans = Spans(synchronous=not gpu)
    if gpu:
        spans.wait = torch.cuda.synchronize
    with _own_flag():
        code = _recorded(kind, run, spans, folder, steps=config.profile_steps, gpu=gpu)
    phases = spans.phases()
    lines = explain(
        Facts(
            kind,
            phases,
            spans.calls,
            spans.inside,
            read_json(run_folder / "run.json"),
            read_json(run_folder / "metrics.json"),
            frozenset(processor.native_types()),
        )
    )
    figures = {
        "phases": phases,
        "calls": spans.calls,
        "inside": spans.inside,
        "memory": spans.memory,
        "summary": lines,
    }
    write_json(folder / "profile.json", {"schema_version": 1, "kind": f"profile {kind}", **figures})
    (folder / "summary.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw_memory(spans, folder / "memory.svg")
    print("\n" + "\n".join(lines))
    for name, what in FILES:
        if (folder / name).exists():
            print(f"  {folder / name}  {what}")
    if not (folder / FILES[0][0]).exists():
        print(f"no timeline, no operators: the run ended within its first {WARM_STEPS} steps")
    return code


@contextmanager
def _own_flag() -> Iterator[None]:
    """The run's folder lies in the profile's: advice about its flag is about ours."""
    try:
        yield
    except LorabatchError as error:
        fix = error.fix and re.sub("--(save|output)_dir", "--profile_dir", error.fix)
        raise type(error)(error.what, where=error.where, fix=fix) from None


def _recorded(
    kind: str, run: Callable[[], int], spans: Spans, folder: Path, *, steps: int, gpu: bool
) -> int:
    """The run's exit code. Its trace and its table of operators are in ``folder`` afterwards, if it
    came as far as the steps that are recorded."""
    from torch.profiler import ProfilerActivity, profile, schedule

    def keep(profiler: profile) -> None:
        profiler.export_chrome_trace(str(folder / "trace.json.gz"))
        sort = "self_device_time_total" if gpu else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=sort, row_limit=40)
        (folder / "operators.txt").write_text(table, encoding="utf-8")

    def on_step() -> None:
        profiler.step()
        # weights are packed for the backward pass, memory is taken
        if kind == "train" and profiler.step_num == WARM_STEPS:
            spans.forget()

    spans.on_step = on_step
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if gpu else [])
    plan = schedule(wait=0, warmup=WARM_STEPS, active=steps, repeat=1)
    with (
        profile(activities=activities, schedule=plan, on_trace_ready=keep) as profiler,
        recording(spans),
    ):
        return run()


def draw_memory(spans: Spans, path: Path) -> None:
    """Memory at the end of every span, coloured by span."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    panel = figure.subplots()
    panel.plot(
        [t for t, _, _ in spans.memory],
        [b / 2**30 for _, _, b in spans.memory],
        color="#999999",
        linewidth=0.8,
    )
    for i, name in enumerate(spans.self_s):
        points = [(t, b / 2**30) for t, span, b in spans.memory if span == name]
        panel.scatter(
            [t for t, _ in points],
            [b for _, b in points],
            s=9,
            color=f"C{i}",
            marker="osD^v*"[i % 6],
            label=name,
            zorder=2,
        )
    panel.set(xlabel="time since start (s)", ylabel="memory (GiB)", ylim=(0, None))
    figure.legend(loc="outside right", fontsize=8)
    figure.savefig(path, format="svg", metadata={"Date": None})
