"""One run over a loaded base: its adapter, data, records and the way it ends."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import torch

from lorabatch.config import TrainConfig
from lorabatch.corpus.tokens import TokenCorpus
from lorabatch.errors import InterruptedRun, LorabatchError, TrainingError
from lorabatch.machine.device import TYPE_NAMES
from lorabatch.machine.sampler import SystemSampler
from lorabatch.metrics.schema import SystemMetrics, TrainMetrics
from lorabatch.metrics.statistics import perplexity
from lorabatch.model.backend import Backend
from lorabatch.model.card import write_card
from lorabatch.model.lora_settings import LoraSettings
from lorabatch.model.loss import LossTerms
from lorabatch.progress import Progress, note, rounded
from lorabatch.records import write_json
from lorabatch.runs import RunFolder
from lorabatch.schema import Fields, Record
from lorabatch.train.checkpoint import Checkpoint
from lorabatch.train.figures import (
    data_line,
    data_record,
    print_summary,
    summary_line,
    train_metrics,
)
from lorabatch.train.loop import epoch_steps, planned_steps, train
from lorabatch.train.planned import Process
from lorabatch.train.planner import plan
from lorabatch.train.saver import Saver, check_same_run, identity_of
from lorabatch.train.state import Trainable, TrainState
from lorabatch.train.validation import EvalResult

Corpora = tuple[TokenCorpus, TokenCorpus | None]  # of training and of validation


@dataclass
class Shared:
    """What the runs of this process have in common once the base is loaded."""

    process: Process
    model: Backend
    device: torch.device
    dtype: torch.dtype
    machine: Fields  # what run.json says of it
    environment: Fields
    progress: Progress | None = None


class Training:
    """A run from its fresh or resumed adapter to its last record. ``name`` is empty for a run on
    its own."""

    def __init__(
        self,
        shared: Shared,
        name: str,
        config: TrainConfig,
        corpora: Corpora,
        found: Checkpoint | None,
    ) -> None:
        """UsageError for settings that do not suit the model or the checkpoint: before the first
        run begins."""
        self.shared, self.name, self.config, self._found = shared, name, config, found
        self._corpus, self._validation = corpora
        # seconds of starting up; they belong to the process's first run
        self.phases: dict[str, float] = {}
        self._settings = LoraSettings.from_config(config)
        self._terms = LossTerms(config.label_smoothing, config.z_loss)
        self.trainable_params = shared.model.attach(self._settings, seed=config.seed).num_params
        shared.model.detach()
        shared.model.configure(self._terms, config.checkpointing)
        self._identity = identity_of(
            config,
            *corpora,
            base=shared.model.identity,
            machine=shared.machine,
            here=shared.environment,
        )
        if found is not None:
            check_same_run(found, self._identity, anyway=config.resume_anyway)
        self.planned_steps = planned_steps(config, self._corpus.epoch_documents)
        self.steps_done = int(found.state["learner"]["counters"]["step"]) if found else 0

    def run(self, run: RunFolder, sampler: SystemSampler) -> LorabatchError | None:
        """Train, save and record; what ended it early."""
        try:
            self._run(run, sampler)
            run.finish("completed")
        except LorabatchError as error:
            run.end_with(error)
            if self.name and not isinstance(error, InterruptedRun):
                self._note(f"failed: {error}")
            return error
        finally:
            self.shared.model.detach()
        return None

    def _run(self, run: RunFolder, sampler: SystemSampler) -> None:
        shared, process = self.shared, self.shared.process
        shared.model.configure(self._terms, self.config.checkpointing)
        adapters = shared.model.attach(self._settings, seed=self.config.seed)
        trainable = Trainable(adapters, self.config, fp16=TYPE_NAMES[shared.dtype] == "fp16")
        size = _size(shared.model, adapters.num_params)
        self._record_start(run, trainable, size)
        saver = Saver(
            run,
            self.config,
            self._identity,
            trainable,
            shared.model,
            process.source.name,
            writes=process.ranks.is_first,
        )
        saver.resume(self._found)
        self._found = None  # its tensors
        process.ranks.wait_for_loading()
        start, first_step = time.perf_counter(), trainable.state.step
        state = self._train(run, trainable, saver)
        if state.reason == "interrupted" and not process.signals and state.step == first_step:
            raise TrainingError(
                "not enough time left for a single step",
                where=process.deadline.source,
                fix="request a longer time limit",
            )
        seconds = {**self.phases, "loop_s": time.perf_counter() - start, "save_s": saver.seconds}
        metrics = train_metrics(
            state,
            shared.model,
            seconds,
            shared.device,
            shared.dtype,
            size=size,
            saves=saver.figures(),
        )
        self._record_end(run, state, saver, metrics, sampler.summary())

    def _record_start(self, run: RunFolder, trainable: Trainable, size: Record) -> None:
        """How the run will go: the size of its blocks, what is slow, where and on what it runs."""
        shared, source = self.shared, self.shared.process.source
        planned = plan(shared.model, self.config, trainable.adapters.num_params)
        trainable.block_tokens = planned[0] if planned else self.config.block_tokens
        prefix = f"{self.name}: " if self.name else ""
        slower = shared.model.slower_paths()
        if slower:
            what = "torch's operators are used, slower than our kernels"
            print(f"{prefix}{what}, for {', '.join(slower)}", file=sys.stderr)
        run.save(
            model={
                "name": source.name,
                "revision": source.revision,
                "converted_from": source.converted_from,
                "fingerprint": shared.model.base_fingerprint,
                **size,
            },
            data=run.record["data"] | data_record(self._corpus, self._validation),
            **shared.machine,
            planned_steps=self.planned_steps,
            block_tokens=trainable.block_tokens,
            planned_step_bytes=planned[1] if planned else None,
            slower_paths=slower,
        )
        print(f"{prefix}{data_line(self._corpus, self._validation)}")

    def _record_end(
        self,
        run: RunFolder,
        state: TrainState,
        saver: Saver,
        metrics: TrainMetrics,
        system: SystemMetrics,
    ) -> None:
        """Raises InterruptedRun where the run was stopped before its end."""
        write_json(run.path / "metrics.json", metrics.to_dict() | system.to_dict())
        run.save(reason=state.reason, root_adapter=saver.root, best_step=state.best_step)
        if state.reason != "interrupted":
            write_card(run.path, run.record, metrics.to_dict() | system.to_dict())
        if self.name:
            self._note(summary_line(metrics, run.path))
        elif self.shared.progress:
            self.shared.progress.close()
            steps = epoch_steps(self.config, len(self._corpus.documents))
            print_summary(metrics, run.path, saver.root, epoch_steps=steps)
        if state.reason == "interrupted":
            received = self.shared.process.signals.received
            cause = received.name if received else self.shared.process.deadline.source
            raise InterruptedRun(
                f"stopped by {cause} with everything saved",
                where=run.path,
                fix="resume with --resume auto",
            )

    def _train(self, run: RunFolder, trainable: Trainable, saver: Saver) -> TrainState:
        """The loop, and the adapter as it is at its end, whatever that was."""
        process = self.shared.process

        def on_eval(state: TrainState, result: EvalResult, improved: bool) -> None:
            self._note(_eval_line(state.step, result, improved))
            if state.step:
                saver.save_adapter(best=improved)

        def stop_requested() -> bool:
            return bool(process.signals) or process.deadline.within(saver.needed_s())

        with run.jsonl("events.jsonl") as events:
            saver.events = events
            try:
                state = train(
                    self.shared.model,
                    trainable,
                    self._corpus,
                    self._validation,
                    self.config,
                    sink=events.write,
                    on_step=self._on_step,
                    on_eval=on_eval,
                    on_boundary=saver.at_boundary,
                    stop_requested=stop_requested,
                    ranks=process.ranks,
                )
            except TrainingError:
                # the adapter is that of the last finished step: another learning rate, or all
                # ranks, can resume
                saver.at_boundary(trainable.state, True)
                saver.save_adapter(best=False)
                raise
        saver.save_adapter(best=False)
        return state

    def _on_step(self, state: TrainState, record: Fields) -> None:
        if self.shared.progress:
            figures: Record = {"run": self.name} if self.name else {}
            self.shared.progress.update(
                **figures,
                loss=f"{record['loss']:.3f}",
                tokens_per_s=rounded(record["tokens_per_s"]),
            )

    def _note(self, text: str) -> None:
        if self.shared.progress:
            note(f"{self.name}: {text}" if self.name else text)


def _size(model: Backend, num_params: int) -> Record:
    return {
        "trainable_params": num_params,
        "base_params": model.num_base_params,
        "base_bytes": model.base_bytes,
        "trainable_share": num_params / (num_params + model.num_base_params),
    }


def _eval_line(step: int, result: EvalResult, improved: bool) -> str:
    shown = perplexity(result.loss) or float("inf")
    line = f"step {step}: eval loss {result.loss:.4f}, perplexity {shown:.2f}"
    if result.bits_per_byte is not None:
        line += f", bits per byte {result.bits_per_byte:.4f}"
    return line + ("  (best)" if improved else "")
