"""Where a run is: everything that changes while it trains, as one object that a checkpoint can
hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorabatch.config import TrainConfig
from lorabatch.errors import UsageError
from lorabatch.model.lora import AdapterSet
from lorabatch.schema import Fields, Record
from lorabatch.train.scaler import LossScaler
from lorabatch.train.validation import EvalResult

EVALS = ("first_eval", "last_eval", "best_eval")


@dataclass
class TrainState:
    """Where a run is and what it has seen. Seconds are spent in steps only, not in evaluation."""

    step: int = 0
    total_steps: int = 0
    tokens: int = 0
    targets: int = 0
    squared_lengths: int = 0
    train_s: float = 0.0
    epoch: int = 0
    epoch_start_s: float = 0.0
    step_ms: list[float] = field(default_factory=list)
    epoch_s: list[float] = field(default_factory=list)
    last_loss: float | None = None
    first_eval: EvalResult | None = None
    last_eval: EvalResult | None = None
    best_eval: EvalResult | None = None
    last_eval_step: int | None = None
    best_step: int | None = None
    best_weights: Tensor | None = None  # the flat adapter of the best evaluation, on the CPU
    evals_without_gain: int = 0
    reason: str = "finished"


def _evaluation(record: Fields) -> EvalResult:
    """As a checkpoint has it; JSON knows no NaN, so the loss of an evaluation that diverged is null
    there."""
    values = {f.name: record[f.name] for f in dataclasses.fields(EvalResult)}
    return EvalResult(**values | {"loss": math.nan if values["loss"] is None else values["loss"]})


def _state(counters: Fields, tensors: Mapping[str, Tensor]) -> TrainState:
    known = {f.name for f in dataclasses.fields(TrainState)}
    values = {name: value for name, value in counters.items() if name in known}
    values |= {name: _evaluation(values[name]) for name in EVALS if values.get(name) is not None}
    return TrainState(
        **values | {"reason": "finished"},
        step_ms=tensors["step_ms"].tolist(),
        best_weights=tensors.get("best_adapters"),
    )


def _speeds(adapters: AdapterSet, ratio: float) -> Tensor:
    """LoRA+: 1 for every weight of an A, ``ratio`` for every weight of a B."""
    each = [
        torch.full((p.numel(),), speed)
        for pair in adapters.pairs.values()
        for p, speed in zip(pair, (1.0, ratio), strict=True)
    ]
    return torch.cat(each).to(adapters.flat.device)


class Trainable:
    """Adapters, their optimiser, the loss scale and the counters: what a step changes and a
    checkpoint holds."""

    def __init__(self, adapters: AdapterSet, config: TrainConfig, *, fp16: bool = False) -> None:
        self.adapters, self._seed = adapters, config.seed
        self.state = TrainState()
        self.scaler = LossScaler() if fp16 else None
        self.optimizer = torch.optim.AdamW(
            [adapters.flat],
            lr=config.lr,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.block_tokens = config.block_tokens  # halved when memory runs out
        self._speed: Tensor | None = None  # of each weight's update, where A and B differ
        if config.lora_plus_ratio != 1.0:
            self._speed = _speeds(adapters, config.lora_plus_ratio)

    @property
    def scale(self) -> float:
        """The factor on the loss."""
        return self.scaler.scale if self.scaler else 1.0

    def dropout_seed(self, rank: int = 0) -> int:
        """Dropout is a function of seed, step and rank."""
        return (
            self._seed * 0x9E3779B97F4A7C15 + self.state.step + rank * 0xD1B54A32D192ED03
        ) % 2**63

    def update(self, rate: float) -> None:
        """One step of AdamW at this learning rate. It is proportional to the rate, so LoRA+ scales
        what it changed."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        flat = self.adapters.flat.data
        before = flat.clone() if self._speed is not None else None
        self.optimizer.step()
        if before is not None and self._speed is not None:
            # in place: want of memory here would leave half an update
            torch.addcmul(before, flat.sub_(before), self._speed, out=flat)

    def record(self) -> Record:
        """The counters, as JSON can hold them to the bit."""
        tensors = ("step_ms", "best_weights")
        state = {
            f.name: getattr(self.state, f.name)
            for f in dataclasses.fields(TrainState)
            if f.name not in tensors
        }
        state |= {
            name: dataclasses.asdict(state[name]) for name in EVALS if state[name] is not None
        }
        return {
            "counters": state,
            "scaler": dataclasses.asdict(self.scaler) if self.scaler else None,
        }

    def tensors(self) -> dict[str, Tensor]:
        moments = self.optimizer.state.get(self.adapters.flat) or {}  # empty before the first step
        found = {
            "adapters": self.adapters.flat.data,
            "step_ms": torch.tensor(self.state.step_ms, dtype=torch.float64),
            **{f"adam.{name}": tensor for name, tensor in moments.items()},
        }
        if self.state.best_weights is not None:
            found["best_adapters"] = self.state.best_weights
        return found

    def restore(self, record: Fields, tensors: Mapping[str, Tensor]) -> None:
        """Become what ``record`` and ``tensors`` described. UsageError if the adapters have another
        shape."""
        if tensors["adapters"].shape != self.adapters.flat.shape:
            raise UsageError(
                f"the checkpoint has {tensors['adapters'].numel()} adapter weights, this run "
                f"{self.adapters.num_params}",
                where="--resume",
                fix="use the base model, rank and targets of the run that saved it",
            )
        self.adapters.flat.data.copy_(tensors["adapters"])
        self.state = _state(record["counters"], tensors)
        if self.scaler and record["scaler"]:
            self.scaler = LossScaler(**record["scaler"])
        moments = {
            name.removeprefix("adam."): t.clone()
            for name, t in tensors.items()
            if name.startswith("adam.")
        }
        if moments:
            whole = self.optimizer.state_dict()
            whole["state"] = {0: moments}
            self.optimizer.load_state_dict(whole)
