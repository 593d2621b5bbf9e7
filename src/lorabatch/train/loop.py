"""The training loop: one update at a time, one record per step, every way out leaves an adapter.

A step is ``batch_size * grad_accum_steps`` documents. They are packed into blocks; each block adds
the gradient of its loss *sum*; the sum is divided once by the supervised tokens of the whole step.
So batch size, accumulation and packing do not change the gradient.

A run is a generator, so that one or several can be driven over one model (``drive``): it asks for the gradient
of some documents, makes its update, and goes on when all runs have made theirs.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lorabatch.config import TrainConfig
from lorabatch.corpus.packing import steps_per_epoch, training_steps
from lorabatch.corpus.tokens import TokenCorpus, TokenDocument
from lorabatch.errors import LorabatchError, TrainingError
from lorabatch.model.device import out_of_memory
from lorabatch.train.evaluate import EvalResult, LossModel, evaluate, rank_blocks
from lorabatch.train.planner import halved
from lorabatch.train.ranks import ALONE, Ranks
from lorabatch.train.schedule import learning_rate, warmup_steps
from lorabatch.train.state import Learner, TrainState

Sink = Callable[[Mapping[str, Any]], object]
# Yields documents (sent: the sum of their losses, once their gradient is in the learner's buffer) until there is an update,
# then None (sent: the seconds of the step).
Steps = Generator[Sequence[TokenDocument] | None, float, Any]


class Lane:
    """A run on its way: what it asks for now, and what it returned at its end."""

    def __init__(self, learner: Learner, steps: Steps) -> None:
        self.learner, self._steps = learner, steps
        self.documents: Sequence[TokenDocument] | None = None  # whose gradient it asks for; None: it has made its update
        self.ended, self.result = False, None

    def send(self, value: float | None) -> None:
        self._go_on(lambda: self._steps.send(value))  # type: ignore[arg-type]  # None starts a generator

    def fail(self, error: LorabatchError) -> None:
        """The gradient that it asks for cannot be had: it saves what it has, in the place where it waits."""
        self._go_on(lambda: self._steps.throw(error))

    def _go_on(self, resume: Callable[[], Sequence[TokenDocument] | None]) -> None:
        try:
            self.documents = resume()
        except StopIteration as stop:
            self.documents, self.ended, self.result = None, True, stop.value


Gradients = Callable[[Sequence[Lane]], Sequence[float]]  # fills the learners' buffers, returns the sums of the losses


def drive(lanes: Sequence[Lane], gradients: Gradients) -> list[Any]:
    """Take steps of all runs together until each has ended; their results."""
    for lane in lanes:
        lane.send(None)
    while live := [lane for lane in lanes if not lane.ended]:
        start = time.perf_counter()
        _step(live, gradients)
        seconds = time.perf_counter() - start
        for lane in live:
            if not lane.ended:
                lane.send(seconds)
    return [lane.result for lane in lanes]


def _step(lanes: Sequence[Lane], gradients: Gradients) -> None:
    """One update of each run; one whose gradient overflowed asks again."""
    while asking := [lane for lane in lanes if lane.documents is not None]:
        try:
            loss_sums = gradients(asking)
        except LorabatchError as error:  # another rank is gone, or memory does not suffice
            for lane in asking:
                lane.fail(error)
            return
        for lane, loss_sum in zip(asking, loss_sums, strict=True):
            lane.send(loss_sum)


def train_step(
    model: LossModel, learner: Learner, documents: Sequence[TokenDocument], config: TrainConfig, rate: float, ranks: Ranks = ALONE
) -> dict[str, Any]:
    """One optimiser step on its own; its record."""
    (record,) = drive([Lane(learner, _update(learner, documents, config, rate))], alone(model, ranks))
    return dict(record)


def planned_steps(config: TrainConfig, num_documents: int) -> int:
    steps = config.epochs * steps_per_epoch(num_documents, config.batch_size * config.grad_accum_steps)
    return min(steps, config.max_steps) if config.max_steps else steps


def training(
    model: LossModel,
    learner: Learner,
    corpus: TokenCorpus,
    validation: TokenCorpus | None,
    config: TrainConfig,
    *,
    sink: Sink,
    on_step: Callable[[TrainState, Mapping[str, Any]], None],
    on_eval: Callable[[TrainState, EvalResult, bool], None],
    on_boundary: Callable[[TrainState, bool], None] = lambda state, last: None,
    stop_requested: Callable[[], bool],
    ranks: Ranks = ALONE,
) -> Steps:
    """Train until the plan is done, early stopping, a requested stop, or a non-finite loss (TrainingError); returns the state.

    Goes on from where ``learner.state`` is. ``model`` is for evaluation. ``on_boundary(state, last)`` is called between steps, when
    everything that the state says has been done: the moment to save. What comes next depends only on the
    state there, so a run that goes on from it does what the uninterrupted run would have done.
    """
    state = learner.state
    state.total_steps = planned_steps(config, len(corpus.documents))
    warmup = warmup_steps(state.total_steps, config.warmup_steps)
    every = config.eval_every_steps or max(1, math.ceil(state.total_steps / 4))
    plan = training_steps(len(corpus.documents), config.batch_size * config.grad_accum_steps, epochs=config.epochs, seed=config.seed)

    def run_eval() -> None:
        if validation is None:
            return
        result = evaluate(model, validation, block_tokens=config.block_tokens, stop_requested=stop_requested, ranks=ranks)
        if result is not None:
            improved = _note_eval(learner, result)
            sink({"event": "eval", "step": state.step, **result.record()})
            on_eval(state, result, improved)

    def patience_is_over() -> bool:
        return 0 < config.early_stopping_evals <= state.evals_without_gain

    for epoch, indices in itertools.chain(itertools.islice(plan, state.step, None), [(config.epochs, [])]):
        if epoch != state.epoch:
            state.epoch_s.append(state.train_s - state.epoch_start_s)
            state.epoch, state.epoch_start_s = epoch, state.train_s
        at_end = state.step >= state.total_steps
        if (state.step % every == 0 or at_end) and state.last_eval_step != state.step:
            run_eval()
        if ranks.any(stop_requested()):
            state.reason = "interrupted"
        elif patience_is_over() and not at_end:
            state.reason = "early stopping"
        elif not at_end:
            on_boundary(state, False)
            rate = learning_rate(state.step, peak=config.lr, total_steps=state.total_steps, warmup=warmup, kind=config.scheduler)
            record = yield from _update(learner, [corpus.documents[i] for i in indices], config, rate)
            sink({"event": "step", **record, "epoch": epoch})
            on_step(state, record)
            continue
        break
    on_boundary(state, True)
    return state


def _note_eval(learner: Learner, result: EvalResult) -> bool:
    """Update best and patience; whether this is the best of the run after training began."""
    state = learner.state
    state.first_eval = state.first_eval or result
    state.last_eval, state.last_eval_step = result, state.step
    if state.step == 0:
        return False
    improved = math.isfinite(result.loss) and (state.best_eval is None or result.loss < state.best_eval.loss)
    if improved:
        state.best_eval, state.best_step, state.evals_without_gain = result, state.step, 0
        state.best_weights = learner.adapters.flat.detach().cpu().clone()
    else:
        state.evals_without_gain += 1
    return improved


def _update(learner: Learner, documents: Sequence[TokenDocument], config: TrainConfig, rate: float) -> Steps:
    """One optimiser step; returns its record. Raises TrainingError before the update if loss or gradient is not finite."""
    state, adapters = learner.state, learner.adapters
    targets = sum(d.num_targets for d in documents)
    tokens = sum(d.num_tokens for d in documents)
    mean_loss, norm = yield from _mean_gradient(learner, documents, targets)
    if config.max_grad_norm and norm > config.max_grad_norm:
        adapters.grad.mul_(config.max_grad_norm / norm)
    learner.update(rate)
    seconds = yield None
    state.step += 1
    state.tokens += tokens
    state.targets += targets
    state.squared_lengths += sum(d.num_tokens**2 for d in documents)
    state.train_s += seconds
    state.step_ms.append(seconds * 1e3)
    state.last_loss = mean_loss
    return {
        "step": state.step,
        "loss": mean_loss,
        "lr": rate,
        "grad_norm": norm,
        "tokens": tokens,
        "target_tokens": targets,
        "documents": len(documents),
        "tokens_per_s": tokens / seconds,
        "step_ms": seconds * 1e3,
        **({"loss_scale": learner.scaler.scale, "overflows": learner.scaler.overflows} if learner.scaler else {}),
    }


def _mean_gradient(learner: Learner, documents: Sequence[TokenDocument], targets: int) -> Steps:
    """Leave the documents' mean gradient in the learner's buffer; returns the mean loss and the gradient's 2-norm, both finite."""
    step, grad, scaler = learner.state.step + 1, learner.adapters.grad, learner.scaler
    while True:
        scale = learner.scale
        mean_loss = (yield documents) / targets
        grad.div_(targets * scale)
        norm = float(torch.linalg.vector_norm(grad))
        if math.isfinite(mean_loss) and math.isfinite(norm):
            if scaler:
                scaler.good()
            return mean_loss, norm
        if scaler is None or not math.isfinite(mean_loss):
            raise TrainingError(
                f"loss {mean_loss} or gradient norm {norm} is not finite",
                where=f"step {step}",
                fix="the adapter before this step is kept; lower --lr or use --dtype fp32",
            )
        scaler.overflowed(step)


