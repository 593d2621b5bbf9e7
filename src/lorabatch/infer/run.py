"""``lorabatch infer``: read and check the prompts, load, generate, record each completion as it
ends."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lorabatch.config import InferConfig
from lorabatch.errors import DataError, InterruptedRun, UsageError
from lorabatch.infer.adapters import check_adapters, merged_adapter
from lorabatch.infer.prompts import PromptFile
from lorabatch.machine.environment import environment
from lorabatch.machine.sampler import SystemSampler
from lorabatch.model import hub
from lorabatch.progress import Phases
from lorabatch.records import replacing, utc_now, write_json
from lorabatch.runs import RunFolder
from lorabatch.schema import Record
from lorabatch.signals import StopSignals

if TYPE_CHECKING:
    from lorabatch.infer.passes import Passes
    from lorabatch.infer.sink import Tally


SUMMARIES = ("metrics.json", "batch_output.jsonl")
OUTPUTS = ("completions.jsonl", "system.jsonl", *SUMMARIES)


def default_output_dir(config: InferConfig) -> Path:
    model = (merged_adapter(config) or Path(config.base_model)).name.removesuffix(".gguf")
    return Path("results") / f"infer-{model}-{datetime.now():%Y%m%d-%H%M%S}"


def run_inference(config: InferConfig, command: list[str], passes: Passes | None = None) -> int:
    """Returns the exit code; raises LorabatchError for what the user can fix. passes: of an
    earlier run with these settings, whose model is loaded."""
    hub.prepare_environment()
    _check_flags(config)
    phases = Phases()
    prompts = PromptFile(Path(config.prompts), config)
    phases.end("check")
    if prompts.ignored:
        print(f"ignored fields of the prompts: {', '.join(sorted(prompts.ignored))}")
    source = hub.find_model(config.base_model)
    output_dir = Path(config.output_dir) if config.output_dir else default_output_dir(config)
    if not (config.resume or config.overwrite):
        _refuse_remains(output_dir)
    run = RunFolder.create(
        output_dir,
        kind="infer",
        config=config.to_dict(),
        command=command,
        environment=environment(),
        folder_flag="--output_dir",
        overwrite=config.overwrite,
        resume=config.resume,
    )
    try:
        with StopSignals() as signals:
            tally = _infer(run, config, source, prompts, phases, signals, passes)
            if signals.received:
                raise InterruptedRun(
                    f"stopped by {signals.received.name}; finished requests are saved",
                    where=output_dir,
                    fix="run the same command with --resume and this --output_dir to continue",
                )
        run.finish("completed" if tally.completed else "failed", **tally.counts())
    except BaseException as error:
        run.end_with(error)
        raise
    if not tally.completed:
        raise DataError(
            f"all {tally.failed} requests failed",
            where=output_dir / "completions.jsonl",
            fix="see the 'error' of its lines",
        )
    if config.fail_on_error:
        tally.refuse_failures(output_dir / "completions.jsonl")
    return 0


def _check_flags(config: InferConfig) -> None:
    """What no setting alone can tell. Raises UsageError, DataError for a missing adapter."""
    if config.resume and not config.output_dir:
        raise UsageError(
            "needs to know which run", where="--resume", fix="name it with --output_dir"
        )
    if config.retry_failed and not config.resume:
        raise UsageError(
            "needs a run to resume",
            where="--retry_failed",
            fix="add --resume and --output_dir, or --shards",
        )
    check_adapters(config)


def _refuse_remains(folder: Path) -> None:
    """Outputs without their run.json are of a run that was killed while --overwrite removed it, or
    half a copy: nothing to add to."""
    found = [name for name in OUTPUTS if (folder / name).exists()]
    if found and not (folder / "run.json").exists():
        fix = (
            "add --resume to continue it, --overwrite to replace it, or choose another --output_dir"
        )
        raise UsageError(
            f"holds {', '.join(found)} of an earlier run without its run.json",
            where=folder,
            fix=fix,
        )


def _infer(
    run: RunFolder,
    config: InferConfig,
    source: hub.ModelSource,
    prompts: PromptFile,
    phases: Phases,
    signals: StopSignals,
    passes: Passes | None,
) -> Tally:
    """What there is in the end, earlier finished requests included."""
    with SystemSampler(run.path / "system.jsonl") as sampler:
        from lorabatch.infer import metrics, sink
        from lorabatch.infer.load import load_for_inference
        from lorabatch.infer.passes import Passes
        from lorabatch.infer.results import Results

        passes = passes or Passes(load_for_inference(config, source, prompts.adapters), config)
        run.save(**passes.loaded.facts)
        phases.end("load")
        completions = run.path / "completions.jsonl"
        tally = sink.finished_earlier(
            completions, prompts, passes.loaded.work_key, retry_failed=config.retry_failed
        )
        run.save(requests=_begun(tally))
        if 0 in tally.done:  # until the end these could only describe an earlier state
            for name in SUMMARIES:
                (run.path / name).unlink(missing_ok=True)
        with run.jsonl(completions.name) as writer, sink.Completions(writer) as file:
            results = Results(file, tally, passes.loaded, iterations=config.iters)
            measured = passes.run(prompts, tally.done, results, phases, signals)
            results.progress.close()
    prompts.check_unchanged()
    tally.warn()
    _arrange(completions, config, prompts, model=source.name)
    if 0 not in tally.done and (run.path / "metrics.json").exists():
        print(f"all {len(prompts)} requests were finished earlier; metrics.json stays as it is")
        return tally
    figures = passes.metrics(measured, phases.seconds, tally.counts())
    write_json(run.path / "metrics.json", figures.to_dict() | sampler.summary().to_dict())
    metrics.print_table(figures, run.path, completed=tally.completed, total=len(prompts))
    return tally


def _begun(tally: Tally) -> Record:
    """Where this attempt begins: how fast it goes is seen from here on."""
    return {"total": len(tally.done), "earlier": sum(tally.done), "begun_at": utc_now()}


def _arrange(completions: Path, config: InferConfig, prompts: PromptFile, *, model: str) -> None:
    """The file of completions in the order and the format that were asked for."""
    from lorabatch.infer import sink

    if config.output_order == "input":
        with replacing(completions) as sorted_file:
            sorted_file.writelines(sink.lines_in_input_order(completions))
    if config.output_format == "openai":
        sink.write_openai_file(
            completions.with_name("batch_output.jsonl"),
            completions,
            model=model,
            created=int(time.time()),
            adapters=prompts.adapters.folders,
        )
