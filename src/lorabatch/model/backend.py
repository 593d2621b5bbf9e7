"""What training needs of a base model, whoever computes it: the native decoder (``native.py``) or
transformers and peft (``hf.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from lorabatch.corpus.tokens import Targets
from lorabatch.model.lora import AdapterSet
from lorabatch.model.lora_settings import LoraSettings
from lorabatch.model.loss import LossTerms
from lorabatch.model.spec import ModelSpec


class Backend(Protocol):
    """A frozen base, with fresh adapters between ``attach`` and ``detach``."""

    @property
    def backend(self) -> str:
        """Its name in records and on the command line."""

    @property
    def identity(self) -> str:
        """Hash of the files that it was loaded from."""

    @property
    def spec(self) -> ModelSpec | None:
        """None for an architecture that is not described."""

    @property
    def base_fingerprint(self) -> str | None:
        """Hash of the base's weights, however they are stored."""

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether its linear layers hold their weights transposed, as GPT-2's."""

    @property
    def num_base_params(self) -> int:
        """The tied head counted once."""

    @property
    def base_bytes(self) -> int:
        """Memory of the frozen weights on this rank."""

    def configure(self, terms: LossTerms, checkpointing: str) -> None:
        """Settings of the training pass. UsageError for what it does not do."""

    def attach(self, settings: LoraSettings, *, seed: int) -> AdapterSet:
        """Fresh adapters that change nothing yet. UsageError for targets that it does not have."""

    def detach(self) -> None:
        """Take the adapters of ``attach`` off again."""

    def slower_paths(self) -> list[str]:
        """What torch's operators do in a training pass although there are kernels for it, and
        why."""

    def train(self, mode: bool = True) -> None:
        """Whether adapters' dropout and the terms of training's loss apply."""

    def loss_sum(self, token_ids: Sequence[Tensor], targets: Sequence[Targets]) -> Tensor:
        """Sum of negative log-likelihoods (nats) of the supervised tokens of some documents.

        token_ids: one [L] tensor a document; targets: which of its tokens are supervised.
        """

    def token_nll(self, token_ids: Sequence[Tensor], targets: Sequence[Targets]) -> list[Tensor]:
        """Negative log-likelihood (nats, fp32) of every supervised token, one [n] tensor a
        document. Without gradient, and without what training adds to its loss. Arguments: those of
        ``loss_sum``.
        """
