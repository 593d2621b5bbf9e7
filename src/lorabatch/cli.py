"""``lorabatch COMMAND``: parse, validate, run, and turn errors into one line and an exit code."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lorabatch import __version__
from lorabatch.config import (
    BenchInferConfig,
    BenchMachineConfig,
    BenchTrainConfig,
    CompareConfig,
    DoctorConfig,
    FetchConfig,
    InferConfig,
    MergeConfig,
    ProfileInferConfig,
    ProfileTrainConfig,
    ReportConfig,
    StageConfig,
    StatusConfig,
    SubmitConfig,
    SweepConfig,
    TrainConfig,
)
from lorabatch.errors import LorabatchError, UnavailableError, UsageError, nearest
from lorabatch.settings import Settings, parse


def _train(config: TrainConfig, extras: dict[str, Any], command: list[str]) -> int:
    from lorabatch.train.run import run_training

    return run_training(config, command)


def _infer(config: InferConfig, extras: dict[str, Any], command: list[str]) -> int:
    if config.shards is not None:
        from lorabatch.cluster.shards import run_sharded

        return run_sharded(config, command)
    from lorabatch.infer.run import run_inference

    return run_inference(config, command)


def _merge(config: MergeConfig, extras: dict[str, Any], command: list[str]) -> int:
    from lorabatch.model.merge import merge_to_folder

    print(merge_to_folder(config))
    return 0


def _fetch(config: FetchConfig, extras: dict[str, Any], command: list[str]) -> int:
    from lorabatch import hub

    hub.prepare_environment()
    source = hub.fetch(extras["name"], to=Path(config.to) if config.to else None, revision=config.revision, offline=config.offline)
    if config.verify:
        files, size = hub.verify(source.path)
        print(f"{files} files, {size / 1e6:.1f} MB, all as they were fetched")
    print(f"{source.name}: {source.path}" + (f" (revision {source.revision})" if source.revision else ""))
    return 0


def _stage(config: StageConfig, extras: dict[str, Any], command: list[str]) -> int:
    return _fetch(FetchConfig(to=extras["to"], offline=True, verify=config.verify), extras, command)


def _report(config: ReportConfig, extras: dict[str, Any], command: list[str]) -> int:
    from lorabatch.report.build import build_report

    for path in build_report([Path(p) for p in extras["runs"]], config):
        print(path)
    return 0


def _sweep(config: SweepConfig, extras: dict[str, Any], command: list[str]) -> int:
    from lorabatch.cluster.sweep import run_sweep

    return run_sweep(extras["file"], config)


def _submit(config: SubmitConfig, extras: dict[str, Any], command: list[str]) -> int:
    from lorabatch.cluster.submit import submit

    return submit(extras["what"], config, extras["config"])


def _status(config: StatusConfig, extras: dict[str, Any], command: list[str]) -> int:
    from lorabatch.cluster.submit import status

    return status(Path(extras["folder"]))


def _doctor(config: DoctorConfig, extras: dict[str, Any], command: list[str]) -> int:
    from lorabatch.cluster.doctor import run_doctor

    return run_doctor(config)


def _bench_machine(config: BenchMachineConfig, extras: dict[str, Any], command: list[str]) -> int:
    from lorabatch.measure.machine import run_bench_machine

    return run_bench_machine(config)


def _profile_train(config: ProfileTrainConfig, extras: dict[str, Any], command: list[str]) -> int:
    from lorabatch.measure.profile import WARM_STEPS, profile_run
    from lorabatch.train.run import run_training

    if config.jobs:
        raise UsageError("profiles one run", where="--jobs", fix="leave it out, and give the settings of one of the runs as flags")
    folder = Path(config.profile_dir)
    steps = config.max_steps or WARM_STEPS + config.profile_steps
    short = replace(config, save_dir=str(folder / "run"), overwrite=True, max_steps=steps, max_val_documents=config.max_val_documents or 8)
    return profile_run("train", lambda: run_training(short, command), config, run_folder=folder / "run")


def _profile_infer(config: ProfileInferConfig, extras: dict[str, Any], command: list[str]) -> int:
    from lorabatch.infer.run import run_inference
    from lorabatch.measure.profile import profile_run

    folder = Path(config.profile_dir)
    moved = replace(config, output_dir=str(folder / "run"), overwrite=True, resume=False)
    return profile_run("infer", lambda: run_inference(moved, command), config, run_folder=folder / "run")


def _compare(config: CompareConfig, extras: dict[str, Any], command: list[str]) -> int:
    from lorabatch.measure.compare import compare

    print("\n".join(compare(Path(extras["a"]), Path(extras["b"]), across_hosts=config.across_hosts)))
    return 0


def _bench_train(config: BenchTrainConfig, extras: dict[str, Any], command: list[str]) -> int:
    from lorabatch.train.bench import run_bench_train

    return run_bench_train(config, command)


def _bench_infer(config: BenchInferConfig, extras: dict[str, Any], command: list[str]) -> int:
    from lorabatch.infer.bench import run_bench_infer

    return run_bench_infer(config, command)


Command = tuple[type[Settings], Callable[[Any, dict[str, Any], list[str]], int], dict[str, str]]
COMMANDS: dict[str, Command] = {
    config.command: (config, action, positionals)
    for config, action, positionals in (
        (TrainConfig, _train, {}),
        (InferConfig, _infer, {}),
        (ReportConfig, _report, {"runs": "run folders and JSON files of lorabatch bench, in any order"}),
        (MergeConfig, _merge, {}),
        (FetchConfig, _fetch, {"name": "name on the hub, .gguf file, or smollm2-135m"}),
        (StageConfig, _stage, {"name": "what was fetched", "to": "folder on the node's own disk"}),
        (SweepConfig, _sweep, {"file": "TOML file with the tables [train] and [search]"}),
        (SubmitConfig, _submit, {"what": "train, infer, sweep or pipeline"}),
        (StatusConfig, _status, {"folder": "run folder that lorabatch submit named"}),
        (DoctorConfig, _doctor, {}),
        (CompareConfig, _compare, {"a": "run folder, or file of lorabatch bench", "b": "the same of what may be faster"}),
        (ProfileTrainConfig, _profile_train, {}),
        (ProfileInferConfig, _profile_infer, {}),
        (BenchMachineConfig, _bench_machine, {}),
        (BenchTrainConfig, _bench_train, {}),
        (BenchInferConfig, _bench_infer, {}),
    )
}
GROUPS = {name.split()[0] for name in COMMANDS if " " in name}  # commands of two words


class _Output:
    """A stream that goes on into nothing when its reader has left (``| head -1``): the run is worth more than its words."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return int(self._stream.write(text))
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
    """No reader that leaves, and no character that the terminal's encoding lacks, ends a command."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # not None (closed), nor what a test put there
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, _Output(stream))


def usage() -> str:
    lines = [f"lorabatch {__version__}: LoRA fine-tuning and batched inference", "", "usage: lorabatch COMMAND [flags]", ""]
    lines += [f"  {name:14} {config.__doc__.splitlines()[0]}" for name, (config, _, _) in COMMANDS.items() if config.__doc__]
    return "\n".join(
        [
            *lines,
            "",
            "lorabatch COMMAND --help lists its flags. Exit codes: 0 done, 64 usage, 65 bad data,",
            "69 something needed is missing, 70 failed, 75 stopped with everything saved: run again.",
        ]
    )


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
    name = " ".join(argv[:count])
    if name not in COMMANDS:
        print(f"lorabatch: {UsageError(f'unknown command {name!r}', fix=nearest(name, COMMANDS))}", file=sys.stderr)
        return 64
    return run_command(name, argv[count:])


def run_command(name: str, argv: list[str], *, prog: str | None = None) -> int:
    """One command with the errors handled; also behind ``src/train_lora.py`` and ``src/infer_batch.py``."""
    _outlive_readers()
    config_class, action, positionals = COMMANDS[name]
    debug = "--debug" in argv
    try:
        config, extras = parse(config_class, argv, prog=prog or f"lorabatch {name}", positionals=positionals)
        if "LORABATCH_KERNELS" in os.environ:  # before the slow part, and without ctypes where nobody asked
            from lorabatch import kernels

            kernels.check()
        return action(config, extras, [prog or "lorabatch", *name.split(), *argv])
    except LorabatchError as error:
        if debug:
            raise
        print(f"lorabatch {name}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"lorabatch {name}: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.filename:  # the system's refusal, where nothing nearer has its own words for it
            refused = UnavailableError(str(error.strerror), where=error.filename, fix="check the path, its permissions and the free space")
            print(f"lorabatch {name}: {refused}", file=sys.stderr)
            return refused.exit_code
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        unforeseen = LorabatchError(f"unforeseen {what}", fix="this is a fault of lorabatch: run again with --debug to see where")
        print(f"lorabatch {name}: {unforeseen}", file=sys.stderr)
        return unforeseen.exit_code
