"""``lorabatch train``: check everything that is cheap, then load, train, save, and leave a run folder behind."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorabatch import hub
from lorabatch.config import TrainConfig
from lorabatch.corpus.readers import Document, read_documents
from lorabatch.errors import InterruptedRun, LorabatchError
from lorabatch.measure.environment import environment, gpu_description
from lorabatch.measure.statistics import mean, percentile, perplexity, rate, summary
from lorabatch.measure.system import SystemSampler, peak_memory_bytes
from lorabatch.progress import Progress
from lorabatch.records import RunFolder, write_json
from lorabatch.signals import StopSignals

EXIT_BY_SIGNAL = 128  # shells' convention: 128 + number of the signal


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


def default_save_dir(base_model: str) -> Path:
    return Path("results") / f"lora-{Path(base_model.rstrip('/')).name.removesuffix('.gguf')}"


def run_training(config: TrainConfig, command: list[str]) -> int:
    """Returns the exit code; raises LorabatchError for what the user can mend."""
    hub.prepare_environment()
    train_documents = read_documents(Path(config.train_path), txt_format=config.txt_format, text_field=config.text_field)
    val_documents = None
    if config.val_path:
        val_documents = read_documents(Path(config.val_path), txt_format=config.txt_format, text_field=config.text_field)
    source = hub.find_model(config.base_model)
    save_dir = Path(config.save_dir) if config.save_dir else default_save_dir(config.base_model)
    run = RunFolder.create(
        save_dir,
        kind="train",
        config=config.to_dict(),
        command=command,
        environment=environment(),
        folder_flag="--save_dir",
        overwrite=config.overwrite,
    )
    try:
        with StopSignals() as signals:
            _train(run, config, source, train_documents, val_documents, signals)
            if signals.received:
                run.finish("interrupted", signal=signals.received.name)
                print(f"stopped by {signals.received.name}; the adapter so far is in {save_dir}")
                return EXIT_BY_SIGNAL + signals.received
        run.finish("completed")
        return 0
    except BaseException as error:
        status = "interrupted" if isinstance(error, (InterruptedRun, KeyboardInterrupt)) else "failed"
        run.finish(status, error=str(error) if isinstance(error, LorabatchError) else repr(error))
        raise


def _train(
    run: RunFolder,
    config: TrainConfig,
    source: hub.ModelSource,
    train_documents: list[Document],
    val_documents: list[Document] | None,
    signals: StopSignals,
) -> None:
    phases = Phases()
    with SystemSampler(run.path / "system.jsonl") as sampler:
        with phases.measured("import_s"):
            from lorabatch.model import load
            from lorabatch.model.device import TYPE_NAMES, choose_device, choose_dtype, choose_threads
            from lorabatch.model.lora import LoraSettings
            from lorabatch.train.loop import planned_steps, train_loop
        device = choose_device(no_cuda=config.no_cuda)
        threads = choose_threads(config.threads)
        dtype = choose_dtype(config.dtype, device)
        with phases.measured("tokenise_s"):
            tokenizer = load.load_tokenizer(source.path)
            model_config = load.load_config(source.path)
            corpus, validation = _tokenise(config, model_config, tokenizer, train_documents, val_documents)
        with phases.measured("load_s"):
            model = load.load_model(source, model_config, backend=config.backend, dtype=dtype, device=device)
            settings = LoraSettings(config.lora_r, config.lora_alpha, config.lora_dropout, config.use_rslora, config.target_modules)
            adapters = model.attach(settings, seed=config.seed)
        machine = {
            "device": str(device),
            "dtype": TYPE_NAMES[dtype],
            "threads": threads,
            "backend": model.backend,
            "gpu": gpu_description(),
        }
        size = {
            "trainable_params": adapters.num_params,
            "base_params": model.num_base_params,
            "trainable_share": adapters.num_params / (adapters.num_params + model.num_base_params),
        }
        steps = planned_steps(config, len(corpus.documents))
        run.save(
            model={"name": source.name, "revision": source.revision, "fingerprint": model.base_fingerprint, **size},
            data=_data_record(corpus, validation),
            **machine,
        )
        print(
            f"base {source.name} ({size['base_params'] / 1e6:.1f}M parameters, {machine['dtype']} on {device}, {threads} threads); "
            f"trainable {size['trainable_params']:,} ({100 * size['trainable_share']:.2f} %)"
        )
        print(_data_line(corpus, validation, config))
        keeper = _Keeper(run, source.name, model, adapters, phases)
        with run.jsonl("events.jsonl") as events, phases.measured("loop_s"):
            progress = Progress(steps, unit="step", description="train")

            def on_step(state: Any, record: Mapping[str, Any]) -> None:
                progress.update(loss=f"{record['loss']:.3f}", tokens_per_s=f"{record['tokens_per_s']:.0f}")

            def on_eval(state: Any, result: Any, improved: bool) -> None:
                bits = "" if result.bits_per_byte is None else f", bits per byte {result.bits_per_byte:.4f}"
                progress.note(
                    f"step {state.step}: eval loss {result.loss:.4f}, perplexity {perplexity(result.loss) or float('inf'):.2f}{bits}{'  (best)' if improved else ''}"
                )
                if state.step:
                    keeper.save(best=improved)

            try:
                state = train_loop(
                    model,
                    adapters,
                    corpus,
                    validation,
                    config,
                    sink=events.write,
                    on_step=on_step,
                    on_eval=on_eval,
                    stop_requested=lambda: bool(signals),
                )
            except LorabatchError:
                keeper.save(best=False)
                raise
            finally:
                progress.close()
        keeper.save(best=False)
    metrics = _metrics(state, model, size, phases, device, dtype) | sampler.summary()
    write_json(run.path / "metrics.json", metrics)
    run.save(reason=state.reason, root_adapter=keeper.root, best_step=state.best_step)
    _print_summary(metrics, run.path, keeper.root)


class _Keeper:
    """Saves ``last/`` and ``best/``, and at the run's root the best adapter (the last one without evaluation)."""

    def __init__(self, run: RunFolder, base_name: str, model: Any, adapters: Any, phases: Phases) -> None:
        self._run, self._base_name, self._model, self._adapters, self._phases = run, base_name, model, adapters, phases
        self.root = "last"

    def save(self, *, best: bool) -> None:
        from lorabatch.model.lora import save_adapter

        if best:
            self.root = "best"
        folders = ["last"] + (["best"] if best else []) + (["."] if best or self.root == "last" else [])
        weights = self._adapters.weights()
        with self._phases.measured("save_s"):
            for folder in folders:
                save_adapter(
                    self._run.path / folder,
                    weights,
                    base_name=self._base_name,
                    base_fingerprint=self._model.base_fingerprint,
                    fan_in_fan_out=self._model.fan_in_fan_out,
                )


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


