"""Hugging Face checkpoints to decoders: names, transpositions, fusing, merging, checks.

Only formats that cannot run code are read: safetensors, and ``pytorch_model.bin`` through
``weights_only=True``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorabatch.errors import DataError
from lorabatch.kernels.onednn import Product
from lorabatch.model.decoder import Decoder, Layer, Norm
from lorabatch.model.linear import FrozenLinear, Part
from lorabatch.model.spec import ModelSpec
from lorabatch.model.tensorfiles import is_finite, read_safetensors
from lorabatch.records import read_json

MergeDelta = Callable[[str], Tensor | None]
"""Path of a linear layer -> the fp32 update [O, I] to add before casting, or None."""
MakeProduct = Callable[[Tensor, list[int]], Product]
"""A layer's weight [O, I], cast and placed, and the rows of each of its parts -> how it is kept."""


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
    """All tensors of a model folder by name. DataError when there are none or a shard is
    missing."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        for name in (f"{single}.index.json", single):
            if (folder / name).exists():
                shards = _shards(folder / name) if name != single else [single]
                return {k: v for shard in shards for k, v in _read_tensors(folder / shard).items()}
    raise DataError(
        "no weights (model.safetensors, model.safetensors.index.json or pytorch_model.bin)",
        where=folder,
        fix="is this a model folder?",
    )


def _shards(index: Path) -> list[str]:
    files = read_json(index).get("weight_map")
    names = list(files.values()) if isinstance(files, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise DataError(
            "no weight_map of tensors to files of this folder",
            where=index,
            fix="fetch the model again",
        )
    shards = sorted(set(names))
    missing = [s for s in shards if not (index.parent / s).exists()]
    if missing:
        what = f"{len(missing)} of {len(shards)} weight files are missing ({missing[0]})"
        raise DataError(what, where=index.parent, fix="fetch the model again")
    return shards


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".bin":
        return read_safetensors(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a class for each kind of damage, and one for what could run code
        what = f"not readable as weights alone ({(str(error).splitlines() or [''])[0]})"
        raise DataError(what, where=path, fix="use a safetensors copy of the model") from None
    if not isinstance(tensors, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items()
    ):
        raise DataError(
            "contains something other than named tensors",
            where=path,
            fix="use a safetensors copy of the model",
        )
    return tensors


def _linears(spec: ModelSpec) -> Iterator[tuple[str, str, int, int]]:
    """(product that it is part of, path, O, I) of every linear layer of the checkpoint, bottom to
    top."""
    names, hidden, inner = FAMILY_NAMES[spec.family], spec.hidden_size, spec.intermediate_size
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    sizes = {
        "qkv": ((q, kv, kv) if len(names.qkv) == 3 else (q + 2 * kv,), hidden),
        "out": ((hidden,), q),
        "up": ((inner,) * len(names.up), hidden),
        "down": ((hidden,), inner),
    }
    for i in range(spec.num_layers):
        for product, (rows, columns) in sizes.items():
            for path, n in zip(getattr(names, product), rows, strict=True):
                yield product, path.format(i=i), n, columns


def linear_shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """Path -> (O, I) of every layer that can carry an adapter."""
    return {path: (rows, columns) for _, path, rows, columns in _linears(spec)}


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that a checkpoint of this spec holds, no more and no less."""
    names, hidden = FAMILY_NAMES[spec.family], spec.hidden_size
    shapes: dict[str, tuple[int, ...]] = {f"{names.embedding}.weight": (spec.vocab_size, hidden)}
    if names.positions:
        shapes[f"{names.positions}.weight"] = (spec.max_positions, hidden)
    for product, path, rows, columns in _linears(spec):
        shapes[f"{path}.weight"] = (columns, rows) if names.transposed else (rows, columns)
        if product in spec.biases:
            shapes[f"{path}.bias"] = (rows,)
    shapes |= _norm_shapes(spec)
    return shapes if spec.tied_head else shapes | {"lm_head.weight": (spec.vocab_size, hidden)}


