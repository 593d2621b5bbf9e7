"""The training loop: one update at a time, one record per step, every way out leaves an adapter.

A step is ``batch_size * grad_accum_steps`` documents. They are packed into blocks; each block adds
the gradient of its loss *sum*; the sum is divided once by the supervised tokens of the whole step.
So batch size, accumulation and packing do not change the gradient.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lorabatch.config import TrainConfig
from lorabatch.corpus.packing import steps_per_epoch, training_steps
from lorabatch.corpus.tokens import TokenCorpus, TokenDocument
from lorabatch.errors import TrainingError
from lorabatch.model.backend import Backend
from lorabatch.schema import Fields, Record
from lorabatch.spans import span, spanned
from lorabatch.train.batches import rank_blocks
from lorabatch.train.planner import LESS_TO_UPDATE, memory_for, within_memory
from lorabatch.train.ranks import ALONE, Ranks
from lorabatch.train.schedule import learning_rate, warmup_steps
from lorabatch.train.state import Trainable, TrainState
from lorabatch.train.validation import EvalResult, evaluate

Sink = Callable[[Fields], object]


def epoch_steps(config: TrainConfig, num_documents: int) -> int:
    return steps_per_epoch(num_documents, config.batch_size * config.grad_accum_steps)


def planned_steps(config: TrainConfig, num_documents: int) -> int:
    steps = config.epochs * epoch_steps(config, num_documents)
    return min(steps, config.max_steps) if config.max_steps else steps


def train(
    model: Backend,
    trainable: Trainable,
    corpus: TokenCorpus,
    validation: TokenCorpus | None,
    config: TrainConfig,
    *,
    sink: Sink,
    on_step: Callable[[TrainState, Fields], None],
    on_eval: Callable[[TrainState, EvalResult, bool], None],
    on_boundary: Callable[[TrainState, bool], None] = lambda state, last: None,
    stop_requested: Callable[[], bool],
    ranks: Ranks = ALONE,
) -> TrainState:
    """Train until the plan is done, early stopping, a requested stop, or a non-finite loss
    (TrainingError).

    Continues from where ``trainable.state`` is. ``on_boundary(state, last)`` is called between
    steps, when everything that the state says has been done: the moment to save. What comes next
    depends only on the state there, so a run that resumes from it does what the uninterrupted run
    would have done.
    """
    state = trainable.state
    state.total_steps = planned_steps(config, corpus.epoch_documents)
    warmup = warmup_steps(state.total_steps, config.warmup_steps)
    every = config.eval_every_steps or max(1, math.ceil(state.total_steps / 4))
    plan = training_steps(
        len(corpus.documents),
        config.batch_size * config.grad_accum_steps,
        epochs=config.epochs,
        seed=config.seed,
        parts=corpus.parts,
    )

    def run_eval() -> None:
        if validation is None:
            return
        result = within_memory(
            lambda: evaluate(
                model,
                validation,
                block_tokens=trainable.block_tokens,
                stop_requested=stop_requested,
                ranks=ranks,
            ),
            trainable,
            validation.documents,
            even=ranks.even,
        )
        if result is not None:
            improved = _note_eval(trainable, result)
            sink({"event": "eval", "step": state.step, **result.record()})
            on_eval(state, result, improved)

    rest = itertools.islice(plan, state.step, None)
    for epoch, indices in itertools.chain(rest, [(config.epochs, [])]):
        if epoch != state.epoch:
            state.epoch_s.append(state.train_s - state.epoch_start_s)
            state.epoch, state.epoch_start_s = epoch, state.train_s
        at_end = state.step >= state.total_steps
        if (state.step % every == 0 or at_end) and state.last_eval_step != state.step:
            run_eval()
        interrupted = ranks.any(stop_requested())
        if interrupted or at_end or _is_early_end(state, config):
            state.reason = _reason(interrupted, at_end)
            break
        on_boundary(state, False)
        rate = learning_rate(
            state.step,
            peak=config.lr,
            total_steps=state.total_steps,
            warmup=warmup,
            kind=config.scheduler,
        )
        record = train_step(
            model, trainable, [corpus.documents[i] for i in indices], config, rate, ranks
        )
        sink({"event": "step", **record, "epoch": epoch})
        on_step(state, record)
    on_boundary(state, True)
    return state


def _is_early_end(state: TrainState, config: TrainConfig) -> bool:
    return 0 < config.early_stopping_evals <= state.evals_without_gain


def _reason(interrupted: bool, at_end: bool) -> str:
    if interrupted:
        return "interrupted"
    return "finished" if at_end else "early stopping"


def _note_eval(trainable: Trainable, result: EvalResult) -> bool:
    """Update best and patience; whether this is the best of the run after training began."""
    state = trainable.state
    state.first_eval = state.first_eval or result
    state.last_eval, state.last_eval_step = result, state.step
    if state.step == 0:
        return False
    improved = math.isfinite(result.loss) and (
        state.best_eval is None or result.loss < state.best_eval.loss
    )
    if improved:
        state.best_eval, state.best_step, state.evals_without_gain = result, state.step, 0
        state.best_weights = trainable.adapters.flat.detach().cpu().clone()
    else:
        state.evals_without_gain += 1
    return improved


@spanned("step")
def train_step(
    model: Backend,
    trainable: Trainable,
    documents: Sequence[TokenDocument],
    config: TrainConfig,
    rate: float,
    ranks: Ranks = ALONE,
) -> Record:
    """One optimiser step; its record. Raises TrainingError before the update if loss or gradient is
    not finite."""
    start = time.perf_counter()
    state, adapters = trainable.state, trainable.adapters
    targets = sum(d.num_targets for d in documents)
    tokens = sum(d.num_tokens for d in documents)
    loss, norm = _mean_gradient(model, trainable, documents, targets, ranks)
    if config.max_grad_norm and norm > config.max_grad_norm:
        adapters.grad.mul_(config.max_grad_norm / norm)
    with span("optimiser"), memory_for("the optimiser's update", LESS_TO_UPDATE):
        trainable.update(rate)
    seconds = time.perf_counter() - start
    state.step += 1
    state.tokens += tokens
    state.targets += targets
    state.squared_lengths += sum(d.num_tokens**2 for d in documents)
    state.train_s += seconds
    state.step_ms.append(seconds * 1e3)
    state.last_loss = loss
    scaler = trainable.scaler
    scaling = {"loss_scale": scaler.scale, "overflows": scaler.overflows} if scaler else {}
    return {
        "step": state.step,
        "loss": loss,
        "lr": rate,
        "grad_norm": norm,
        "tokens": tokens,
        "target_tokens": targets,
        "documents": len(documents),
        "tokens_per_s": tokens / seconds,
        "step_ms": seconds * 1e3,
        **scaling,
    }


def _mean_gradient(
    model: Backend,
    trainable: Trainable,
    documents: Sequence[TokenDocument],
    targets: int,
    ranks: Ranks,
) -> tuple[float, float]:
    """Leave the documents' mean gradient in the adapters' buffer; the mean loss and the gradient's
    2-norm, both finite.

    Repeated with a smaller loss scale where fp16 overflowed.
    """
    step, grad, scaler = trainable.state.step + 1, trainable.adapters.grad, trainable.scaler
    while True:
        scale = trainable.scale
        loss_sum = _gradient_sum(model, trainable, documents, ranks)
        grad.div_(targets * scale)
        length = torch.linalg.vector_norm(grad)
        # the step's only wait for the device
        total, norm = torch.stack([loss_sum.to(length), length]).tolist()
        loss = total / targets
        if math.isfinite(loss) and math.isfinite(norm):
            if scaler:
                scaler.good()
            return loss, norm
        if scaler is None or not math.isfinite(loss):
            raise TrainingError(
                f"loss {loss} or gradient norm {norm} is not finite",
                where=f"step {step}",
                fix="the adapter before this step is kept; lower --lr or use --dtype fp32",
            )
        scaler.overflowed(step)


def _gradient_sum(
    model: Backend, trainable: Trainable, documents: Sequence[TokenDocument], ranks: Ranks
) -> Tensor:
    """Leave the gradient of the documents' loss sum, of all ranks, in the adapters' buffer; that
    sum, on the device.

    Repeated in smaller blocks where memory did not suffice.
    """
    adapters = trainable.adapters
    model.train()
    loss_sum = within_memory(
        lambda: _backward(model, trainable, documents, ranks),
        trainable,
        documents,
        even=ranks.even,
    )
    if ranks.count > 1:
        both = ranks.sum_(torch.cat([adapters.grad, loss_sum.to(adapters.grad).view(1)]))
        adapters.grad.copy_(both[:-1])
        loss_sum = both[-1]
    return loss_sum


def _backward(
    model: Backend, trainable: Trainable, documents: Sequence[TokenDocument], ranks: Ranks
) -> Tensor:
    torch.manual_seed(trainable.dropout_seed(ranks.rank))
    trainable.adapters.zero_grad()
    loss_sum = torch.zeros((), device=trainable.adapters.grad.device)
    for token_ids, targets, counts in rank_blocks(documents, trainable.block_tokens, ranks):
        with span("forward"):
            loss = model.loss_sum(token_ids, targets) * float(counts)
        # of the sum: dividing each token's share first would lose it in fp16
        with span("backward"):
            (loss * trainable.scale).backward()
        loss_sum = loss_sum + loss.detach()
    return loss_sum
