"""Hugging Face checkpoints to decoders: names, transpositions, fusing, merging, checks.

Only formats that cannot run code are read: safetensors, and ``pytorch_model.bin`` through
``weights_only=True``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorabatch.errors import DataError
from lorabatch.model.decoder import Decoder, Layer, Norm
from lorabatch.model.linear import FrozenLinear, Part, Product
from lorabatch.model.spec import ModelSpec
from lorabatch.model.tensorfiles import read_safetensors
from lorabatch.records import read_json

MergeDelta = Callable[[str], Tensor | None]
"""Path of a linear layer -> the fp32 update [O, I] to add before casting, or None."""
MakeProduct = Callable[[Tensor, list[int]], Product]
"""A layer's weight [O, I], cast and placed, and the rows of each of its parts -> how it is kept: quantised, sharded."""


@dataclass(frozen=True)
class Names:
    """Where a family keeps its weights. ``{i}`` is the layer; tuples are fused in this order."""

    embedding: str
    positions: str | None
    norm: str
    norm1: str
    norm2: str
    qkv: tuple[str, ...]
    out: tuple[str, ...]
    up: tuple[str, ...]
    down: tuple[str, ...]
    transposed: bool  # Conv1D: stored [I, O]


FAMILY_NAMES = {
    "llama": Names(
        embedding="model.embed_tokens",
        positions=None,
        norm="model.norm",
        norm1="model.layers.{i}.input_layernorm",
        norm2="model.layers.{i}.post_attention_layernorm",
        qkv=tuple(f"model.layers.{{i}}.self_attn.{n}_proj" for n in "qkv"),
        out=("model.layers.{i}.self_attn.o_proj",),
        up=("model.layers.{i}.mlp.gate_proj", "model.layers.{i}.mlp.up_proj"),
        down=("model.layers.{i}.mlp.down_proj",),
        transposed=False,
    ),
    "gpt2": Names(
        embedding="transformer.wte",
        positions="transformer.wpe",
        norm="transformer.ln_f",
        norm1="transformer.h.{i}.ln_1",
        norm2="transformer.h.{i}.ln_2",
        qkv=("transformer.h.{i}.attn.c_attn",),
        out=("transformer.h.{i}.attn.c_proj",),
        up=("transformer.h.{i}.mlp.c_fc",),
        down=("transformer.h.{i}.mlp.c_proj",),
        transposed=True,
    ),
}

_NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")


def read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder by name. DataError when there are none or a shard is missing."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        missing = [s for s in shards if not (folder / s).exists()]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(shards)} weight files are missing ({missing[0]})", where=folder, fix="fetch the model again"
            )
        return {k: v for shard in shards for k, v in read_safetensors(folder / shard).items()}
    if (folder / "model.safetensors").exists():
        return read_safetensors(folder / "model.safetensors")
    if (folder / "pytorch_model.bin").exists():
        try:
            return torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
        except Exception as error:  # a class for each kind of damage, and one for what could run code
            what = f"not readable as weights alone ({str(error).splitlines()[0]})"
            raise DataError(what, where=folder / "pytorch_model.bin", fix="use a safetensors copy of the model") from None
    raise DataError(
        "no weights (model.safetensors, model.safetensors.index.json or pytorch_model.bin)", where=folder, fix="is this a model folder?"
    )


