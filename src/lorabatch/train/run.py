"""``lorabatch train``: check everything that is cheap, then load, train, save, and leave a run folder behind."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorabatch import hub
from lorabatch.config import TrainConfig
from lorabatch.corpus.readers import Document, read_documents
from lorabatch.errors import DataError, InterruptedRun, LorabatchError, TrainingError, UnavailableError, UsageError
from lorabatch.measure.environment import environment, gpu_description
from lorabatch.measure.statistics import perplexity
from lorabatch.measure.system import SystemSampler
from lorabatch.progress import Progress
from lorabatch.records import RunFolder, read_json, replacing, write_json
from lorabatch.signals import Deadline, StopSignals
from lorabatch.train.figures import data_line, data_record, metrics_record, print_summary


@dataclass
class Phases:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measured(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class _Work:
    """What is known before anything is loaded."""

    config: TrainConfig
    source: hub.ModelSource
    train_documents: list[Document]
    val_documents: list[Document] | None
    signals: StopSignals
    deadline: Deadline
    ranks: Any  # Ranks; its module imports torch


def default_save_dir(base_model: str) -> Path:
    return Path("results") / f"lora-{Path(base_model.rstrip('/')).name.removesuffix('.gguf')}"


def run_training(config: TrainConfig, command: list[str]) -> int:
    """Returns the exit code; raises LorabatchError for what the user can mend."""
    with StopSignals() as signals:  # from the start: loading may take minutes
        return _checked(config, command, signals)


def _checked(config: TrainConfig, command: list[str], signals: StopSignals) -> int:
    """What is wrong with the input shows here, before anything is loaded."""
    hub.prepare_environment()
    deadline = Deadline.from_flag_and_slurm(config.time_limit)
    train_documents = read_documents(Path(config.train_path), txt_format=config.txt_format, text_field=config.text_field)
    val_documents = None
    if config.val_path:
        val_documents = read_documents(Path(config.val_path), txt_format=config.txt_format, text_field=config.text_field)
    source = hub.find_model(config.base_model)
    save_dir = Path(config.save_dir) if config.save_dir else default_save_dir(config.base_model)
    with _joined(config) as ranks:
        if ranks.from_first(ranks.is_first and _is_done(config, save_dir)):
            print(f"{save_dir}: this run is complete; nothing to do")
            return 0
        work = _Work(config, source, train_documents, val_documents, signals, deadline, ranks)
        if ranks.is_first:
            return _run_in(save_dir, config, command, work)
        # The other ranks do the same and keep nothing of it: one writer per run.
        with ExitStack() as silent:
            scratch = silent.enter_context(tempfile.TemporaryDirectory())
            nowhere = silent.enter_context(Path(os.devnull).open("w"))
            silent.enter_context(redirect_stdout(nowhere))
            silent.enter_context(redirect_stderr(nowhere))
            return _run_in(Path(scratch), config, command, work)


def _run_in(folder: Path, config: TrainConfig, command: list[str], work: _Work) -> int:
    record = folder / "run.json"
    earlier = record.read_bytes() if config.resume and record.exists() else None
    run = RunFolder.create(
        folder,
        kind="train",
        config=config.to_dict(),
        command=command,
        environment=environment(),
        folder_flag="--save_dir",
        overwrite=config.overwrite,
        resume=config.resume is not None,
    )
    try:
        reason = _train(run, work)
        if reason == "interrupted":
            cause = work.signals.received.name if work.signals.received else work.deadline.source
            raise InterruptedRun(f"stopped by {cause} with everything saved", where=folder, fix="go on with --resume auto")
        run.finish("completed")
        return 0
    except BaseException as error:
        status = "interrupted" if isinstance(error, (InterruptedRun, KeyboardInterrupt)) else "failed"
        with suppress(OSError, UnavailableError):  # a full disk must not hide what filled it
            if earlier is not None and isinstance(error, (UsageError, DataError)):
                with replacing(record) as file:  # a refusal changes nothing
                    file.write(earlier)
            else:
                run.finish(status, error=str(error) if isinstance(error, LorabatchError) else repr(error))
        raise


@contextmanager
def _joined(config: TrainConfig) -> Iterator[Any]:
    """The other ranks, if this process was started as one of several."""
    from lorabatch.train.ranks import find_place, joined

    with joined(find_place(os.environ), timeout_s=config.rank_timeout) as ranks:
        yield ranks


def _is_done(config: TrainConfig, save_dir: Path) -> bool:
    """Whether ``--resume auto`` finds the run that was asked for already complete."""
    if config.resume != "auto" or config.overwrite or not (save_dir / "run.json").exists():
        return False
    record = read_json(save_dir / "run.json")
    earlier, now = record.get("config", {}), config.to_dict()
    same = (*config.fixed(), "base_model", "train_path", "val_path")
    return record.get("status") == "completed" and all(earlier.get(k) == now[k] for k in same)


def _train(run: RunFolder, work: _Work) -> str:
    """Load, train, save; returns why the loop ended."""
    config, source, signals, deadline, ranks = work.config, work.source, work.signals, work.deadline, work.ranks
    phases = Phases()
    with SystemSampler(run.path / "system.jsonl") as sampler:
        with phases.measured("import_s"):
            from lorabatch.model import load
            from lorabatch.model.device import TYPE_NAMES, choose_device, choose_dtype, choose_threads
            from lorabatch.model.lora import LoraSettings
            from lorabatch.train import checkpoint
            from lorabatch.train.loop import planned_steps, train_loop
            from lorabatch.train.planner import configure, plan
            from lorabatch.train.saver import Identity, Saver
            from lorabatch.train.state import Learner
        found = ranks.from_first(checkpoint.find(config.resume, run.path) if config.resume and ranks.is_first else None)
        device = choose_device(no_cuda=config.no_cuda)
        threads = choose_threads(config.threads)
        # A timing decides "auto": once for all ranks, and a resumed run does not decide again.
        asked = found.state["identity"]["content"]["dtype"] if found and config.dtype == "auto" else config.dtype
        dtype = ranks.from_first(choose_dtype(asked, device))
        with phases.measured("tokenise_s"):
            tokenizer = load.load_tokenizer(source.path)
            model_config = load.load_config(source.path)
            corpus, validation = _tokenise(config, model_config, tokenizer, work.train_documents, work.val_documents)
        with phases.measured("load_s"):
            model = load.load_model(
                source, model_config, backend=config.backend, dtype=dtype, device=device, product=_product(config, ranks)
            )
            settings = LoraSettings(config.lora_r, config.lora_alpha, config.lora_dropout, config.use_rslora, config.target_modules)
            configure(model, config)
            learner = Learner(model.attach(settings, seed=config.seed), config, fp16=TYPE_NAMES[dtype] == "fp16")
            planned = plan(model, config, learner.adapters.num_params)
            learner.block_tokens = planned[0] if planned else config.block_tokens
        num_trainable = learner.adapters.num_params
        machine = {
            "device": str(device),
            "dtype": TYPE_NAMES[dtype],
            "threads": threads,
            "backend": model.backend,
            "ranks": ranks.count,
            "gpu": gpu_description(),
            "block_tokens": learner.block_tokens,
            "planned_step_bytes": planned[1] if planned else None,
        }
        size = {
            "trainable_params": num_trainable,
            "base_params": model.num_base_params,
            "base_bytes": model.base_bytes,
            "trainable_share": num_trainable / (num_trainable + model.num_base_params),
        }
        run.save(
            model={"name": source.name, "revision": source.revision, "fingerprint": model.base_fingerprint, **size},
            data=data_record(corpus, validation),
            **machine,
        )
        print(
            f"base {source.name} ({size['base_params'] / 1e6:.1f}M parameters in {size['base_bytes'] / 2**20:.1f} MiB, {machine['dtype']} on {device}, {threads} threads{f' x {ranks.count} ranks' if ranks.count > 1 else ''}); "
            f"trainable {size['trainable_params']:,} ({100 * size['trainable_share']:.2f} %)"
        )
        print(data_line(corpus, validation, config))
        identity = Identity.of(config, corpus, validation, base=model.base_fingerprint or source.name, machine=machine)
        saver = Saver(run, config, identity, learner, model, source.name, writes=ranks.is_first)
        saver.resume(found)
        first_step = learner.state.step
        ranks.wait_for_loading()
        with run.jsonl("events.jsonl") as events, phases.measured("loop_s"):
            saver.events = events
            progress = Progress(planned_steps(config, len(corpus.documents)), unit="step", description="train", done=first_step)

            def on_step(state: Any, record: Mapping[str, Any]) -> None:
                progress.update(loss=f"{record['loss']:.3f}", tokens_per_s=f"{record['tokens_per_s']:.0f}")

            def on_eval(state: Any, result: Any, improved: bool) -> None:
                bits = "" if result.bits_per_byte is None else f", bits per byte {result.bits_per_byte:.4f}"
                progress.note(
                    f"step {state.step}: eval loss {result.loss:.4f}, perplexity {perplexity(result.loss) or float('inf'):.2f}{bits}{'  (best)' if improved else ''}"
                )
                if state.step:
                    saver.save_adapter(best=improved)

            try:
                state = train_loop(
                    model,
                    learner,
                    corpus,
                    validation,
                    config,
                    sink=events.write,
                    on_step=on_step,
                    on_eval=on_eval,
                    on_boundary=saver.at_boundary,
                    stop_requested=lambda: bool(signals) or deadline.within(saver.needed_s()),
                    ranks=ranks,
                )
            except TrainingError:  # the adapter is that of the last finished step: another learning rate, or all ranks, can go on
                saver.at_boundary(learner.state, True)
                saver.save_adapter(best=False)
                raise
            finally:
                progress.close()
                phases.seconds["save_s"] = saver.seconds
        saver.save_adapter(best=False)
    if state.reason == "interrupted" and not signals and state.step == first_step:
        raise TrainingError("no step fits before it", where=deadline.source, fix="ask for more time")
    metrics = metrics_record(state, model, size, phases.seconds, device, dtype) | saver.figures() | sampler.summary()
    write_json(run.path / "metrics.json", metrics)
    run.save(reason=state.reason, root_adapter=saver.root, best_step=state.best_step)
    print_summary(metrics, run.path, saver.root)
    return str(state.reason)


def _product(config: TrainConfig, ranks: Any) -> Any:
    """How the frozen layers are stored, if not as dense weights. UsageError for a combination that is not possible."""
    asked = [name for name in ("load_in_4bit", "load_in_8bit", "shard_base") if getattr(config, name)]
    if len(asked) > 1:
        raise UsageError("only one of these at a time", where=" ".join(f"--{name}" for name in asked), fix="choose one")
    if config.shard_base:
        if ranks.count == 1:
            raise UsageError("there is nobody to share with", where="--shard_base", fix="start several ranks with torchrun or srun")
        from lorabatch.model.sharded import Sharded

        ranks.even = True
        return lambda weight, rows: Sharded(weight, ranks)
    if asked:
        from lorabatch.model.quantised import Int8, Nf4

        return Nf4 if config.load_in_4bit else Int8
    return None


def _tokenise(
    config: TrainConfig, model_config: Any, tokenizer: Any, train_documents: list[Document], val_documents: list[Document] | None
) -> tuple[Any, Any]:
    from lorabatch.corpus.tokens import tokenise

    limit = getattr(model_config, "max_position_embeddings", None) or getattr(model_config, "n_positions", None) or config.max_len
    max_len = min(config.max_len, limit)
    corpus = tokenise(train_documents[: config.max_train_documents], tokenizer, max_len=max_len, train_on_prompt=config.train_on_prompt)
    if val_documents is None:
        return corpus, None
    return corpus, tokenise(
        val_documents[: config.max_val_documents], tokenizer, max_len=max_len, train_on_prompt=config.train_on_prompt, count_bytes=True
    )
