"""The native backend: our decoder behind the few methods that training and inference call."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorabatch.model.attention import PackedAttention
from lorabatch.model.decoder import Decoder
from lorabatch.model.linear import Route
from lorabatch.model.lora import AdapterSet, LoraWeights, attach, load_adapter
from lorabatch.model.lora_settings import LoraSettings
from lorabatch.model.loss import LossTerms, cross_entropy_sum
from lorabatch.model.spec import ModelSpec
from lorabatch.model.weights import MakeProduct, build_decoder, checked, fingerprint, linear_shapes, read_checkpoint


@dataclass(frozen=True)
class Share:
    """One run's documents in a pass that several runs share."""

    token_ids: Sequence[Tensor]
    first_targets: Sequence[int]
    adapters: AdapterSet
    terms: LossTerms
    dropout: torch.Generator | None  # of training


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

    def attach(self, settings: LoraSettings, *, seed: int) -> AdapterSet:
        return attach(self.decoder, settings, seed=seed)

    def train(self, mode: bool = True) -> None:
        self.decoder.train(mode)

    def loss_sum(self, token_ids: Sequence[Tensor], first_targets: Sequence[int]) -> Tensor:
        """Sum of negative log-likelihoods (nats) of the supervised tokens of some documents, as one packed block.

        token_ids: one [L] tensor a document; first_targets: where its supervision begins (>= 1).
        """
        (loss,) = self._loss_sums([(token_ids, first_targets, self.terms)])
        return loss

    def shared_loss_sums(self, shares: Sequence[Share]) -> list[Tensor]:
        """``loss_sum`` of each share, in one pass: base products over all rows, each share's adapters on its own.

        The layers keep the routes until the next pass: ``--checkpointing full`` computes them again in the backward pass.
        """
        lengths = [sum(map(len, share.token_ids)) for share in shares]
        rows = [slice(stop - n, stop) for n, stop in zip(lengths, itertools.accumulate(lengths), strict=True)]
        for layer in self.decoder.linears():
            layer.routes = [
                Route(where, tuple(share.adapters.places[layer]), share.adapters.settings.dropout, share.dropout)
                for where, share in zip(rows, shares, strict=True)
                if layer in share.adapters.places
            ]
        return self._loss_sums([(share.token_ids, share.first_targets, share.terms) for share in shares])

    def _loss_sums(self, groups: Sequence[tuple[Sequence[Tensor], Sequence[int], LossTerms]]) -> list[Tensor]:
        documents = [ids for token_ids, _, _ in groups for ids in token_ids]
        lengths = [len(ids) for ids in documents]
        device = self.decoder.device
        ids, positions = (t.to(device, non_blocking=True) for t in (torch.cat(documents), torch.cat([torch.arange(n) for n in lengths])))
        hidden = self.decoder(ids, positions, PackedAttention(lengths))
        losses, start = [], 0
        for token_ids, first_targets, terms in groups:
            places = []
            for document, first in zip(token_ids, first_targets, strict=True):
                places.append(torch.arange(start + first, start + len(document)))
                start += len(document)
            targets_at = torch.cat(places).to(device, non_blocking=True)
            terms = terms if self.decoder.training else LossTerms()
            losses.append(cross_entropy_sum(hidden[targets_at - 1], self.decoder.head, ids[targets_at], terms))
        return losses


class OneOfSeveral:
    """The model as one of the runs over it sees it: through its own adapters."""

    def __init__(self, model: NativeModel, adapters: AdapterSet) -> None:
        self._model, self._adapters = model, adapters

    def train(self, mode: bool = True) -> None:
        self._model.train(mode)

    def loss_sum(self, token_ids: Sequence[Tensor], first_targets: Sequence[int]) -> Tensor:
        (loss,) = self._model.shared_loss_sums([Share(token_ids, first_targets, self._adapters, LossTerms(), None)])
        return loss
