"""``lorabatch COMMAND``: parse, validate, run, and turn errors into one line and an exit code."""

from __future__ import annotations

import io
import os
import sys
import textwrap

from lorabatch import __version__
from lorabatch.command_line import parse
from lorabatch.config import (
    CompletionConfig,
    DoctorConfig,
    ExportConfig,
    FetchConfig,
    InferConfig,
    InitConfig,
    MergeConfig,
    ReportConfig,
    SchemaConfig,
    StageConfig,
    StatusConfig,
    SubmitConfig,
    SweepConfig,
    TrainConfig,
)
from lorabatch.config_chat import ChatConfig
from lorabatch.config_measure import (
    BenchInferConfig,
    BenchMachineConfig,
    BenchTrainConfig,
    CompareConfig,
    ProfileInferConfig,
    ProfileTrainConfig,
)
from lorabatch.config_trust import CheckConfig, EvalConfig, SplitConfig
from lorabatch.errors import LorabatchError, UnavailableError, UsageError, nearest
from lorabatch.settings import Settings

# Name -> (its settings, the function that runs it: ``(config, command) -> exit code``). Functions
# stand here by name, so that ``--help`` loads none of them.
COMMANDS: dict[str, tuple[type[Settings], str]] = {
    "check": (CheckConfig, "lorabatch.check.run:run_check"),
    "split": (SplitConfig, "lorabatch.check.split:run_split"),
    "train": (TrainConfig, "lorabatch.train.run:run_training"),
    "infer": (InferConfig, "lorabatch.cluster.shards:run_infer"),
    "eval": (EvalConfig, "lorabatch.evaluate.run:run_eval"),
    "chat": (ChatConfig, "lorabatch.infer.chat:run_chat"),
    "report": (ReportConfig, "lorabatch.report.build:run_report"),
    "merge": (MergeConfig, "lorabatch.model.export:run_merge"),
    "export": (ExportConfig, "lorabatch.report.export:run_export"),
    "fetch": (FetchConfig, "lorabatch.model.fetch:run_fetch"),
    "stage": (StageConfig, "lorabatch.model.fetch:run_stage"),
    "sweep": (SweepConfig, "lorabatch.cluster.sweep:run_sweep"),
    "init": (InitConfig, "lorabatch.starter:run_init"),
    "submit": (SubmitConfig, "lorabatch.cluster.submit:run_submit"),
    "status": (StatusConfig, "lorabatch.cluster.status:run_status"),
    "doctor": (DoctorConfig, "lorabatch.cluster.doctor:run_doctor"),
    "completion": (CompletionConfig, "lorabatch.editors:run_completion"),
    "schema": (SchemaConfig, "lorabatch.editors:run_schema"),
    "compare": (CompareConfig, "lorabatch.bench.compare:run_compare"),
    "profile train": (ProfileTrainConfig, "lorabatch.profile.run:run_profile_train"),
    "profile infer": (ProfileInferConfig, "lorabatch.profile.run:run_profile_infer"),
    "bench machine": (BenchMachineConfig, "lorabatch.bench.machine:run_bench_machine"),
    "bench train": (BenchTrainConfig, "lorabatch.bench.train:run_bench_train"),
    "bench infer": (BenchInferConfig, "lorabatch.bench.infer:run_bench_infer"),
}
GROUPS = {name.split()[0] for name in COMMANDS if " " in name}  # commands of two words


class _Output:
    """A stream that writes into nothing once its reader has left (``| head -1``): the run is worth
    more than its output."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._leave()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._leave()

    def _leave(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def _outlive_readers() -> None:
    """No reader that leaves, and no character that the terminal's encoding lacks, ends a
    command."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # not None (closed), nor what a test put there
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, _Output(stream))


def usage(group: str = "") -> str:
    """All commands, or those of a group."""
    lines = [
        f"lorabatch {__version__}: LoRA fine-tuning and batched inference",
        "",
        f"usage: lorabatch {f'{group} WHAT' if group else 'COMMAND'} [flags]",
        "",
    ]
    lines += [
        _entry(name, config.__doc__ or "")
        for name, (config, _) in COMMANDS.items()
        if not group or name.startswith(f"{group} ")
    ]
    return "\n".join(
        [
            *lines,
            "",
            "lorabatch COMMAND --help lists its flags. Exit codes: 0 done, 64 usage, 65 bad data,",
            (
                "69 something needed is missing, 70 failed, 75 stopped with everything saved: run "
                "again."
            ),
        ]
    )


def _entry(name: str, about: str) -> str:
    """What a command does, beside its name."""
    head, indent = f"  {name:14} ", " " * 17
    text = " ".join(about.split())
    return textwrap.fill(text, 100, initial_indent=head, subsequent_indent=indent)


def main(argv: list[str] | None = None) -> int:
    """Entry point of the ``lorabatch`` command. Returns the exit code."""
    _outlive_readers()
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 64
    if argv[0] == "--version":
        print(__version__)
        return 0
    count = 2 if argv[0] in GROUPS else 1
    if count == 2 and argv[1:] in ([], ["-h"], ["--help"]):
        print(usage(argv[0]))
        return 0 if argv[1:] else 64
    name = " ".join(argv[:count])
    if name not in COMMANDS:
        print(
            f"lorabatch: {UsageError(f'unknown command {name!r}', fix=nearest(name, COMMANDS))}",
            file=sys.stderr,
        )
        return 64
    return run_command(name, argv[count:])


def run_command(name: str, argv: list[str], *, prog: str | None = None) -> int:
    """One command with the errors handled; also behind ``src/train_lora.py`` and
    ``src/infer_batch.py``."""
    _outlive_readers()
    config_class, function = COMMANDS[name]
    try:
        config = parse(config_class, argv, prog=prog or f"lorabatch {name}")
        # before the slow part, and without ctypes where nobody asked
        if "LORABATCH_KERNELS" in os.environ:
            from lorabatch import kernels

            kernels.check()
        from pkgutil import resolve_name  # not in the time of --help

        run = resolve_name(function)
        return int(run(config, [prog or "lorabatch", *name.split(), *argv]))
    except KeyboardInterrupt:
        print(f"lorabatch {name}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if "--debug" in argv:
            raise
        shown = _as_one_line(error)
        print(f"lorabatch {name}: {shown}", file=sys.stderr)
        return shown.exit_code


def _as_one_line(error: Exception) -> LorabatchError:
    """What the user is told of an error: our own text, the system's refusal where nothing nearer
    has its own text for it, or a fault of ours."""
    if isinstance(error, LorabatchError):
        return error
    if isinstance(error, OSError) and error.filename:
        return UnavailableError(
            str(error.strerror),
            where=error.filename,
            fix="check the path, its permissions and the free space",
        )
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return LorabatchError(
        f"unforeseen {what}",
        fix="this is a fault of lorabatch: run again with --debug to see where",
    )
