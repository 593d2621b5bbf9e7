"""The loss head: cross-entropy of hidden states against a frozen head, without a full logits
tensor.

Only supervised rows reach it; they are handled in chunks; the gradient of the hidden states is
computed in the forward pass, while a chunk's probabilities are in cache; the head gets no weight
gradient. That is two products with the head per row where recomputation would need three
(Liger Kernel and TRL's chunked loss each do part of this; see docs/ARCHITECTURE.md).

Shapes: n supervised rows, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lorabatch.kernels.train_ops import train_ops
from lorabatch.model.functional import Context
from lorabatch.model.linear import FrozenLinear

# logits alive at once: 32 MiB in bf16; half and twice as many cost the same (docs/LOG.md)
CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class LossTerms:
    """What training adds to the negative log-likelihood of each token, lse being the log-sum-exp of
    its logits.

    ``(1 - smoothing) * nll + smoothing * mean over V of -log p + z * lse**2``.
    Sources: label smoothing, arXiv 1512.00567; z-loss, arXiv 2204.02311.
    """

    smoothing: float = 0.0
    z: float = 0.0


def cross_entropy_sum(
    hidden: Tensor, head: FrozenLinear, targets: Tensor, terms: LossTerms = LossTerms()
) -> Tensor:
    """Sum over rows of the loss in nats, fp32 scalar. hidden [n, H], targets [n]."""
    if torch.is_grad_enabled() and hidden.requires_grad:
        return _HeadLoss.apply(hidden, head, targets, terms)
    return _chunked(hidden, head, targets, terms, None)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, hidden: Tensor, head: FrozenLinear, targets: Tensor, terms: LossTerms
    ) -> Tensor:
        grad = torch.empty_like(hidden)
        loss = _chunked(hidden.detach(), head, targets, terms, grad)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Context, grad_loss: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grad * grad_loss.to(grad.dtype), None, None, None


def token_losses(hidden: Tensor, head: FrozenLinear, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each row in nats, fp32 [n]. hidden [n, H], targets [n]."""
    each = [
        row_losses(head.project(hidden[rows]), targets[rows]) for rows in _chunks(len(hidden), head)
    ]
    return torch.cat(each) if each else hidden.new_zeros(0, dtype=torch.float32)


def row_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of targets [n] by their logits [n, V] in nats, fp32 [n]."""
    return _rows(logits, targets, LossTerms(), with_grad=False)[0].flatten()


def _chunks(count: int, head: FrozenLinear) -> Iterator[slice]:
    rows = max(16, CHUNK_ELEMENTS // head.out_features)
    return (slice(start, start + rows) for start in range(0, count, rows))


def _chunked(
    hidden: Tensor, head: FrozenLinear, targets: Tensor, terms: LossTerms, grad: Tensor | None
) -> Tensor:
    """The loss; with ``grad`` [n, H] also fills in d loss / d hidden."""
    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for rows in _chunks(len(hidden), head):
        logits = head.project(hidden[rows])  # [rows, V]
        each, logits_grad = _rows(logits, targets[rows], terms, with_grad=grad is not None)
        loss += each.sum()
        if grad is not None:
            grad[rows] = head.input_grad(logits_grad.to(hidden.dtype))
    return loss


def _rows(
    logits: Tensor, targets: Tensor, terms: LossTerms, *, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """(loss of each row in fp32, its gradient by the logits [n, V] if wanted), by the fastest
    means."""
    ops = train_ops(logits)
    if ops is None:
        return _plain_rows(logits, targets[:, None], terms, with_grad=with_grad)
    each = ops.loss_rows(logits, targets, replace=with_grad, smoothing=terms.smoothing, z=terms.z)
    return each, logits


def _plain_rows(
    logits: Tensor, target: Tensor, terms: LossTerms, *, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """(loss of each row [n, 1] in fp32, its gradient by the logits [n, V] if wanted)."""
    log_sum = logits.float().logsumexp(dim=-1, keepdim=True)
    loss = (
        log_sum
        - (1 - terms.smoothing) * logits.gather(1, target).float()
        + terms.z * log_sum.square()
    )
    if terms.smoothing:
        loss -= terms.smoothing * logits.float().mean(dim=-1, keepdim=True)
    if not with_grad:
        return loss, logits
    # Softmax in the logits' own type: fp32 inside the kernel, half the traffic outside. fp16 would
    # lose small values.
    grad = logits.softmax(dim=-1, dtype=torch.float32 if logits.dtype == torch.float16 else None)
    if terms.z:
        grad.mul_((1 + 2 * terms.z * log_sum).to(grad.dtype))
    if terms.smoothing:
        grad.sub_(terms.smoothing / logits.shape[1])
    return loss, grad.scatter_add_(1, target, grad.new_full(target.shape, terms.smoothing - 1.0))
