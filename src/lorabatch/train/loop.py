"""The training loop: one update at a time, one record per step, every way out leaves an adapter.

A step is ``batch_size * grad_accum_steps`` documents. They are packed into blocks; each block adds
the gradient of its loss *sum*; the sum is divided once by the supervised tokens of the whole step.
So batch size, accumulation and packing do not change the gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lorabatch.config import TrainConfig
from lorabatch.corpus.packing import steps_per_epoch, training_steps
from lorabatch.corpus.tokens import TokenCorpus, TokenDocument
from lorabatch.errors import TrainingError
from lorabatch.model.lora import AdapterSet
from lorabatch.train.evaluate import EvalResult, LossModel, blocks_of, evaluate
from lorabatch.train.schedule import learning_rate, warmup_steps

Sink = Callable[[Mapping[str, Any]], None]


@dataclass
class TrainState:
    """Where a run is and what it has seen. Seconds are spent in steps only, not in evaluation."""

    step: int = 0
    total_steps: int = 0
    tokens: int = 0
    targets: int = 0
    squared_lengths: int = 0
    train_s: float = 0.0
    step_ms: list[float] = field(default_factory=list)
    epoch_s: list[float] = field(default_factory=list)
    last_loss: float | None = None
    first_eval: EvalResult | None = None
    last_eval: EvalResult | None = None
    best_eval: EvalResult | None = None
    best_step: int | None = None
    evals_without_gain: int = 0
    reason: str = "finished"


def planned_steps(config: TrainConfig, num_documents: int) -> int:
    steps = config.epochs * steps_per_epoch(num_documents, config.batch_size * config.grad_accum_steps)
    return min(steps, config.max_steps) if config.max_steps else steps


def train_loop(
    model: LossModel,
    adapters: AdapterSet,
    corpus: TokenCorpus,
    validation: TokenCorpus | None,
    config: TrainConfig,
    *,
    sink: Sink,
    on_step: Callable[[TrainState, Mapping[str, Any]], None],
    on_eval: Callable[[TrainState, EvalResult, bool], None],
    stop_requested: Callable[[], bool],
) -> TrainState:
    """Train until the plan is done, early stopping, a requested stop, or a non-finite loss (TrainingError)."""
    optimizer = torch.optim.AdamW(
        [adapters.flat],
        lr=config.lr,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    state = TrainState(total_steps=planned_steps(config, len(corpus.documents)))
    warmup = warmup_steps(state.total_steps, config.warmup_steps)
    every = config.eval_every_steps or max(1, math.ceil(state.total_steps / 4))

    def run_eval() -> bool:
        """Evaluate and record; False when training should end."""
        result = evaluate(model, validation, block_tokens=config.block_tokens, stop_requested=stop_requested) if validation else None
        if result is None:
            return not stop_requested()
        improved = _note_eval(state, result)
        sink({"event": "eval", "step": state.step, **result.record()})
        on_eval(state, result, improved)
        return not config.early_stopping_evals or state.evals_without_gain < config.early_stopping_evals

    going = run_eval()
    epoch, epoch_start_s = 0, 0.0
    for next_epoch, indices in training_steps(
        len(corpus.documents), config.batch_size * config.grad_accum_steps, epochs=config.epochs, seed=config.seed
    ):
        if next_epoch != epoch:
            state.epoch_s.append(state.train_s - epoch_start_s)
            epoch, epoch_start_s = next_epoch, state.train_s
        if stop_requested() or not going or state.step >= state.total_steps:
            break
        rate = learning_rate(state.step, peak=config.lr, total_steps=state.total_steps, warmup=warmup, kind=config.scheduler)
        record = _update(model, adapters, optimizer, [corpus.documents[i] for i in indices], config, rate, state)
        sink({"event": "step", **record, "epoch": epoch})
        on_step(state, record)
        if state.step % every == 0 and state.step < state.total_steps:
            going = run_eval()
    else:
        state.epoch_s.append(state.train_s - epoch_start_s)
    if stop_requested():
        state.reason = "interrupted"
    elif not going:
        state.reason = "early stopping"
    else:
        run_eval()
    return state


def _note_eval(state: TrainState, result: EvalResult) -> bool:
    """Update best and patience; whether this is the best of the run after training began."""
    state.first_eval = state.first_eval or result
    state.last_eval = result
    if state.step == 0:
        return False
    improved = state.best_eval is None or result.loss < state.best_eval.loss
    if improved:
        state.best_eval, state.best_step, state.evals_without_gain = result, state.step, 0
    else:
        state.evals_without_gain += 1
    return improved


def _update(
    model: LossModel,
    adapters: AdapterSet,
    optimizer: torch.optim.Optimizer,
    documents: Sequence[TokenDocument],
    config: TrainConfig,
    rate: float,
    state: TrainState,
) -> dict[str, Any]:
    """One optimiser step. Raises TrainingError before the update if loss or gradient is not finite."""
    start = time.perf_counter()
    model.train()
    torch.manual_seed((config.seed * 0x9E3779B97F4A7C15 + state.step) % 2**63)  # dropout is a function of seed and step
    targets = sum(d.num_targets for d in documents)
    tokens = sum(d.num_tokens for d in documents)
    adapters.zero_grad()
    loss_sum = torch.zeros(())
    for token_ids, first_targets in blocks_of(documents, config.block_tokens):
        loss = model.loss_sum(token_ids, first_targets)
        loss.backward()  # of the sum: dividing each token's share first would lose it in fp16
        loss_sum = loss_sum + loss.detach().cpu()
    adapters.grad.div_(targets)
    norm = float(torch.linalg.vector_norm(adapters.grad))
    mean_loss = float(loss_sum) / targets  # the step's host synchronisation
    if not (math.isfinite(mean_loss) and math.isfinite(norm)):
        raise TrainingError(
            f"loss {mean_loss} or gradient norm {norm} is not finite",
            where=f"step {state.step + 1}",
            fix="the adapter before this step is kept; lower --lr or use --dtype fp32",
        )
    if config.max_grad_norm and norm > config.max_grad_norm:
        adapters.grad.mul_(config.max_grad_norm / norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    seconds = time.perf_counter() - start
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
    }
