"""What executes a step of the engine. Four serve: ``ProgramRunner`` replays a recorded program of
C++ kernels (CPUs that have them), ``NativeRunner`` runs the decoder on torch's operators
(everything else, and the reference that the others are tested against), ``GraphRunner`` is the same
with recorded steps (NVIDIA GPUs), ``HfRunner`` any other model through transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from lorabatch.errors import UnavailableError
from lorabatch.infer.requests import Request
from lorabatch.infer.runners.base import HiddenRunner
from lorabatch.infer.runners.eager import NativeRunner
from lorabatch.infer.runners.fixed import FixedRunner
from lorabatch.infer.runners.graph import GraphRunner
from lorabatch.infer.runners.hf import HfRunner
from lorabatch.infer.runners.program import unsupported
from lorabatch.infer.runners.recorded import ProgramRunner
from lorabatch.kernels.onednn import Dense
from lorabatch.model.attention import Segment
from lorabatch.model.hf import HfModel
from lorabatch.model.hub import ModelSource
from lorabatch.model.load import Model, load_model
from lorabatch.model.lora import LoraWeights
from lorabatch.model.native import NativeModel
from lorabatch.model.spec import ModelSpec, spec_from_config
from lorabatch.model.varlen import LOOP, operator_for


class Runner(Protocol):
    """What the engine needs. How hidden states become tokens is the runner's own business, so that
    a step can be one CUDA graph."""

    # admits a new batch only when the old one is done; takes whole prompts, then single tokens
    static: bool
    apart: bool  # a step reads prompts or decodes, see ``Scheduler``

    def step(self, segments: Sequence[Segment], requests: Sequence[Request]) -> list[list[int]]:
        """Read the tokens of all segments into their slots and choose what follows the last
        ``num_logits`` of each.

        segments: new tokens of some slots: prompts, pieces of them, single tokens, mixed. requests:
        whose they are. Returns the chosen tokens of each segment that wants any; NO_TOKEN where the
        model's numbers are not finite.
        """

    def copy(self, source: int, target: int, length: int) -> None:
        """The first ``length`` tokens that slot ``source`` holds are also in slot ``target``
        afterwards."""

    def clear(self, slot: int) -> None:
        """Nothing that this slot held can reach who has it next."""


def make_runner(
    model: Model,
    *,
    num_slots: int,
    capacity: int,
    max_tokens: int,
    quantize: str = "none",
    adapters: Sequence[LoraWeights] = (),
    fixed: bool = False,
) -> HiddenRunner:
    """The fastest runner of this machine for this model; fixed: where it records its steps, with
    shapes that never change. UnavailableError if ``quantize`` needs kernels that are not there."""
    if isinstance(model, HfModel):
        return HfRunner(model)
    assert isinstance(model, NativeModel)
    if programmed(model.spec, model.decoder.dtype, model.decoder.device, quantize=quantize):
        return ProgramRunner(
            model,
            num_slots=num_slots,
            capacity=capacity,
            max_tokens=max_tokens,
            quantize=quantize,
            adapters=adapters,
        )
    if not records_steps(model):
        return NativeRunner(model, num_slots=num_slots, capacity=capacity, adapters=adapters)
    if not fixed:
        return GraphRunner(model, num_slots=num_slots, capacity=capacity, adapters=adapters)
    return FixedRunner(
        model, num_slots=num_slots, capacity=capacity, max_tokens=max_tokens, adapters=adapters
    )


def records_steps(model: Model) -> bool:
    """Whether a model is on a GPU that replays recorded steps."""
    if not isinstance(model, NativeModel) or model.decoder.device.type != "cuda":
        return False
    decoder = model.decoder
    return operator_for(decoder.device, decoder.dtype, model.spec.head_dim) != LOOP


def programmed(
    spec: ModelSpec | None, dtype: torch.dtype, device: torch.device, *, quantize: str
) -> bool:
    """Whether a model runs as a recorded program here; spec: None if it has no native decoder.
    UnavailableError if only a program quantises."""
    why = "it has no native decoder" if spec is None else unsupported(spec, dtype, device)
    if why is not None and quantize != "none":
        raise UnavailableError(
            f"not possible here: {why}", where=f"--quantize {quantize}", fix="use --quantize none"
        )
    return why is None


def load_for_runner(
    source: ModelSource,
    config: Any,
    *,
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
    quantize: str,
    adapter_dir: Path | None = None,
) -> Model:
    """As ``model.load.load_model``; a program packs the weights itself, so they are kept plain for
    it. Errors: those of both."""
    plain = programmed(
        None if backend == "hf" else spec_from_config(config), dtype, device, quantize=quantize
    )
    product = (lambda weight, _: Dense(weight)) if plain else None
    return load_model(
        source,
        config,
        backend=backend,
        dtype=dtype,
        device=device,
        adapter_dir=adapter_dir,
        product=product,
    )