def _norm_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    names, layers = FAMILY_NAMES[spec.family], range(spec.num_layers)
    paths = [names.norm, *(n.format(i=i) for i in layers for n in (names.norm1, names.norm2))]
    halves = ("weight", "bias") if spec.family == "gpt2" else ("weight",)
    shapes: dict[str, tuple[int, ...]] = {
        f"{path}.{half}": (spec.hidden_size,) for path in paths for half in halves
    }
    if spec.qk_norm:
        attention = (f"model.layers.{i}.self_attn" for i in layers)
        shapes |= {
            f"{path}.{half}_norm.weight": (spec.head_dim,) for path in attention for half in "qk"
        }
    return shapes


def checked(
    spec: ModelSpec, tensors: Mapping[str, Tensor], *, where: object = None
) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the names of its architecture, after their names, shapes
    and types were compared with config.json's.

    Files are mapped into memory and nothing is read yet. Raises DataError.
    """
    found, expected = normalised(spec, tensors), tensor_shapes(spec)
    compare_shapes(
        expected, {name: tuple(tensor.shape) for name, tensor in found.items()}, where=where
    )
    for name, tensor in found.items():
        if not tensor.is_floating_point():
            raise DataError(
                f"'{name}' holds {tensor.dtype}, not real numbers",
                where=where,
                fix="use a checkpoint that is not quantised",
            )
    return found


def compare_shapes(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], *, where: object
) -> None:
    """DataError for the first tensor that is missing, that nobody needs, or of another shape than
    expected."""
    missing = [name for name in expected if name not in found]
    if missing:
        what = (
            "the checkpoint lacks "
            f"{f'{len(missing)} tensors, ' if len(missing) > 1 else ''}'{missing[0]}'"
        )
        raise DataError(
            what, where=where, fix="is this folder complete, and its config.json its own?"
        )
    left = sorted(found.keys() - expected.keys())
    if left:
        what = f"{len(left)} tensors that this architecture does not have ({', '.join(left[:3])})"
        raise DataError(
            what,
            where=where,
            fix="is config.json this checkpoint's own? --backend hf reads more architectures",
        )
    for name, shape in expected.items():
        if found[name] != shape:
            what = f"'{name}' is {list(found[name])} and by config.json {list(shape)}"
            raise DataError(what, where=where, fix="restore both files from one model")


def fingerprint(spec: ModelSpec | None, tensors: Mapping[str, Tensor]) -> str:
    """Identity of a base model for its adapters: its spec, where it has one, and 16 values of every
    tensor, rounded to bf16.

    The rounding makes an fp32 copy and the bf16 original the same base, as they are for an adapter.
    """
    digest = hashlib.sha256(spec.digest().encode() if spec else b"")
    for name in sorted(n for n in tensors if n != "lm_head.weight"):
        flat = tensors[name].reshape(-1)
        sample = flat[:: max(1, flat.numel() // 16)][:16].to(torch.bfloat16).contiguous()
        digest.update(f"{name}{tuple(tensors[name].shape)}".encode())
        digest.update(sample.view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def normalised(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names as the family's transformers class has them, without buffers and tied copies."""
    prefix = (
        ""
        if spec.family != "gpt2" or any(n.startswith("transformer.") for n in tensors)
        else "transformer."
    )
    kept = {}
    for name, tensor in tensors.items():
        if name.endswith(_NOT_WEIGHTS) or (name == "lm_head.weight" and spec.tied_head):
            continue
        kept[name if name == "lm_head.weight" else prefix + name] = tensor
    return kept


