"""The loss head: cross-entropy of hidden states against a frozen head, without a full logits tensor.

Only supervised rows reach it; they are handled in chunks; the gradient of the hidden states is
computed in the forward pass, while a chunk's probabilities are in cache; the head gets no weight
gradient. That is two products with the head per row where recomputation would need three
(Liger Kernel and TRL's chunked loss each do part of this; see docs/ARCHITECTURE.md).

Shapes: n supervised rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lorabatch.model.linear import FrozenLinear

CHUNK_ELEMENTS = 1 << 22  # logits alive at once: 8 MiB in bf16, about what a core's share of the caches holds


def cross_entropy_sum(hidden: Tensor, head: FrozenLinear, targets: Tensor) -> Tensor:
    """Sum of negative log-likelihoods in nats, fp32 scalar. hidden [n, H], targets [n]."""
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _HeadLoss.apply(hidden, head, targets)
    return _chunked(hidden, head, targets, None)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: FrozenLinear, targets: Tensor) -> Tensor:
        grad = torch.empty_like(hidden)
        loss = _chunked(hidden.detach(), head, targets, grad)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_loss.to(grad.dtype), None, None


def _chunked(hidden: Tensor, head: FrozenLinear, targets: Tensor, grad: Tensor | None) -> Tensor:
    """The loss; with ``grad`` [n, H] also fills in d loss / d hidden."""
    rows = max(16, CHUNK_ELEMENTS // head.out_features)
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start in range(0, hidden.shape[0], rows):
        chunk, target = hidden[start : start + rows], targets[start : start + rows, None]
        logits = head.product.forward(chunk, head.bias)  # [rows, V]
        log_sum = logits.float().logsumexp(dim=-1, keepdim=True)
        loss += (log_sum - logits.gather(1, target).float()).sum()
        if grad is not None:
            # Softmax in the logits' own type: fp32 inside the kernel, half the traffic outside. fp16 would lose small values.
            probabilities = logits.softmax(dim=-1, dtype=torch.float32 if logits.dtype == torch.float16 else None)
            probabilities.scatter_add_(1, target, probabilities.new_full(target.shape, -1.0))
            grad[start : start + rows] = head.product.input_grad(probabilities.to(hidden.dtype))
    return loss
