"""The native backend: our decoder behind the few methods that training and inference call."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lorabatch.corpus.tokens import Targets, num_targets, spans_of
from lorabatch.kernels.train_ops import train_ops
from lorabatch.model.attention import PackedAttention
from lorabatch.model.decoder import Decoder, Layer
from lorabatch.model.lora import AdapterSet, LoraWeights, attach, load_adapter, put_on
from lorabatch.model.lora_settings import LoraSettings
from lorabatch.model.loss import LossTerms, cross_entropy_sum, token_losses
from lorabatch.model.spec import ModelSpec
from lorabatch.model.weights import (
    MakeProduct,
    build_decoder,
    checked,
    fingerprint,
    linear_shapes,
    read_checkpoint,
)


class NativeModel:
    """A base model, with fresh adapters after ``attach``, or with one merged in from the start."""

    backend = "native"
    identity = ""  # hash of the files that it was loaded from

    def __init__(
        self,
        spec: ModelSpec,
        decoder: Decoder,
        base_fingerprint: str,
        *,
        adapter: LoraWeights | None = None,
    ) -> None:
        self.spec, self.decoder, self.base_fingerprint, self.adapter = (
            spec,
            decoder,
            base_fingerprint,
            adapter,
        )
        self.max_positions, self.vocab_size = spec.max_positions, spec.vocab_size
        self.fan_in_fan_out = spec.family == "gpt2"
        self.terms = LossTerms()  # of training; evaluation is the negative log-likelihood

    @classmethod
    def load(
        cls,
        folder: Path,
        spec: ModelSpec,
        *,
        dtype: torch.dtype,
        device: torch.device,
        adapter_dir: Path | None = None,
        product: MakeProduct | None = None,
    ) -> NativeModel:
        """Read a checkpoint; an adapter is checked against it, then merged in fp32 before the one
        cast to ``dtype``."""
        tensors = checked(spec, read_checkpoint(folder), where=folder)
        base = fingerprint(spec, tensors)
        adapter = (
            None
            if adapter_dir is None
            else load_adapter(adapter_dir, linear_shapes(spec), base_fingerprint=base)
        )
        decoder = build_decoder(
            spec,
            tensors,
            dtype=dtype,
            device=device,
            merge=adapter.delta if adapter else None,
            product=product,
        )
        return cls(spec, decoder, base, adapter=adapter)

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        return linear_shapes(self.spec)

    @property
    def num_base_params(self) -> int:
        """Parameters of the base model, the tied head counted once."""
        linears = sum(
            layer.in_features * layer.out_features
            + (0 if layer.bias is None else layer.out_features)
            for layer in self.decoder.linears()
        )
        norms = sum(
            0 if t is None else t.numel()
            for m in self.decoder.modules()
            for t in (getattr(m, "weight", None), getattr(m, "bias", None))
            if hasattr(m, "eps")
        )
        positions = (
            0
            if self.decoder.position_embedding is None
            else self.decoder.position_embedding.numel()
        )
        tables = self.decoder.embedding.numel() * (1 if self.spec.tied_head else 2)
        return linears + norms + positions + tables

    @property
    def base_bytes(self) -> int:
        """Memory of the frozen weights on this rank, without what a product packs besides."""

        def size(tensor: Tensor) -> int:
            return tensor.numel() * tensor.element_size()

        products: list[Any] = [layer.product for layer in self.decoder.linears()]
        tables = size(self.decoder.embedding) * (1 if self.spec.tied_head else 2)
        return tables + sum(
            p.num_bytes if hasattr(p, "num_bytes") else size(p.weight) for p in products
        )

    def configure(self, terms: LossTerms, checkpointing: str) -> None:
        """Settings of the training pass."""
        self.terms = terms
        for layer in cast("Iterator[Layer]", iter(self.decoder.layers)):
            layer.checkpointing = checkpointing

    def attach(self, settings: LoraSettings, *, seed: int) -> AdapterSet:
        return attach(self.decoder, settings, seed=seed)

    def detach(self) -> None:
        """Take the adapters of ``attach`` off again."""
        for layer in self.decoder.linears():
            layer.adapters.clear()
            layer.dropout = 0.0

    @contextmanager
    def wearing(self, weights: LoraWeights | None) -> Iterator[None]:
        """The base with a trained adapter, unmerged, for what runs inside; None: the base alone."""
        if weights is not None:
            put_on(self.decoder, weights)
        try:
            yield
        finally:
            self.detach()

    def slower_paths(self) -> list[str]:
        """What torch's operators do in a training pass although there are kernels for it, and
        why."""
        if train_ops(self.decoder.embedding) is None:
            return []
        reasons = {
            f"attention ({layer.attention_why_not})"
            for layer in cast("Iterator[Layer]", iter(self.decoder.layers))
            if layer.attention_why_not
        }
        reasons |= {
            f"adapters ({layer.adapters_why_not})"
            for layer in self.decoder.linears()
            if layer.adapters_why_not
        }
        return sorted(reasons)

    def train(self, mode: bool = True) -> None:
        self.decoder.train(mode)

    def loss_sum(self, token_ids: Sequence[Tensor], targets: Sequence[Targets]) -> Tensor:
        """Sum of negative log-likelihoods (nats) of the supervised tokens of some documents, as one
        packed block.

        token_ids: one [L] tensor a document; targets: which of its tokens are supervised.
        """
        hidden, wanted = self._supervised(token_ids, targets)
        terms = self.terms if self.decoder.training else LossTerms()
        return cross_entropy_sum(hidden, self.decoder.head, wanted, terms)

    @torch.no_grad()
    def token_nll(self, token_ids: Sequence[Tensor], targets: Sequence[Targets]) -> list[Tensor]:
        """As ``Backend.token_nll``; ``loss_sum`` of an evaluation adds up the same numbers."""
        hidden, wanted = self._supervised(token_ids, targets)
        counts = [num_targets(t, len(ids)) for ids, t in zip(token_ids, targets, strict=True)]
        return list(token_losses(hidden, self.decoder.head, wanted).split(counts))

    def _supervised(
        self, token_ids: Sequence[Tensor], targets: Sequence[Targets]
    ) -> tuple[Tensor, Tensor]:
        """(hidden states that predict the supervised tokens [n, H], these tokens [n])."""
        lengths = [len(ids) for ids in token_ids]
        starts = itertools.accumulate(lengths, initial=0)
        supervised = [
            torch.arange(start + a, start + b)
            for start, wanted, n in zip(starts, targets, lengths, strict=False)
            for a, b in spans_of(wanted, n)
        ]
        positions = torch.cat([torch.arange(n) for n in lengths])
        ids, positions, targets_at = (
            t.to(self.decoder.device, non_blocking=True)
            for t in (torch.cat(list(token_ids)), positions, torch.cat(supervised))
        )
        hidden = self.decoder(ids, positions, PackedAttention(lengths))
        return hidden[targets_at - 1], ids[targets_at]