def _data_record(corpus: Any, validation: Any) -> dict[str, Any]:
    def one(part: Any) -> dict[str, Any]:
        return {
            "documents_read": part.num_read,
            "documents": len(part.documents),
            "split": part.num_split,
            "cut": part.num_cut,
            "dropped": part.num_dropped,
            "tokens": part.num_tokens,
            "target_tokens": part.num_targets,
            "median_tokens": percentile([d.num_tokens for d in part.documents], 50),
            "longest_tokens": max(d.num_tokens for d in part.documents),
        }

    return {"train": one(corpus), "val": one(validation) if validation else None}


def _data_line(corpus: Any, validation: Any, config: TrainConfig) -> str:
    def counted(part: Any) -> str:
        changes = [
            f"{n} {what}" for n, what in ((part.num_split, "split"), (part.num_cut, "cut at --max_len"), (part.num_dropped, "dropped")) if n
        ]
        return f"{len(part.documents)} documents, {part.num_tokens:,} tokens" + (f" ({', '.join(changes)})" if changes else "")

    return f"train {counted(corpus)}; " + (f"validation {counted(validation)}" if validation else "no validation")


def _metrics(state: Any, model: Any, size: Mapping[str, Any], phases: Phases, device: Any, dtype: Any) -> dict[str, Any]:
    mfu = ceiling = None
    if model.spec is not None and state.train_s:
        from lorabatch.measure.machine import measured_flops_per_s
        from lorabatch.measure.roofline import training_flops

        flops = training_flops(
            model.spec,
            tokens=state.tokens,
            targets=state.targets,
            squared_lengths=state.squared_lengths,
            lora_params=size["trainable_params"],
        )
        ceiling = measured_flops_per_s(dtype, device)
        mfu = flops / state.train_s / ceiling
    best = state.best_eval or state.last_eval
    per_minute = rate(state.step, state.train_s)
    return {
        "schema_version": 1,
        "kind": "train",
        "steps": state.step,
        "planned_steps": state.total_steps,
        "loss": state.last_loss,
        "eval_loss": best.loss if best else None,
        "perplexity": perplexity(best.loss) if best else None,
        "bits_per_byte": best.bits_per_byte if best else None,
        "eval_loss_before": state.first_eval.loss if state.first_eval else None,
        "bits_per_byte_before": state.first_eval.bits_per_byte if state.first_eval else None,
        "best_step": state.best_step,
        "epoch_s": mean(state.epoch_s),
        **summary("step_ms", state.step_ms),
        "steps_per_min": per_minute * 60 if per_minute else None,
        "tokens_per_s": rate(state.tokens, state.train_s),
        "total_tokens": state.tokens,
        "target_tokens": state.targets,
        "padding_share": 0.0 if model.backend == "native" else None,
        **size,
        "mfu": mfu,
        "measured_flops_per_s": ceiling,
        "peak_memory_bytes": peak_memory_bytes() if device.type == "cpu" else _gpu_peak_bytes(),
        "train_s": state.train_s,
        "phases": {name: round(seconds, 3) for name, seconds in phases.seconds.items()},
    }


def _gpu_peak_bytes() -> int:
    import torch

    return int(torch.cuda.max_memory_allocated())


def _print_summary(metrics: Mapping[str, Any], path: Path, root: str) -> None:
    def shown(name: str, form: str, unit: str = "") -> str:
        return "not measured" if metrics[name] is None else form.format(metrics[name]) + unit

    bits = (
        f"{shown('bits_per_byte_before', '{:.4f}')} -> {shown('bits_per_byte', '{:.4f}')}"
        if metrics["bits_per_byte"] is not None
        else "not measured"
    )
    rows = [
        ("steps", f"{metrics['steps']} of {metrics['planned_steps']}"),
        ("train loss", shown("loss", "{:.4f}")),
        ("validation bits per byte", bits),
        ("tokens/s", shown("tokens_per_s", "{:.0f}")),
        ("median step", shown("median_step_ms", "{:.0f}", " ms")),
        ("share of measured GEMM rate (4N)", shown("mfu", "{:.0%}")),
        ("peak memory", f"{metrics['peak_memory_bytes'] / 2**30:.2f} GiB"),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"  {name:<{width}}  {value}" for name, value in rows))
    print(f"{root} adapter: {path}")
