"""``lorabatch infer``: read and check the prompts, load, generate, record each completion as it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorabatch import hub
from lorabatch.config import InferConfig
from lorabatch.errors import DataError, InterruptedRun, UnavailableError, UsageError
from lorabatch.infer.adapters import merged_adapter
from lorabatch.infer.prompts import PromptFile
from lorabatch.infer.requests import Request, completion_record
from lorabatch.measure.environment import environment, gpu_description
from lorabatch.measure.system import SystemSampler
from lorabatch.progress import Phases, Progress
from lorabatch.records import JsonlWriter, RunFolder, replacing, write_json
from lorabatch.signals import StopSignals

if TYPE_CHECKING:
    from lorabatch.infer.adapters import AdapterNames
    from lorabatch.infer.feed import Feed
    from lorabatch.infer.metrics import Latencies, Pass
    from lorabatch.infer.session import Session
    from lorabatch.model.lora import LoraWeights


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
            failed, total = _infer(run, config, source, prompts, phases, signals, kept)
            if signals.received:
                raise InterruptedRun(
                    f"stopped by {signals.received.name}; finished requests are saved",
                    where=output_dir,
                    fix="run the same command with --resume and this --output_dir to go on",
                )
        run.finish("failed" if failed == total else "completed", failed=failed)
    except BaseException as error:
        run.end_with(error)
        raise
    if failed == total:
        raise DataError(f"all {total} requests failed", where=output_dir / "completions.jsonl", fix="see the 'error' of its lines")
    return 0


@dataclass
class _Loaded:
    """Everything that stands between the prompts and the engine."""

    model: Any
    tokenizer: Any
    eos_ids: frozenset[int]
    adapter: str | None
    bank: tuple[LoraWeights, ...]  # of --adapters, in their order; empty if they are merged
    bank_bytes: int  # of the bank in the type of the run
    merged: Callable[[Path], Any]  # the model with the adapter of a folder merged in
    work_key: str  # what, besides a request itself, its completion depends on
    limit: int  # positions of prompt and completion together
    facts: dict[str, Any]  # what run.json says of it


@dataclass
class Kept:
    """What a process that completes one range of prompts after another has from the first one on; ``lasting`` in such a process."""

    loaded: _Loaded
    session: Session | None = None
    lasting: bool = False


def load(config: InferConfig, source: hub.ModelSource, names: AdapterNames) -> _Loaded:
    """The model and the adapters of a run, checked against each other."""
    from lorabatch.infer.runner import load_for_runner, programmed
    from lorabatch.model import load
    from lorabatch.model.device import TYPE_NAMES, choose_device, choose_dtype, choose_threads
    from lorabatch.model.native import NativeModel
    from lorabatch.model.spec import spec_from_config

    device = choose_device(no_cuda=config.no_cuda)
    threads = choose_threads(config.threads)
    dtype = choose_dtype(config.dtype, device)
    model_config = load.load_config(source.path)
    tokenizer = load.load_tokenizer(source.path)
    apart = config.adapter_mode == "mixed"
    if names.folders and apart and (config.backend == "hf" or spec_from_config(model_config) is None):
        raise UnavailableError("not in one batch on the hf backend", where="--adapters", fix="use --adapter_mode merge")

    def load_merged(folder: Path | None) -> load.Model:
        return load_for_runner(
            source, model_config, backend=config.backend, dtype=dtype, device=device, quantize=config.quantize, adapter_dir=folder
        )

    adapter_dir = merged_adapter(config)
    model = load_merged(adapter_dir)
    kernels = isinstance(model, NativeModel) and programmed(model.spec, dtype, device, quantize=config.quantize)
    bank, digests = _read_adapters(model, names, apart=apart)
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
    work_key += "".join(f" {name}={digest}" for name, digest in zip(names.folders, digests, strict=True))
    work_key += "" if apart else " merged"  # rounds otherwise, so it is other work
    eos_ids = load.end_tokens(source.path, model_config, tokenizer)
    return _Loaded(model, tokenizer, eos_ids, adapter, bank, bank_bytes, load_merged, work_key, limit, facts)


def _read_adapters(model: Any, names: AdapterNames, *, apart: bool) -> tuple[tuple[LoraWeights, ...], list[str]]:
    """(those that stay apart, what each of --adapters is by content). All are checked against the base before anything is generated."""
    from lorabatch.model.lora import load_adapter

    bank, digests = [], []
    for folder in names.folders.values():
        weights = load_adapter(folder, model.linear_shapes, base_fingerprint=model.base_fingerprint)
        digests.append(weights.digest())
        if apart:
            bank.append(weights)
    return tuple(bank), digests


def _adapter_words(merged: str | None, names: AdapterNames, bank_bytes: int) -> str:
    if names.folders:
        way = f"unmerged ({bank_bytes / 1e6:.0f} MB), chosen by each request" if bank_bytes else "merged in turn"
        return f"{len(names.folders)} adapters, {way}"
    return f"adapter {merged} merged" if merged else "no adapter"


def _infer(
    run: RunFolder,
    config: InferConfig,
    source: hub.ModelSource,
    prompts: PromptFile,
    phases: Phases,
    signals: StopSignals,
    kept: Kept | None,
) -> tuple[int, int]:
    """(failed, all) requests of this run, earlier finished ones included."""
    with SystemSampler(run.path / "system.jsonl") as sampler:
        from lorabatch.infer import metrics, sink

        kept = kept or Kept(load(config, source, prompts.adapters))
        loaded = kept.loaded
        run.save(**loaded.facts)
        phases.end("load")
        completions = run.path / "completions.jsonl"
        done, failed = sink.finished_earlier(completions, prompts, loaded.work_key)
        if config.retry_failed and failed:
            sink.drop_failed(completions)
            done, failed = sink.finished_earlier(completions, prompts, loaded.work_key)
        passes: list[metrics.Pass] = []
        with run.jsonl(completions.name) as file:
            work = _Work(prompts, kept, config, done, failed, file)
            for model, mask in _turns(loaded, config, prompts, done) if 0 in done else ():
                phases.end("load")
                passes += work.run(model, mask, phases, signals)
                phases.begin()
                phases.all_are = "turns"  # what the later ones of --adapter_mode merge take
                if signals:
                    break
            work.progress.close()
    if config.output_order == "input":
        with replacing(completions) as sorted_file:
            sorted_file.writelines(sink.lines_in_input_order(completions))
    if config.output_format == "openai":
        sink.write_openai_file(
            run.path / "batch_output.jsonl", completions, model=source.name, created=int(time.time()), adapters=prompts.adapters.folders
        )
    if 0 not in done and (run.path / "metrics.json").exists():
        print(f"all {len(prompts)} requests were finished earlier; metrics.json stays as it is")
        return failed, len(prompts)
    figures = metrics.metrics(
        passes,
        loaded.model,
        phases.seconds,
        failed=work.failed,
        num_slots=work.num_slots,
        iterations=config.iters,
        quantize=config.quantize,
        adapter_bytes=loaded.bank_bytes / max(1, len(loaded.bank)),
    )
    write_json(run.path / "metrics.json", figures | sampler.summary())
    metrics.print_table(figures, run.path, completed=work.completed, total=len(prompts))
    return work.failed, len(prompts)


def _turns(loaded: _Loaded, config: InferConfig, prompts: PromptFile, done: bytearray) -> Iterator[tuple[Any, bytearray]]:
    """Each model of the run with what it is not to do [a byte per position]: one for all, or every adapter merged in turn."""
    if not prompts.adapters.folders or config.adapter_mode == "mixed":
        yield loaded.model, done
        return
    rows, left = np.frombuffer(prompts.adapter_rows, dtype=np.int16), np.frombuffer(bytes(done), dtype=np.uint8) == 0
    for row, folder in enumerate((None, *prompts.adapters.folders.values()), start=-1):
        mine = left & (rows == row)
        if mine.any():
            yield loaded.model if folder is None else loaded.merged(folder), bytearray((~mine).astype(np.uint8).tobytes())


class _Work:
    """The requests that are left, where their completions go, and what is shown of them."""

    def __init__(self, prompts: PromptFile, kept: Kept, config: InferConfig, done: bytearray, failed: int, file: JsonlWriter) -> None:
        self._prompts, self._kept, self._config, self._done, self._file = prompts, kept, config, done, file
        self._loaded = kept.loaded
        self.completed, self.failed, self.num_slots = sum(done) - failed, failed, 1
        left = len(prompts) - sum(done)
        self.progress = Progress(sum(done) + left * config.iters, unit="request", description="infer", done=sum(done))

    def run(self, model: Any, mask: bytearray, phases: Phases, signals: StopSignals) -> list[Pass]:
        """``--iters`` passes over what is not masked; only the first is recorded."""
        from lorabatch.infer.metrics import Latencies
        from lorabatch.infer.session import Session

        loaded, config, left = self._loaded, self._config, len(mask) - sum(mask)
        feed = self.feed(mask, record=True)
        lasting = self._kept.lasting and model is loaded.model
        session = (self._kept.session if lasting else None) or Session(
            model,
            loaded.tokenizer,
            loaded.eos_ids,
            config,
            num_requests=config.batch_size if lasting else left,  # the next range may have more
            capacity=feed.likely_capacity(),
            bank=loaded.bank,
            bank_bytes=loaded.bank_bytes,
        )
        if lasting:
            self._kept.session = session
        phases.end("tokenise")
        session.prepare()
        phases.end("pack")
        if config.iters > 1:
            session.warm_up(feed)
            phases.end("warm_up")
        earlier = f", {sum(self._done)} finished earlier" if any(self._done) else ""
        print(f"{left} requests, {session.num_slots} at once{earlier}")
        passes: list[Pass] = []
        while len(passes) < config.iters and not signals:
            latencies = Latencies()
            on_finish = self.on_finish(session, feed, latencies, record=not passes)
            passes.append((session.complete(feed, on_finish, stop_requested=lambda: bool(signals)), latencies))
            feed = self.feed(mask, record=False)
        self.num_slots = max(self.num_slots, session.num_slots)
        return passes

    def feed(self, mask: bytearray, *, record: bool) -> Feed:
        """The work from its beginning; its error records are written if ``record``."""
        from lorabatch.infer.feed import Feed

        def on_error(request: Request) -> None:
            if record:
                self.failed += 1
                self._write(request)
            self.progress.update()

        loaded, config = self._loaded, self._config
        fitting: dict[str, Any] = {"limit": loaded.limit, "long_prompt": config.long_prompt, "vocab_size": loaded.model.vocab_size}
        return Feed(self._prompts, loaded.tokenizer, **fitting, done=mask, on_error=on_error)

    def on_finish(self, session: Session, feed: Feed, latencies: Latencies, *, record: bool) -> Callable[[Request], None]:
        start = time.perf_counter()

        def on_finish(request: Request) -> None:
            latencies.add(request)
            if record:
                self.completed += 1
                self._write(request)
            running = min(feed.num_out, session.num_slots)
            self.progress.update(
                tokens_per_s=f"{latencies.output_tokens / (time.perf_counter() - start):.0f}",
                running=str(running),
                waiting=str(self.progress.left - 1 - running),
            )

        return on_finish

    def _write(self, request: Request) -> None:
        key = request.key(self._loaded.work_key)
        self._file.write(completion_record(request, self._loaded.tokenizer, key=key, adapter=self._loaded.adapter))
