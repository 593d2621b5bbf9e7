"""One run over a loaded base, alone or beside others: its adapter, data, records and the way it ends."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lorabatch.config import TrainConfig
from lorabatch.corpus.tokens import TokenCorpus
from lorabatch.errors import InterruptedRun, LorabatchError, TrainingError
from lorabatch.hub import ModelSource
from lorabatch.measure.statistics import perplexity
from lorabatch.measure.system import SystemSampler
from lorabatch.model.device import TYPE_NAMES
from lorabatch.model.lora_settings import LoraSettings
from lorabatch.model.loss import LossTerms
from lorabatch.model.native import OneOfSeveral
from lorabatch.progress import Progress
from lorabatch.records import RunFolder, write_json
from lorabatch.signals import Deadline, StopSignals
from lorabatch.train.checkpoint import Checkpoint
from lorabatch.train.evaluate import EvalResult, LossModel
from lorabatch.train.figures import data_line, data_record, metrics_record, print_summary, summary_line
from lorabatch.train.loop import Steps, planned_steps, training
from lorabatch.train.ranks import Ranks
from lorabatch.train.saver import Saver, identity_of
from lorabatch.train.state import Learner, TrainState


@dataclass
class Base:
    """What is there once, however many runs share it."""

    model: Any
    several: bool  # runs over it
    source: ModelSource
    device: torch.device
    dtype: torch.dtype
    threads: int
    ranks: Ranks
    signals: StopSignals
    deadline: Deadline
    sampler: SystemSampler
    phases: dict[str, float]  # seconds of starting up
    progress: Progress | None = None
    tokens_per_s: dict[str, float] = field(default_factory=dict)  # of the runs that are on their way
    savers: list[Saver] = field(default_factory=list)

    def stop_requested(self) -> bool:
        return bool(self.signals) or self.deadline.within(sum(saver.needed_s() for saver in self.savers))


class Job:
    """A run from its fresh or resumed adapter to its last record. ``name`` is empty for a run on its own."""

    def __init__(
        self,
        base: Base,
        name: str,
        run: RunFolder,
        config: TrainConfig,
        corpora: tuple[TokenCorpus, TokenCorpus | None],
        found: Checkpoint | None,
    ) -> None:
        self.base, self.name, self.run, self.config = base, name, run, config
        self._corpus, self._validation = corpora
        self._found = found
        settings = LoraSettings(config.lora_r, config.lora_alpha, config.lora_dropout, config.use_rslora, config.target_modules)
        adapters = base.model.attach(settings, seed=config.seed)
        self.learner = Learner(adapters, config, fp16=TYPE_NAMES[base.dtype] == "fp16")
        self.terms = LossTerms(config.label_smoothing, config.z_loss)
        self.planned_steps = planned_steps(config, len(self._corpus.documents))
        self._size = {
            "trainable_params": adapters.num_params,
            "base_params": base.model.num_base_params,
            "base_bytes": base.model.base_bytes,
            "trainable_share": adapters.num_params / (adapters.num_params + base.model.num_base_params),
        }

    def prepare(self, machine: Mapping[str, Any]) -> None:
        """Record what is trained on what, and go on from the checkpoint that was found. UsageError if that is of another run."""
        base, config = self.base, self.config
        fingerprint = base.model.base_fingerprint
        self.run.save(
            model={"name": base.source.name, "revision": base.source.revision, "fingerprint": fingerprint, **self._size},
            data=data_record(self._corpus, self._validation),
            **machine,
        )
        size = f"{self.name}: trainable {self._size['trainable_params']:,}; " if self.name else ""
        print(size + data_line(self._corpus, self._validation))
        facts = {"base": base.model.identity, "machine": machine, "here": self.run.record["environment"]}
        identity = identity_of(config, self._corpus, self._validation, **facts)
        self._saver = Saver(self.run, config, identity, self.learner, base.model, base.source.name, writes=base.ranks.is_first)
        self._saver.resume(self._found)
        self._found = None  # its tensors
        base.savers.append(self._saver)

    def steps(self) -> Steps:
        """The run for ``drive``; returns None, or the LorabatchError that ended it. The others go on."""
        model: LossModel = OneOfSeveral(self.base.model, self.learner.adapters) if self.base.several else self.base.model
        try:
            yield from self._steps(model)
            self.run.finish("completed")
        except LorabatchError as error:
            self.run.end_with(error)
            if self.name and not isinstance(error, InterruptedRun):
                self._note(f"failed: {error}")
            return error
        finally:
            self.base.tokens_per_s.pop(self.name, None)
            self.base.savers.remove(self._saver)
        return None

    def _steps(self, model: LossModel) -> Steps:
        base, saver, start = self.base, self._saver, time.perf_counter()
        first_step = self.learner.state.step
        with self.run.jsonl("events.jsonl") as events:
            saver.events = events
            try:
                state: TrainState = yield from training(
                    model,
                    self.learner,
                    self._corpus,
                    self._validation,
                    self.config,
                    sink=events.write,
                    on_step=self._on_step,
                    on_eval=self._on_eval,
                    on_boundary=saver.at_boundary,
                    stop_requested=base.stop_requested,
                    ranks=base.ranks,
                )
            except TrainingError:  # the adapter is that of the last finished step: another learning rate, or all ranks, can go on
                saver.at_boundary(self.learner.state, True)
                saver.save_adapter(best=False)
                raise
        saver.save_adapter(best=False)
        if state.reason == "interrupted" and not base.signals and state.step == first_step:
            raise TrainingError("no step fits before it", where=base.deadline.source, fix="ask for more time")
        phases = base.phases | {"loop_s": time.perf_counter() - start, "save_s": saver.seconds}
        metrics = metrics_record(state, base.model, self._size, phases, base.device, base.dtype) | saver.figures() | base.sampler.summary()
        write_json(self.run.path / "metrics.json", metrics)
        self.run.save(reason=state.reason, root_adapter=saver.root, best_step=state.best_step)
        if self.name:
            self._note(summary_line(metrics, self.run.path))
        elif base.progress:
            base.progress.close()
            print_summary(metrics, self.run.path, saver.root)
        if state.reason == "interrupted":
            cause = base.signals.received.name if base.signals.received else base.deadline.source
            raise InterruptedRun(f"stopped by {cause} with everything saved", where=self.run.path, fix="go on with --resume auto")

    def _on_step(self, state: TrainState, record: Mapping[str, Any]) -> None:
        rates = self.base.tokens_per_s
        rates[self.name] = record["tokens_per_s"]
        figures: dict[str, Any] = {"runs": str(len(rates))} if self.name else {"loss": f"{record['loss']:.3f}"}
        if self.base.progress:
            self.base.progress.update(**figures, tokens_per_s=f"{sum(rates.values()):.0f}")

    def _on_eval(self, state: TrainState, result: EvalResult, improved: bool) -> None:
        bits = "" if result.bits_per_byte is None else f", bits per byte {result.bits_per_byte:.4f}"
        shown = f"eval loss {result.loss:.4f}, perplexity {perplexity(result.loss) or float('inf'):.2f}{bits}"
        self._note(f"step {state.step}: {shown}{'  (best)' if improved else ''}")
        if state.step:
            self._saver.save_adapter(best=improved)

    def _note(self, text: str) -> None:
        if self.base.progress:
            self.base.progress.note(f"{self.name}: {text}" if self.name else text)