def alone(model: LossModel, ranks: Ranks = ALONE) -> Gradients:
    """Gradients of a single run, of all its ranks: each knows the step's documents and does its share."""

    def gradients(lanes: Sequence[Lane]) -> list[float]:
        (lane,) = lanes
        model.train()
        while True:
            torch.manual_seed(lane.learner.dropout_seed(ranks.rank))
            lane.learner.adapters.zero_grad()
            try:
                loss_sum = _loss_sum(lane, model, ranks)
            except (RuntimeError, MemoryError) as error:
                if ranks.even or not out_of_memory(error):
                    raise
                lane.learner.block_tokens = halved(lane.learner.block_tokens, lane.documents or (), error)
                continue  # the same step again, in smaller blocks
            grad = lane.learner.adapters.grad
            if ranks.count > 1:
                both = ranks.sum_(torch.cat([grad, loss_sum.to(grad).view(1)]))
                grad.copy_(both[:-1])
                loss_sum = both[-1]
            return [float(loss_sum)]  # the step's host synchronisation

    return gradients


def _loss_sum(lane: Lane, model: LossModel, ranks: Ranks) -> Tensor:
    loss_sum = torch.zeros(())
    for token_ids, first_targets, counts in rank_blocks(lane.documents or (), lane.learner.block_tokens, ranks):
        loss = model.loss_sum(token_ids, first_targets) * float(counts)
        (loss * lane.learner.scale).backward()  # of the sum: dividing each token's share first would lose it in fp16
        loss_sum = loss_sum + loss.detach().cpu()
    return loss_sum