def fingerprint(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> str:
    """Identity of a base model: its spec and 16 values of every tensor, rounded to bf16.

    The rounding makes an fp32 copy and the bf16 original the same base, as they are for an adapter.
    """
    digest = hashlib.sha256(spec.digest().encode())
    for name in sorted(n for n in tensors if n != "lm_head.weight"):
        flat = tensors[name].reshape(-1)
        sample = flat[:: max(1, flat.numel() // 16)][:16].to(torch.bfloat16).contiguous()
        digest.update(f"{name}{tuple(tensors[name].shape)}".encode())
        digest.update(sample.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def normalised(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as the family's transformers class has them, without buffers and tied copies."""
    prefix = "" if spec.family != "gpt2" or any(n.startswith("transformer.") for n in tensors) else "transformer."
    kept = {}
    for name, tensor in tensors.items():
        if name.endswith(_NOT_WEIGHTS) or (name == "lm_head.weight" and spec.tied_head):
            continue
        kept[name if name == "lm_head.weight" else prefix + name] = tensor
    return kept


class _Source:
    """Hands out each tensor once, cast and placed; what is missing or left over is an error."""

    def __init__(
        self, tensors: Mapping[str, Tensor], *, transposed: bool, dtype: torch.dtype, device: torch.device, product: MakeProduct | None
    ) -> None:
        self._left, self._product = dict(tensors), product
        self._transposed, self._dtype, self._device = transposed, dtype, device

    def take(self, name: str) -> Tensor:
        if name not in self._left:
            raise DataError(f"the checkpoint lacks '{name}'", fix="is this folder complete, and its config.json its own?")
        return self._left.pop(name).detach()

    def cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(device=self._device, dtype=self._dtype).contiguous()

    def norm(self, path: str, eps: float) -> Norm:
        bias = self.cast(self.take(f"{path}.bias")) if f"{path}.bias" in self._left else None
        return Norm(self.cast(self.take(f"{path}.weight")), bias, eps)

    def linear(self, paths: tuple[str, ...], merge: MergeDelta | None, prepack: bool) -> FrozenLinear:
        """Fuse the layers at ``paths`` into one; merging happens in fp32, before the one rounding."""
        weights, biases, parts, start = [], [], [], 0
        for path in paths:
            weight = self.take(f"{path}.weight")
            weight = weight.t() if self._transposed else weight
            delta = merge(path) if merge else None
            if delta is not None:
                weight = weight.to(torch.float32) + delta.to(torch.float32)
            weights.append(self.cast(weight))
            has_bias = f"{path}.bias" in self._left
            biases.append(self.cast(self.take(f"{path}.bias")) if has_bias else None)
            parts.append(Part(path, start, start + weight.shape[0]))
            start += weight.shape[0]
        bias = None
        if any(b is not None for b in biases):
            bias = torch.cat([w.new_zeros(w.shape[0]) if b is None else b for w, b in zip(weights, biases, strict=True)])
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        layer = FrozenLinear(weight, bias, parts, prepack=prepack and self._product is None)
        if self._product is not None:
            layer.product = self._product(weight, [w.shape[0] for w in weights])  # the dense weight is dropped here, one layer at a time
        return layer

    def check_empty(self) -> None:
        if self._left:
            names = ", ".join(sorted(self._left)[:3])
            raise DataError(f"{len(self._left)} tensors that this architecture does not have ({names})", fix="use --backend hf")


def build_decoder(
    spec: ModelSpec,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    merge: MergeDelta | None = None,
    prepack: bool = True,
    product: MakeProduct | None = None,
) -> Decoder:
    """A decoder from a checkpoint's tensors; with ``merge``, adapters are added to its weights; ``product``
    stores the layers' weights in another way (the head, which may be the embedding, stays as it is).

    Raises DataError for missing or unknown tensors.
    """
    names, device = FAMILY_NAMES[spec.family], torch.device(device)
    source = _Source(normalised(spec, tensors), transposed=names.transposed, dtype=dtype, device=device, product=product)
    pack = prepack and device.type == "cpu"
    embedding = source.cast(source.take(f"{names.embedding}.weight"))
    positions = source.cast(source.take(f"{names.positions}.weight")) if names.positions else None

    def at(paths: tuple[str, ...], i: int) -> tuple[str, ...]:
        return tuple(p.format(i=i) for p in paths)

    layers = []
    for i in range(spec.num_layers):
        attention = f"model.layers.{i}.self_attn"
        layers.append(
            Layer(
                spec,
                i,
                norm1=source.norm(names.norm1.format(i=i), spec.norm_eps),
                qkv=source.linear(at(names.qkv, i), merge, pack),
                out=source.linear(at(names.out, i), merge, pack),
                norm2=source.norm(names.norm2.format(i=i), spec.norm_eps),
                up=source.linear(at(names.up, i), merge, pack),
                down=source.linear(at(names.down, i), merge, pack),
                q_norm=source.norm(f"{attention}.q_norm", spec.norm_eps) if spec.qk_norm else None,
                k_norm=source.norm(f"{attention}.k_norm", spec.norm_eps) if spec.qk_norm else None,
            )
        )
    norm = source.norm(names.norm, spec.norm_eps)
    head_weight = embedding if spec.tied_head else source.cast(source.take("lm_head.weight"))
    source.check_empty()
    head = FrozenLinear(head_weight, None, [Part("lm_head", 0, head_weight.shape[0])], prepack=pack)
    return Decoder(spec, embedding=embedding, positions=positions, layers=layers, norm=norm, head=head)
