"""Several adapters in one batch on torch's operators: rows lie grouped by adapter, and each group gets its low-rank product.

The recorded program has an operation of its own for it (``infer/packed.py``, ``LOW_RANK`` in ``kernels/step.cpp``); this is what serves
every other machine, and its reference.

Shapes: T tokens of the flat batch, O output and I input features of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from lorabatch.model.attention import Segment
from lorabatch.model.decoder import Decoder
from lorabatch.model.linear import Dense, FrozenLinear, Product, packed_product
from lorabatch.model.lora import LoraWeights


def by_adapter(segments: Sequence[Segment]) -> tuple[Sequence[Segment], list[int] | None]:
    """The segments with those of one adapter next to each other, and where each wanted hidden state of the given order is then found.

    None: they were in order. No bit depends on the order, because no row depends on its neighbours.
    """
    order = sorted(range(len(segments)), key=lambda i: segments[i].adapter)
    if order == list(range(len(segments))):
        return segments, None
    first, starts = 0, [0] * len(segments)
    for i in order:
        starts[i], first = first, first + segments[i].num_logits
    return [segments[i] for i in order], [starts[i] + j for i, s in enumerate(segments) for j in range(s.num_logits)]


@dataclass
class RowGroups:
    """The rows of each adapter in the step that runs. One object that all layers look at."""

    spans: list[tuple[int, slice]] = field(default_factory=list)

    def set(self, segments: Sequence[Segment]) -> None:
        """segments: sorted by adapter."""
        self.spans, stop = [], 0
        for segment in segments:
            start, stop = stop, stop + len(segment.token_ids)
            if self.spans and self.spans[-1][0] == segment.adapter:
                start = self.spans.pop()[1].start
            if segment.adapter >= 0:
                self.spans.append((segment.adapter, slice(start, stop)))


class GroupedProduct:
    """A layer's product plus what each group's adapter adds. Inference only: it has no backward pass."""

    def __init__(self, base: Product, layer: FrozenLinear, adapters: Sequence[LoraWeights], groups: RowGroups, like: Tensor) -> None:
        """like: a tensor of the decoder's type and device."""
        self.base, self._groups = base, groups
        # Either's rows do not depend on how many there are.
        kind = packed_product if like.device.type == "cpu" else Dense
        self._updates: list[list[tuple[slice, Product, Product]]] = []  # of each adapter: the part's columns, A and B with the scale
        for adapter in adapters:
            self._updates.append([])
            for part in (p for p in layer.parts if p.path in adapter.pairs):
                a, b = adapter.scaled(part.path)
                self._updates[-1].append((slice(part.start, part.stop), kind(a.to(like)), kind(b.to(like))))

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = self.base.forward(x, bias)
        for adapter, rows in self._groups.spans:
            for columns, a, b in self._updates[adapter]:
                y[rows, columns] += b.forward(a.forward(x[rows], None), None)
        return y


def attach_bank(decoder: Decoder, adapters: Sequence[LoraWeights]) -> RowGroups:
    """Put the adapters on the decoder's products, in place of those that an earlier call put there."""
    groups = RowGroups()
    for layer in decoder.linears():
        base = layer.product.base if isinstance(layer.product, GroupedProduct) else layer.product
        layer.product = GroupedProduct(base, layer, adapters, groups, decoder.embedding)  # type: ignore[assignment]
    return groups
