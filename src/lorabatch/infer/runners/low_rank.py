"""Several adapters in one batch on torch's operators: rows lie grouped by adapter, and each group
gets its low-rank product. Where calls cost more than products (GPUs), all adapters are one product
and a mask says which part of it is whose.

The recorded program has an operation of its own for it (``infer/runners/packed.py``, ``ADAPTERS``
in ``kernels/step.cpp``); this is what serves every other machine, and its reference.

Shapes: T tokens of the flat batch, O output and I input features of a layer, R ranks of all its
parts and adapters together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorabatch.kernels.onednn import Dense, Product, packed_product
from lorabatch.model.attention import Segment
from lorabatch.model.decoder import Decoder
from lorabatch.model.linear import FrozenLinear, Part
from lorabatch.model.lora import LoraWeights
from lorabatch.model.varlen import ints

# rows of each adapter in a step from which each has its own products, on GPUs (not measured there)
ROWS_APART = 256


def by_adapter(segments: Sequence[Segment]) -> tuple[Sequence[Segment], list[int] | None]:
    """The segments with those of one adapter next to each other, and where each wanted hidden state
    of the given order is then found.

    None: they were in order. No bit depends on the order, because no row depends on its neighbours.
    """
    order = sorted(range(len(segments)), key=lambda i: segments[i].adapter)
    if order == list(range(len(segments))):
        return segments, None
    first, starts = 0, [0] * len(segments)
    for i in order:
        starts[i], first = first, first + segments[i].num_logits
    return [segments[i] for i in order], [
        starts[i] + j for i, s in enumerate(segments) for j in range(s.num_logits)
    ]


# number of the adapter, part of the layer, A [r, I], B [O of the part, r] with the scale
Update = tuple[int, Part, Tensor, Tensor]


@dataclass
class RowGroups:
    """The rows of each adapter in the step that runs. One object that all layers look at.
    ``stacked``: all adapters may be one product; ``apart_from``: rows of each from which they are
    not, None: always."""

    stacked: bool = False
    apart_from: int | None = ROWS_APART
    spans: list[tuple[int, slice]] = field(default_factory=list)
    of_row: Tensor | None = None  # [T, 1]: each row's adapter, where all are one product

    def set(self, segments: Sequence[Segment], device: torch.device) -> None:
        """segments: sorted by adapter."""
        self._find_spans(segments)
        rows = [segment.adapter for segment in segments for _ in segment.token_ids]
        few = self.apart_from is None or len(rows) < self.apart_from * len(self.spans)
        apart = not (self.stacked and few)
        self.of_row = None if apart else ints(rows, device, torch.long)[:, None]

    def _find_spans(self, segments: Sequence[Segment]) -> None:
        self.spans, stop = [], 0
        for segment in segments:
            start, stop = stop, stop + len(segment.token_ids)
            if self.spans and self.spans[-1][0] == segment.adapter:
                start = self.spans.pop()[1].start
            if segment.adapter >= 0:
                self.spans.append((segment.adapter, slice(start, stop)))


class GroupedProduct:
    """A layer's product plus what each group's adapter adds. Inference only: it has no backward
    pass."""

    def __init__(
        self,
        base: Product,
        layer: FrozenLinear,
        adapters: Sequence[LoraWeights],
        groups: RowGroups,
        like: Tensor,
    ) -> None:
        """like: a tensor of the decoder's type and device."""
        self.base, self._groups = base, groups
        self._stack = Stack(layer, adapters, like) if groups.stacked else None
        # Either's rows do not depend on how many there are.
        kind = packed_product if like.device.type == "cpu" else Dense
        # of each adapter: the part's columns, A and B with the scale
        self._updates: list[list[tuple[slice, Product, Product]]] = [[] for _ in adapters]
        pairs = self._stack.pairs if self._stack else _updates(layer, adapters)
        for number, part, a, b in pairs:
            self._updates[number].append(
                (slice(part.start, part.stop), kind(a.to(like)), kind(b.to(like)))
            )

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        y = self.base.forward(x, bias)
        if self._stack is not None and self._groups.of_row is not None:
            return self._stack.add(y, x, self._groups.of_row)
        for adapter, rows in self._groups.spans:
            for columns, a, b in self._updates[adapter]:
                y[rows, columns] += b.forward(a.forward(x[rows], None), None)
        return y


class Stack:
    """The adapters of one layer as two matrices: four calls a layer, however many adapters.
    ``pairs``: each one's own A and B, as views of them."""

    def __init__(self, layer: FrozenLinear, adapters: Sequence[LoraWeights], like: Tensor) -> None:
        """like: a tensor of the decoder's type and device."""
        found = list(_updates(layer, adapters))
        owners = [number for number, _, a, _ in found for _ in range(len(a))]
        self._owner = torch.tensor([owners], dtype=torch.long, device=like.device)
        self._a = like.new_zeros(len(owners), layer.in_features)
        self._b = like.new_zeros(len(owners), layer.out_features)
        self.pairs: list[Update] = []
        first = 0
        for number, part, a, b in found:
            rows, first = slice(first, first + len(a)), first + len(a)
            own_a, own_b = self._a[rows], self._b[rows, part.start : part.stop]
            own_a.copy_(a)
            own_b.copy_(b.t())
            self.pairs.append((number, part, own_a, own_b.t()))

    def add(self, y: Tensor, x: Tensor, of_row: Tensor) -> Tensor:
        """y [T, O] and what each row's adapter [T, 1] makes of x [T, I]; -1: none."""
        low = x @ self._a.t()  # [T, R]
        return y.addmm_(low.masked_fill_(self._owner != of_row, 0.0), self._b)


def _updates(layer: FrozenLinear, adapters: Sequence[LoraWeights]) -> Iterator[Update]:
    """All that there are."""
    for number, adapter in enumerate(adapters):
        for part in (p for p in layer.parts if p.path in adapter.pairs):
            yield number, part, *adapter.scaled(part.path)


def attach_adapters(
    decoder: Decoder, adapters: Sequence[LoraWeights], *, stacked: bool = False
) -> RowGroups:
    """Put the adapters on the decoder's products, in place of those that an earlier call put
    there."""
    groups = RowGroups(stacked)
    for layer in decoder.linears():
        base = layer.product.base if isinstance(layer.product, GroupedProduct) else layer.product
        layer.product = GroupedProduct(base, layer, adapters, groups, decoder.embedding)  # type: ignore[assignment]
    return groups
