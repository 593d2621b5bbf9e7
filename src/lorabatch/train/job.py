"""One run over a loaded base: its adapter, data, records and the way it ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lorabatch.config import TrainConfig
from lorabatch.corpus.tokens import TokenCorpus
from lorabatch.errors import InterruptedRun, LorabatchError, TrainingError
from lorabatch.hub import ModelSource
from lorabatch.measure.statistics import perplexity
from lorabatch.measure.system import SystemSampler
from lorabatch.model.backend import Backend
from lorabatch.model.device import TYPE_NAMES
from lorabatch.model.lora_settings import LoraSettings
from lorabatch.model.loss import LossTerms
from lorabatch.progress import Progress
from lorabatch.records import RunFolder, write_json
from lorabatch.signals import Deadline, StopSignals
from lorabatch.train.checkpoint import Checkpoint
from lorabatch.train.evaluate import EvalResult
from lorabatch.train.figures import data_line, data_record, metrics_record, print_summary, summary_line
from lorabatch.train.loop import planned_steps, train
from lorabatch.train.planner import plan
from lorabatch.train.ranks import Ranks
from lorabatch.train.saver import Saver, check_same_run, identity_of
from lorabatch.train.state import Learner, TrainState


@dataclass
class Base:
    """What is there once, however many runs follow each other over it."""

    model: Backend
    source: ModelSource
    device: torch.device
    dtype: torch.dtype
    ranks: Ranks
    signals: StopSignals
    deadline: Deadline
    machine: Mapping[str, Any]  # what run.json says of it
    environment: Mapping[str, Any]
    progress: Progress | None = None


class Job:
    """A run from its fresh or resumed adapter to its last record. ``name`` is empty for a run on its own."""

    def __init__(
        self, base: Base, name: str, config: TrainConfig, corpora: tuple[TokenCorpus, TokenCorpus | None], found: Checkpoint | None
    ) -> None:
        """UsageError for settings that do not suit the model or the checkpoint: before the first run begins."""
        self.base, self.name, self.config, self._found = base, name, config, found
        self._corpus, self._validation = corpora
        self.phases: dict[str, float] = {}  # seconds of starting up; they belong to the process's first run
        self._settings = LoraSettings(config.lora_r, config.lora_alpha, config.lora_dropout, config.use_rslora, config.target_modules)
        self._terms = LossTerms(config.label_smoothing, config.z_loss)
        self.trainable_params = base.model.attach(self._settings, seed=config.seed).num_params
        base.model.detach()
        base.model.configure(self._terms, config.checkpointing)
        self._identity = identity_of(config, *corpora, base=base.model.identity, machine=base.machine, here=base.environment)
        if found is not None:
            check_same_run(found, self._identity, anyway=config.resume_anyway)
        self.planned_steps = planned_steps(config, len(self._corpus.documents))
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
            self.base.model.detach()
        return None

    def _run(self, run: RunFolder, sampler: SystemSampler) -> None:
        base, config = self.base, self.config
        base.model.configure(self._terms, config.checkpointing)
        adapters = base.model.attach(self._settings, seed=config.seed)
        learner = Learner(adapters, config, fp16=TYPE_NAMES[base.dtype] == "fp16")
        planned = plan(base.model, config, adapters.num_params)
        learner.block_tokens = planned[0] if planned else config.block_tokens
        size = {
            "trainable_params": adapters.num_params,
            "base_params": base.model.num_base_params,
            "base_bytes": base.model.base_bytes,
            "trainable_share": adapters.num_params / (adapters.num_params + base.model.num_base_params),
        }
        slower = base.model.slower_paths()
        if slower:
            print(
                f"{self.name + ': ' if self.name else ''}torch's own operators, slower than kernels, serve for {', '.join(slower)}",
                file=sys.stderr,
            )
        run.save(
            model={"name": base.source.name, "revision": base.source.revision, "fingerprint": base.model.base_fingerprint, **size},
            data=data_record(self._corpus, self._validation),
            **base.machine,
            block_tokens=learner.block_tokens,
            planned_step_bytes=planned[1] if planned else None,
            slower_paths=slower,
        )
        print(f"{self.name + ': ' if self.name else ''}{data_line(self._corpus, self._validation)}")
        saver = Saver(run, config, self._identity, learner, base.model, base.source.name, writes=base.ranks.is_first)
        saver.resume(self._found)
        self._found = None  # its tensors
        base.ranks.wait_for_loading()
        start, first_step = time.perf_counter(), learner.state.step
        state = self._train(run, learner, saver)
        if state.reason == "interrupted" and not base.signals and state.step == first_step:
            raise TrainingError("no step fits before it", where=base.deadline.source, fix="ask for more time")
        seconds = {**self.phases, "loop_s": time.perf_counter() - start, "save_s": saver.seconds}
        metrics = metrics_record(state, base.model, size, seconds, base.device, base.dtype) | saver.figures() | sampler.summary()
        write_json(run.path / "metrics.json", metrics)
        run.save(reason=state.reason, root_adapter=saver.root, best_step=state.best_step)
        if self.name:
            self._note(summary_line(metrics, run.path))
        elif base.progress:
            base.progress.close()
            print_summary(metrics, run.path, saver.root)
        if state.reason == "interrupted":
            cause = base.signals.received.name if base.signals.received else base.deadline.source
            raise InterruptedRun(f"stopped by {cause} with everything saved", where=run.path, fix="go on with --resume auto")

    def _train(self, run: RunFolder, learner: Learner, saver: Saver) -> TrainState:
        """The loop, and the adapter as it is at its end, whatever that was."""
        base = self.base

        def on_eval(state: TrainState, result: EvalResult, improved: bool) -> None:
            bits = "" if result.bits_per_byte is None else f", bits per byte {result.bits_per_byte:.4f}"
            shown = f"eval loss {result.loss:.4f}, perplexity {perplexity(result.loss) or float('inf'):.2f}{bits}"
            self._note(f"step {state.step}: {shown}{'  (best)' if improved else ''}")
            if state.step:
                saver.save_adapter(best=improved)

        with run.jsonl("events.jsonl") as events:
            saver.events = events
            try:
                state = train(
                    base.model,
                    learner,
                    self._corpus,
                    self._validation,
                    self.config,
                    sink=events.write,
                    on_step=self._on_step,
                    on_eval=on_eval,
                    on_boundary=saver.at_boundary,
                    stop_requested=lambda: bool(base.signals) or base.deadline.within(saver.needed_s()),
                    ranks=base.ranks,
                )
            except TrainingError:  # the adapter is that of the last finished step: another learning rate, or all ranks, can go on
                saver.at_boundary(learner.state, True)
                saver.save_adapter(best=False)
                raise
        saver.save_adapter(best=False)
        return state

    def _on_step(self, state: TrainState, record: Mapping[str, Any]) -> None:
        if self.base.progress:
            figures: dict[str, Any] = {"run": self.name} if self.name else {}
            self.base.progress.update(**figures, loss=f"{record['loss']:.3f}", tokens_per_s=f"{record['tokens_per_s']:.0f}")

    def _note(self, text: str) -> None:
        if self.base.progress:
            self.base.progress.note(f"{self.name}: {text}" if self.name else text)
