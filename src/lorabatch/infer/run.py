"""``lorabatch infer``: read and check the prompts, load, generate, record each completion as it ends."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from lorabatch import hub
from lorabatch.config import InferConfig
from lorabatch.errors import DataError, InterruptedRun, UnavailableError, UsageError
from lorabatch.infer.adapters import merged_adapter
from lorabatch.infer.prompts import PromptFile
from lorabatch.infer.work import Kept, Loaded, Work
from lorabatch.measure.environment import environment, gpu_description
from lorabatch.measure.system import SystemSampler
from lorabatch.progress import Phases
from lorabatch.records import RunFolder, replacing, write_json
from lorabatch.signals import StopSignals

if TYPE_CHECKING:
    from lorabatch.infer.adapters import AdapterNames
    from lorabatch.infer.sink import Tally


SUMMARIES = ("metrics.json", "batch_output.jsonl")
OUTPUTS = ("completions.jsonl", "system.jsonl", *SUMMARIES)


def default_output_dir(config: InferConfig) -> Path:
    model = (merged_adapter(config) or Path(config.base_model)).name.removesuffix(".gguf")
    return Path("results") / f"infer-{model}-{datetime.now():%Y%m%d-%H%M%S}"


def run_inference(config: InferConfig, command: list[str], kept: Kept | None = None) -> int:
    """Returns the exit code; raises LorabatchError for what the user can mend. kept: what an earlier run with these settings loaded."""
    hub.prepare_environment()
    if config.resume and not config.output_dir:
        raise UsageError("needs to know which run", where="--resume", fix="name it with --output_dir")
    if config.retry_failed and not config.resume:
        raise UsageError("needs a run to go on with", where="--retry_failed", fix="add --resume and --output_dir, or --shards")
    phases = Phases()
    prompts = PromptFile(Path(config.prompts), config)
    phases.end("check")
    if prompts.ignored:
        print(f"ignored fields of the prompts: {', '.join(sorted(prompts.ignored))}")
    adapter_dir = merged_adapter(config)
    if adapter_dir is not None and config.adapters:
        raise UsageError("one adapter for all or one for each request, not both", where="--adapter_dir --adapters", fix="leave one out")
    if adapter_dir is not None and not adapter_dir.is_dir():
        raise DataError("no such folder", where=f"--adapter_dir {adapter_dir}", fix="train first, or leave the flag out for the base model")
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
            tally = _infer(run, config, source, prompts, phases, signals, kept)
            if signals.received:
                raise InterruptedRun(
                    f"stopped by {signals.received.name}; finished requests are saved",
                    where=output_dir,
                    fix="run the same command with --resume and this --output_dir to go on",
                )
        run.finish("completed" if tally.completed else "failed", **tally.counts())
    except BaseException as error:
        run.end_with(error)
        raise
    if not tally.completed:
        raise DataError(f"all {tally.failed} requests failed", where=output_dir / "completions.jsonl", fix="see the 'error' of its lines")
    return 0


def _refuse_remains(folder: Path) -> None:
    """Outputs without their run.json are of a run that was killed while --overwrite removed it, or half a copy: nothing to add to."""
    found = [name for name in OUTPUTS if (folder / name).exists()]
    if found and not (folder / "run.json").exists():
        fix = "add --resume to go on with it, --overwrite to replace it, or choose another --output_dir"
        raise UsageError(f"holds {', '.join(found)} of an earlier run without its run.json", where=folder, fix=fix)


def load(config: InferConfig, source: hub.ModelSource, names: AdapterNames) -> Loaded:
    """The model and the adapters of a run, checked against each other."""
    from lorabatch.infer.runner import load_for_runner, programmed
    from lorabatch.model import load
    from lorabatch.model.device import TYPE_NAMES, choose_device, choose_dtype, choose_threads
    from lorabatch.model.lora import load_adapter
    from lorabatch.model.native import NativeModel
    from lorabatch.model.spec import spec_from_config

    device = choose_device(no_cuda=config.no_cuda)
    threads = choose_threads(config.threads)
    dtype = choose_dtype(config.dtype, device)
    model_config = load.load_config(source.path)
    tokenizer = load.load_tokenizer(source.path)
    if names.folders and (config.backend == "hf" or spec_from_config(model_config) is None):
        raise UnavailableError("not on the hf backend", where="--adapters", fix="one run for each, with --adapter_dir")
    adapter_dir = merged_adapter(config)
    model = load_for_runner(
        source, model_config, backend=config.backend, dtype=dtype, device=device, quantize=config.quantize, adapter_dir=adapter_dir
    )
    kernels = isinstance(model, NativeModel) and programmed(model.spec, dtype, device, quantize=config.quantize)
    bank = tuple(load_adapter(f, model.linear_shapes, base_fingerprint=model.base_fingerprint) for f in names.folders.values())
    bank_bytes = sum(w.num_params for w in bank) * dtype.itemsize
    limit = min(model.max_positions, config.max_len or model.max_positions)
    adapter = str(adapter_dir) if adapter_dir else None
    facts = {
        "model": {"name": source.name, "revision": source.revision, "fingerprint": model.base_fingerprint, "adapter": adapter},
        "device": str(device),
        "dtype": TYPE_NAMES[dtype],
        "threads": threads,
        "backend": model.backend,
        "cpu_kernels": kernels,
        "gpu": gpu_description(),
    }
    precision = TYPE_NAMES[dtype] if config.quantize == "none" else f"{config.quantize} weights, {TYPE_NAMES[dtype]} cache"
    words = ", own kernels" if kernels else ""
    print(f"base {source.name} ({precision} on {device}, {threads} threads{words}), {_adapter_words(adapter, names, bank_bytes)}")
    merged = model.adapter.digest() if model.adapter else "base"
    work_key = f"{source.name} {model.identity} {merged} {TYPE_NAMES[dtype]} {config.quantize} {limit} {config.long_prompt}"
    work_key += "".join(f" {name}={weights.digest()}" for name, weights in zip(names.folders, bank, strict=True))
    eos_ids = load.end_tokens(source.path, model_config, tokenizer)
    return Loaded(model, tokenizer, eos_ids, adapter, bank, bank_bytes, work_key, limit, facts)


def _adapter_words(merged: str | None, names: AdapterNames, bank_bytes: int) -> str:
    if names.folders:
        return f"{len(names.folders)} adapters, unmerged ({bank_bytes / 1e6:.0f} MB), chosen by each request"
    return f"adapter {merged} merged" if merged else "no adapter"


def _infer(
    run: RunFolder,
    config: InferConfig,
    source: hub.ModelSource,
    prompts: PromptFile,
    phases: Phases,
    signals: StopSignals,
    kept: Kept | None,
) -> Tally:
    """What there is in the end, earlier finished requests included."""
    with SystemSampler(run.path / "system.jsonl") as sampler:
        from lorabatch.infer import metrics, sink

        kept = kept or Kept(load(config, source, prompts.adapters))
        loaded = kept.loaded
        run.save(**loaded.facts)
        phases.end("load")
        completions = run.path / "completions.jsonl"
        tally = sink.finished_earlier(completions, prompts, loaded.work_key, retry_failed=config.retry_failed)
        if 0 in tally.done:  # until the end there is nothing that these could be of but an earlier state
            for name in SUMMARIES:
                (run.path / name).unlink(missing_ok=True)
        passes: list[metrics.Pass] = []
        with run.jsonl(completions.name) as writer, sink.Completions(writer) as file:
            work = Work(prompts, kept, config, tally, file)
            if 0 in tally.done:
                passes = work.run(tally.done, phases, signals)
            work.progress.close()
    prompts.check_unchanged()
    tally.warn()
    if config.output_order == "input":
        with replacing(completions) as sorted_file:
            sorted_file.writelines(sink.lines_in_input_order(completions))
    if config.output_format == "openai":
        sink.write_openai_file(
            run.path / "batch_output.jsonl", completions, model=source.name, created=int(time.time()), adapters=prompts.adapters.folders
        )
    if 0 not in tally.done and (run.path / "metrics.json").exists():
        print(f"all {len(prompts)} requests were finished earlier; metrics.json stays as it is")
        return tally
    figures = metrics.metrics(
        passes,
        loaded.model,
        phases.seconds,
        counts=tally.counts(),
        num_slots=work.num_slots,
        iterations=config.iters,
        quantize=config.quantize,
        adapter_bytes=loaded.bank_bytes / max(1, len(loaded.bank)),
    )
    write_json(run.path / "metrics.json", figures | sampler.summary())
    metrics.print_table(figures, run.path, completed=tally.completed, total=len(prompts))
    return tally