class _Source:
    """Hands out the checked tensors, cast and placed; values that are not finite there are an
    error."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        transposed: bool,
        dtype: torch.dtype,
        device: torch.device,
        product: MakeProduct | None,
    ) -> None:
        # what was handed out need not stay in memory
        self._left, self._product = dict(tensors), product
        self._transposed, self._dtype, self._device = transposed, dtype, device

    def take(self, name: str) -> Tensor:
        return self._left.pop(name).detach()

    def cast(self, tensor: Tensor, name: str) -> Tensor:
        cast = tensor.to(device=self._device, dtype=self._dtype).contiguous()
        if not is_finite(cast):
            what = f"'{name}' holds values that are not finite in {self._dtype}"
            raise DataError(
                what,
                fix=(
                    "restore the file, or use another --dtype if only this one is too small for "
                    "them"
                ),
            )
        return cast

    def tensor(self, name: str) -> Tensor:
        return self.cast(self.take(name), name)

    def norm(self, path: str, eps: float) -> Norm:
        bias = self.tensor(f"{path}.bias") if f"{path}.bias" in self._left else None
        return Norm(self.tensor(f"{path}.weight"), bias, eps)

    def linear(
        self, paths: tuple[str, ...], merge: MergeDelta | None, prepack: bool
    ) -> FrozenLinear:
        """Fuse the layers at ``paths`` into one; merging happens in fp32, before the one
        rounding."""
        weights, biases, parts, start = [], [], [], 0
        for path in paths:
            weight = self._weight(path, merge)
            weights.append(weight)
            if f"{path}.bias" in self._left:
                biases.append(self.tensor(f"{path}.bias"))
            parts.append(Part(path, start, start + weight.shape[0]))
            start += weight.shape[0]
        bias = torch.cat(biases) if biases else None
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        layer = FrozenLinear(weight, bias, parts, prepack=prepack and self._product is None)
        if self._product is not None:
            # the dense weight is dropped here, one layer at a time
            layer.product = self._product(weight, [w.shape[0] for w in weights])
        return layer

    def _weight(self, path: str, merge: MergeDelta | None) -> Tensor:
        """[O, I]"""
        weight = self.take(f"{path}.weight")
        weight = weight.t() if self._transposed else weight
        delta = merge(path) if merge else None
        if delta is not None:
            weight = weight.to(torch.float32) + delta.to(torch.float32)
        return self.cast(weight, f"{path}.weight")


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
    """A decoder from a checkpoint's tensors; with ``merge``, adapters are added to its weights;
    ``product`` stores the layers' weights in another way (the head, which may be the embedding,
    stays as it is).

    Raises DataError for missing or unknown tensors, other shapes than the spec's, and values that
    are not finite.
    """
    names, device = FAMILY_NAMES[spec.family], torch.device(device)
    source = _Source(
        checked(spec, tensors),
        transposed=names.transposed,
        dtype=dtype,
        device=device,
        product=product,
    )
    pack = prepack and device.type == "cpu"
    embedding = source.tensor(f"{names.embedding}.weight")
    positions = source.tensor(f"{names.positions}.weight") if names.positions else None
    layers = [_layer(spec, i, source, merge, pack) for i in range(spec.num_layers)]
    norm = source.norm(names.norm, spec.norm_eps)
    head_weight = embedding if spec.tied_head else source.tensor("lm_head.weight")
    head = FrozenLinear(head_weight, None, [Part("lm_head", 0, head_weight.shape[0])], prepack=pack)
    return Decoder(
        spec, embedding=embedding, positions=positions, layers=layers, norm=norm, head=head
    )


def _layer(
    spec: ModelSpec, index: int, source: _Source, merge: MergeDelta | None, pack: bool
) -> Layer:
    names = FAMILY_NAMES[spec.family]

    def norm(path: str) -> Norm:
        return source.norm(path.format(i=index), spec.norm_eps)

    def linear(paths: tuple[str, ...]) -> FrozenLinear:
        return source.linear(tuple(p.format(i=index) for p in paths), merge, pack)

    attention = "model.layers.{i}.self_attn"
    return Layer(
        spec,
        index,
        norm1=norm(names.norm1),
        qkv=linear(names.qkv),
        out=linear(names.out),
        norm2=norm(names.norm2),
        up=linear(names.up),
        down=linear(names.down),
        q_norm=norm(f"{attention}.q_norm") if spec.qk_norm else None,
        k_norm=norm(f"{attention}.k_norm") if spec.qk_norm else None,
    )
