"""The native backend: our decoder behind the few methods that training and inference call."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lorabatch.model.attention import PackedAttention
from lorabatch.model.decoder import Decoder, Layer
from lorabatch.model.fused import passes_for
from lorabatch.model.lora import AdapterSet, LoraWeights, attach, load_adapter
from lorabatch.model.lora_settings import LoraSettings
from lorabatch.model.loss import LossTerms, cross_entropy_sum
from lorabatch.model.spec import ModelSpec
from lorabatch.model.weights import MakeProduct, build_decoder, checked, fingerprint, linear_shapes, read_checkpoint


class NativeModel:
    """A base model, with fresh adapters after ``attach``, or with one merged in from the start."""

    backend = "native"
    identity = ""  # hash of the files that it was loaded from

    def __init__(self, spec: ModelSpec, decoder: Decoder, base_fingerprint: str, *, adapter: LoraWeights | None = None) -> None:
        self.spec, self.decoder, self.base_fingerprint, self.adapter = spec, decoder, base_fingerprint, adapter
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
        """Read a checkpoint; an adapter is checked against it, then merged in fp32 before the one cast to ``dtype``."""
        tensors = checked(spec, read_checkpoint(folder), where=folder)
        base = fingerprint(spec, tensors)
        adapter = None if adapter_dir is None else load_adapter(adapter_dir, linear_shapes(spec), base_fingerprint=base)
        decoder = build_decoder(spec, tensors, dtype=dtype, device=device, merge=adapter.delta if adapter else None, product=product)
        return cls(spec, decoder, base, adapter=adapter)

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        return linear_shapes(self.spec)

    @property
    def num_base_params(self) -> int:
        """Parameters of the base model, the tied head counted once."""
        linears = sum(
            layer.in_features * layer.out_features + (0 if layer.bias is None else layer.out_features) for layer in self.decoder.linears()
        )
        norms = sum(
            0 if t is None else t.numel()
            for m in self.decoder.modules()
            for t in (getattr(m, "weight", None), getattr(m, "bias", None))
            if hasattr(m, "eps")
        )
        positions = 0 if self.decoder.position_embedding is None else self.decoder.position_embedding.numel()
        tables = self.decoder.embedding.numel() * (1 if self.spec.tied_head else 2)
        return linears + norms + positions + tables

    @property
    def base_bytes(self) -> int:
        """Memory of the frozen weights on this rank, without what a product packs besides."""

        def size(tensor: Tensor) -> int:
            return tensor.numel() * tensor.element_size()

        products: list[Any] = [layer.product for layer in self.decoder.linears()]
        tables = size(self.decoder.embedding) * (1 if self.spec.tied_head else 2)
        return tables + sum(p.num_bytes if hasattr(p, "num_bytes") else size(p.weight) for p in products)

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

    def slower_paths(self) -> list[str]:
        """What torch's operators do in a training pass although there are kernels for it, and why."""
        if passes_for(self.decoder.embedding) is None:
            return []
        reasons = {
            f"attention ({layer.attention_why_not})"
            for layer in cast("Iterator[Layer]", iter(self.decoder.layers))
            if layer.attention_why_not
        }
        reasons |= {f"adapters ({layer.adapters_why_not})" for layer in self.decoder.linears() if layer.adapters_why_not}
        return sorted(reasons)

    def train(self, mode: bool = True) -> None:
        self.decoder.train(mode)

    def loss_sum(self, token_ids: Sequence[Tensor], first_targets: Sequence[int]) -> Tensor:
        """Sum of negative log-likelihoods (nats) of the supervised tokens of some documents, as one packed block.

        token_ids: one [L] tensor a document; first_targets: where its supervision begins (>= 1).
        """
        lengths = [len(ids) for ids in token_ids]
        starts = itertools.accumulate(lengths, initial=0)
        supervised = [torch.arange(start + first, start + n) for start, first, n in zip(starts, first_targets, lengths, strict=False)]
        positions = torch.cat([torch.arange(n) for n in lengths])
        ids, positions, targets_at = (
            t.to(self.decoder.device, non_blocking=True) for t in (torch.cat(list(token_ids)), positions, torch.cat(supervised))
        )
        hidden = self.decoder(ids, positions, PackedAttention(lengths))
        terms = self.terms if self.decoder.training else LossTerms()
        return cross_entropy_sum(hidden[targets_at - 1], self.decoder.head, ids[targets_at], terms)
