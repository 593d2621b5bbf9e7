"""Attention of many sequences in one call, each with its own start and length: decoding, prompts,
later pieces of a prompt, and training.

On NVIDIA GPUs torch's own operators serve, whose starts and lengths are tensors on the device:
FlashAttention in half precision from compute capability 8.0 on, memory-efficient attention
elsewhere. Both are private to torch, so ``tests/model/test_varlen.py`` pins their schemas, and a
torch that lacks an argument gets torch's public attention instead, as CPUs do. A loop is the
reference of the tests. Never run on a GPU so far.

Shapes: T new tokens of all sequences, P keys of all sequences, B sequences, N query heads, K
key/value heads, G = N / K, D head size.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorabatch.kernels.variants import wanted
from lorabatch.model.functional import Context

FLASH, EFFICIENT, LOOP = "flash", "efficient", "loop"
# of the private operators: how many positional arguments, and which others; forward, then backward
USED = {
    "_flash_attention_forward": (10, {"window_size_left", "window_size_right", "seqused_k"}),
    "_flash_attention_backward": (14, {"window_size_left", "window_size_right"}),
    "_efficient_attention_forward": (11, {"seqlen_k", "window_size"}),
    "_efficient_attention_backward": (16, {"window_size"}),
}
EVERYTHING, FROM_THE_END = 0, 2  # masks of memory-efficient attention: none, causal at the last key
FLASH_HEAD_DIM = 256


def ints(values: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """The values on the device; nobody waits."""
    return host_tensor(values, device, dtype).to(device, non_blocking=True)


def host_tensor(values: Sequence[float], device: torch.device, dtype: torch.dtype) -> Tensor:
    """On the host, for a copy to the device: in memory that a GPU reads by itself."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")


@dataclass(frozen=True)
class Extents:
    """Where the new tokens and the keys of each sequence lie. Its last new token is at its last
    key."""

    q_starts: Tensor  # [B + 1] int32, in the rows of q; the last is T
    k_starts: Tensor  # [B + 1] int32, in the rows of the keys; the last is no sequence's
    k_lengths: Tensor | None  # [B] int32; None: each ends where the next begins
    max_q: int
    max_k: int


def operator_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Which of the three serves. The meta device, where shapes are all there is, stands for a new
    GPU. LORABATCH_KERNELS=off: none but the loop, so that torch's public attention does."""
    if device.type not in ("cuda", "meta") or wanted() == "off":
        return LOOP
    return _operator_for(device, dtype, head_dim)


@functools.cache
def _operator_for(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    if torch.version.hip is not None or head_dim % 8:
        return LOOP
    half = dtype in (torch.bfloat16, torch.float16)
    name = FLASH if half and head_dim <= FLASH_HEAD_DIM and _has_flash(device) else EFFICIENT
    return name if is_there(f"_{name}_attention") else LOOP


def _has_flash(device: torch.device) -> bool:
    return device.type == "meta" or (
        torch.cuda.get_device_capability(device) >= (8, 0)
        and torch.backends.cuda.is_flash_attention_available()
    )


def is_there(name: str) -> bool:
    """Whether this torch has the operator, forward and backward, with the arguments that we use."""
    schemas = [getattr(torch.ops.aten, f"{name}_{way}", None) for way in ("forward", "backward")]
    return all(op is not None and takes(op.default._schema, *USED[op.__name__]) for op in schemas)


def takes(schema: torch.FunctionSchema, positional: int, others: set[str]) -> bool:
    names = [argument.name for argument in schema.arguments if argument.kwarg_only]
    return len(schema.arguments) - len(names) == positional and others <= set(names)


def attend(
    q: Tensor, keys: Tensor, values: Tensor, extents: Extents, window: int | None = None
) -> Tensor:
    """Causal attention of q [T, N, D] to keys and values [P, K, D] -> [T, N, D]; no gradient.

    window: how many keys a token sees at most, its own among them.
    """
    kind = operator_for(q.device, q.dtype, q.shape[2])
    if kind == LOOP:
        return (single if extents.max_q == 1 else loop)(q, keys, values, extents, window)
    if kind == FLASH:
        return flash(q, keys, values, extents, window)[0]
    return _by_groups(q, keys, values, extents, window)


def attend_packed(
    q: Tensor, k: Tensor, v: Tensor, extents: Extents, window: int | None = None
) -> Tensor:
    """The same where the keys are those of the new tokens themselves (``extents`` says no lengths),
    with a gradient."""
    kind = operator_for(q.device, q.dtype, q.shape[2])
    if kind == LOOP:
        return loop(q, k, v, extents, window)
    return (_Flash if kind == FLASH else _Efficient).apply(q, k, v, extents, window)


def loop(
    q: Tensor, keys: Tensor, values: Tensor, extents: Extents, window: int | None = None
) -> Tensor:
    """The reference: one sequence after the other, in fp32, made of torch's public operators."""
    ends = extents.q_starts.tolist()
    firsts = extents.k_starts.tolist()
    lengths = [end - at for at, end in itertools.pairwise(firsts)]
    if extents.k_lengths is not None:
        lengths = extents.k_lengths.tolist()
    rows = [
        _one(q[at:end], keys[first : first + n], values[first : first + n], window)
        for at, end, first, n in zip(ends, ends[1:], firsts, lengths, strict=False)
    ]
    return torch.cat(rows).to(q.dtype)


def _one(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """One sequence: q [L, N, D], k and v [C, K, D] -> [L, N, D] in fp32."""
    length, heads, dim = q.shape
    grouped = q.float().view(length, k.shape[1], -1, dim)
    scores = torch.einsum("lkgd,ckd->kglc", grouped, k.float()) * dim**-0.5
    places = torch.arange(k.shape[0], device=q.device)
    distance = places[len(places) - length :, None] - places
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    return torch.einsum("kglc,ckd->lkgd", weights, v.float()).reshape(length, heads, dim)


def single(
    q: Tensor, keys: Tensor, values: Tensor, extents: Extents, window: int | None = None
) -> Tensor:
    """The reference for one new token of each sequence, in shapes that no length changes: it can be
    recorded."""
    assert extents.k_lengths is not None
    (rows, _, dim), shared = q.shape, keys.shape[1]
    places, lengths = torch.arange(extents.max_k, device=q.device), extents.k_lengths[:, None]
    at = (extents.k_starts[:-1, None] + places).clamp(max=len(keys) - 1).long()
    seen = extents.max_k if window is None else window
    hidden = (places >= lengths) | (places < lengths - seen)
    k, v = keys[at].float(), values[at].float().masked_fill(hidden[:, :, None, None], 0.0)
    scores = torch.einsum("nkgd,nckd->nkgc", q.float().view(rows, shared, -1, dim), k)
    scores = (scores * dim**-0.5).masked_fill(hidden[:, None, None], -torch.inf)
    return torch.einsum("nkgc,nckd->nkgd", scores.softmax(dim=-1), v).reshape(q.shape).to(q.dtype)


def flash(
    q: Tensor, keys: Tensor, values: Tensor, extents: Extents, window: int | None
) -> tuple[Tensor, ...]:
    """(output [T, N, D], log-sum-exps, two of random state) of FlashAttention."""
    return torch.ops.aten._flash_attention_forward(
        q,
        keys,
        values,
        extents.q_starts,
        extents.k_starts,
        extents.max_q,
        extents.max_k,
        0.0,
        True,
        False,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
        seqused_k=extents.k_lengths,
    )[:4]


def efficient(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    extents: Extents,
    window: int | None,
    mask: int,
    with_log_sums: bool = False,
) -> tuple[Tensor, ...]:
    """(output [T, H, D], log-sum-exps, two of random state) of memory-efficient attention; q, keys
    and values have the same number H of heads."""
    out, *others = torch.ops.aten._efficient_attention_forward(
        q[None],
        keys[None],
        values[None],
        None,
        extents.q_starts,
        extents.k_starts,
        extents.max_q,
        extents.max_k,
        0.0,
        mask,
        with_log_sums,
        seqlen_k=extents.k_lengths,
        window_size=window,
    )
    return (out[0], *others[:3])


def _by_groups(
    q: Tensor, keys: Tensor, values: Tensor, extents: Extents, window: int | None
) -> Tensor:
    """Memory-efficient attention knows no shared heads: single tokens of a group become rows of
    their sequence, longer ones take a call for each member of a group. No key is copied."""
    grouped = q.view(len(q), keys.shape[1], -1, q.shape[2])  # [T, K, G, D]
    if extents.max_q == 1:
        return _folded(grouped, keys, values, _last_keys(extents, window)).reshape(q.shape)
    members = grouped.unbind(2)
    outs = [efficient(m, keys, values, extents, window, FROM_THE_END)[0] for m in members]
    return torch.stack(outs, dim=2).view(q.shape)


def _folded(q: Tensor, keys: Tensor, values: Tensor, extents: Extents) -> Tensor:
    """Single tokens q [T, K, G, D], whose groups see the same keys -> [T, K, G, D]."""
    rows, (_, shared, groups, dim) = q.transpose(1, 2), q.shape
    folded = replace(extents, q_starts=extents.q_starts * groups, max_q=groups)
    flat = rows.reshape(-1, shared, dim)
    out = efficient(flat, keys, values, folded, None, EVERYTHING)[0]
    return out.view(rows.shape).transpose(1, 2)


def _last_keys(extents: Extents, window: int | None) -> Extents:
    """What single tokens see: a window is the last keys."""
    if window is None:
        return extents
    assert extents.k_lengths is not None
    beyond = (extents.k_lengths - window).clamp(min=0)
    starts = extents.k_starts.clone()
    starts[:-1] += beyond
    return replace(extents, k_starts=starts, k_lengths=extents.k_lengths - beyond)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, q: Tensor, k: Tensor, v: Tensor, extents: Extents, window: int | None
    ) -> Tensor:
        out, *others = flash(q, k, v, extents, window)
        ctx.save_for_backward(q, k, v, out, *others)
        ctx.extents, ctx.window = extents, window
        return out

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sums, *random = ctx.saved_tensors
        extents, window = ctx.extents, ctx.window
        grads = torch.ops.aten._flash_attention_backward(
            grad.contiguous(),
            q,
            k,
            v,
            out,
            log_sums,
            extents.q_starts,
            extents.k_starts,
            extents.max_q,
            extents.max_k,
            0.0,
            True,
            *random,
            window_size_left=None if window is None else window - 1,
            window_size_right=None if window is None else 0,
        )
        return (*grads, None, None)


class _Efficient(torch.autograd.Function):
    """Shared heads are repeated, and repeated again for the gradient rather than kept."""

    @staticmethod
    def forward(
        ctx: Context, q: Tensor, k: Tensor, v: Tensor, extents: Extents, window: int | None
    ) -> Tensor:
        keys, values = _repeated(k, q), _repeated(v, q)
        out, *others = efficient(q, keys, values, extents, window, FROM_THE_END, True)
        ctx.save_for_backward(q, k, v, out, *others)
        ctx.extents, ctx.window = extents, window
        return out

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sums, *random = ctx.saved_tensors
        extents = ctx.extents
        dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
            grad.contiguous()[None],
            q[None],
            _repeated(k, q)[None],
            _repeated(v, q)[None],
            None,
            out[None],
            extents.q_starts,
            extents.k_starts,
            extents.max_q,
            extents.max_k,
            log_sums,
            0.0,
            *random,
            FROM_THE_END,
            False,
            window_size=ctx.window,
        )
        return dq[0], _summed(dk[0], k), _summed(dv[0], v), None, None


def _repeated(shared: Tensor, q: Tensor) -> Tensor:
    """[T, K, D] -> [T, N, D]"""
    return shared.repeat_interleave(q.shape[1] // shared.shape[1], dim=1)


def _summed(grad: Tensor, shared: Tensor) -> Tensor:
    """[T, N, D] -> [T, K, D]"""
    tokens, heads, dim = shared.shape
    return grad.view(tokens, heads, -1, dim).sum(2)
