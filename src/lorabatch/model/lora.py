"""Adapters: which layers get one, the flat buffer that holds them, and PEFT's files both ways.

The file format is peft's (``adapter_config.json``, ``adapter_model.safetensors``), so adapters
trained here load there and the other way round. Beside them ``lorabatch.json`` records which base
the adapter belongs to; peft ignores it.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lorabatch.errors import DataError, UsageError, nearest
from lorabatch.model.decoder import Decoder
from lorabatch.model.linear import Adapter
from lorabatch.model.lora_settings import LoraSettings, settings_from
from lorabatch.model.tensorfiles import is_finite, read_safetensors, reading, write_safetensors
from lorabatch.records import read_json, write_json
from lorabatch.schema import Record

CONFIG_FILE, WEIGHTS_FILE, BASE_FILE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "lorabatch.json",
)
KEY_PREFIX = "base_model.model."
ATTENTION_PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "attn.c_attn", "attn.c_proj")


@dataclass(frozen=True)
class LoraWeights:
    """A trained adapter: per linear layer of the checkpoint, A [r, I] and B [O, r] in fp32."""

    settings: LoraSettings
    pairs: Mapping[str, tuple[Tensor, Tensor]]  # path -> (A, B)

    @property
    def num_params(self) -> int:
        return sum(t.numel() for pair in self.pairs.values() for t in pair)

    def scaled(self, path: str) -> tuple[Tensor, Tensor]:
        """A [r, I] and ``scale * B`` [O, r] of one layer."""
        a, b = self.pairs[path]
        return a, b * self.settings.scale(path, len(a))

    def delta(self, path: str) -> Tensor | None:
        """The merged update ``scale * B A`` [O, I] of one layer in fp32, or None."""
        if path not in self.pairs:
            return None
        a, b = (t.to(torch.float32) for t in self.pairs[path])
        return self.settings.scale(path, a.shape[0]) * (b @ a)

    def digest(self) -> str:
        """Identity of the adapter by content, never by name."""
        digest = hashlib.sha256()
        for path in sorted(self.pairs):
            scale = self.settings.scale(path, self.pairs[path][0].shape[0])
            digest.update(f"{path} {scale!r}".encode())
            for tensor in self.pairs[path]:
                digest.update(tensor.to(torch.float32).contiguous().numpy().tobytes())
        return digest.hexdigest()


def matches(path: str, target: str) -> bool:
    """Whether a layer's path is meant by a target name: peft's rule, whole dotted components from
    the end."""
    return path == target or path.endswith("." + target)


def select(paths: Iterable[str], targets: tuple[str, ...]) -> list[str]:
    """Paths that the targets name. UsageError for a target that matches nothing."""
    paths = list(paths)
    wanted: dict[str, tuple[str, ...]] = {"all-linear": tuple(paths), "attn": ATTENTION_PARTS}
    chosen: set[str] = set()
    for target in targets:
        found = {p for p in paths for name in wanted.get(target, (target,)) if matches(p, name)}
        if not found:
            known = {p.rsplit(".", 1)[-1] for p in paths} | {"all-linear", "attn"}
            raise UsageError(
                "matches no linear layer of this model",
                where=f"--target_modules {target}",
                fix=nearest(target, known),
            )
        chosen |= found
    return [p for p in paths if p in chosen]


class AdapterSet:
    """All trainable parameters in one flat fp32 buffer, and their gradients in another.

    The given parameters become views of it, so the optimiser, clipping, checkpoints and an
    all-reduce each see one tensor.
    """

    def __init__(
        self, settings: LoraSettings, pairs: Mapping[str, tuple[nn.Parameter, nn.Parameter]]
    ) -> None:
        self.settings, self.pairs = settings, dict(pairs)
        parameters = [p for pair in self.pairs.values() for p in pair]
        self.flat = nn.Parameter(
            torch.cat([p.detach().reshape(-1).to(torch.float32) for p in parameters])
        )
        self.grad = torch.zeros_like(self.flat.data)
        self.flat.grad = self.grad
        offset = 0
        for p in parameters:
            own = slice(offset, offset + p.numel())
            p.data = self.flat.data[own].view(p.shape)
            p.grad = self.grad[own].view(p.shape)
            offset += p.numel()

    @property
    def num_params(self) -> int:
        return self.flat.numel()

    def zero_grad(self) -> None:
        self.grad.zero_()

    def weights(self, flat: Tensor | None = None) -> LoraWeights:
        """A copy on the CPU, independent of further training; of ``flat`` [num_params] instead of
        the present values if given."""
        copy = (self.flat.detach() if flat is None else flat).cpu().clone()
        parameters = [p for pair in self.pairs.values() for p in pair]
        halves = [
            t.view(p.shape)
            for t, p in zip(copy.split([p.numel() for p in parameters]), parameters, strict=True)
        ]
        return LoraWeights(
            self.settings,
            dict(zip(self.pairs, zip(halves[0::2], halves[1::2], strict=True), strict=True)),
        )


def attach(decoder: Decoder, settings: LoraSettings, *, seed: int) -> AdapterSet:
    """Give the chosen layers a fresh adapter (which changes nothing yet) and return them all.

    A is uniform as in the paper's code and peft (kaiming with a = sqrt 5), B is zero.
    """
    parts = [
        (layer, index, part)
        for layer in decoder.linears()
        for index, part in enumerate(layer.parts)
    ]
    chosen = set(select([part.path for _, _, part in parts], settings.target_modules))
    generator = torch.Generator().manual_seed(seed % 2**63)
    pairs = {}
    for layer, index, part in parts:
        if part.path not in chosen:
            continue
        bound = 1 / math.sqrt(layer.in_features)
        a = torch.empty(settings.r, layer.in_features).uniform_(-bound, bound, generator=generator)
        b = torch.zeros(part.stop - part.start, settings.r)
        adapter = Adapter(
            a.to(decoder.device), b.to(decoder.device), settings.scale(part.path, settings.r)
        )
        layer.adapters[str(index)] = adapter
        layer.dropout = settings.dropout
        pairs[part.path] = (adapter.a, adapter.b)
    return AdapterSet(settings, pairs)


def put_on(decoder: Decoder, weights: LoraWeights) -> None:
    """Give the layers of a trained adapter its values, beside the frozen products."""
    for layer in decoder.linears():
        for index, part in enumerate(layer.parts):
            if part.path in weights.pairs:
                a, b = (half.to(decoder.device) for half in weights.pairs[part.path])
                scale = weights.settings.scale(part.path, len(a))
                layer.adapters[str(index)] = Adapter(a, b, scale)


def save_adapter(
    folder: Path,
    weights: LoraWeights,
    *,
    base_name: str,
    base_fingerprint: str | None,
    fan_in_fan_out: bool,
) -> None:
    """Write an adapter folder that peft and ``load_adapter`` read. Files are replaced one by one,
    weights first."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{KEY_PREFIX}{path}.lora_{letter}.weight": half
        for path, pair in weights.pairs.items()
        for letter, half in zip("AB", pair, strict=True)
    }
    write_safetensors(folder / WEIGHTS_FILE, tensors)
    settings = weights.settings
    write_json(
        folder / CONFIG_FILE,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_name,
            "r": settings.r,
            "lora_alpha": settings.alpha,
            "lora_dropout": settings.dropout,
            "use_rslora": settings.use_rslora,
            "target_modules": _target_names(settings, weights.pairs),
            "rank_pattern": dict(settings.rank_pattern),
            "alpha_pattern": dict(settings.alpha_pattern),
            "fan_in_fan_out": fan_in_fan_out,
            "bias": "none",
            "inference_mode": True,
        },
    )
    write_json(
        folder / BASE_FILE,
        {
            "schema_version": 1,
            "base_name": base_name,
            "base_fingerprint": base_fingerprint,
            "adapter_sha256": weights.digest(),
        },
    )


def _target_names(settings: LoraSettings, paths: Iterable[str]) -> list[str]:
    """The names that peft should look for: short ones where whole kinds of layers were chosen, else
    full paths.

    GPT-2's two c_proj differ in the component before, so it stays.
    """
    if any("." in target for target in settings.target_modules):
        return sorted(paths)
    return sorted(
        {
            ".".join(p.split(".")[-2:]) if p.endswith("c_proj") else p.rsplit(".", 1)[-1]
            for p in paths
        }
    )


def load_adapter(
    folder: Path, shapes: Mapping[str, tuple[int, int]], *, base_fingerprint: str | None = None
) -> LoraWeights:
    """Read a LoRA adapter and check it against the base model's linear layers.

    shapes: path of each linear layer -> (O, I). Raises DataError for anything that does not fit:
    wrong base, unknown or missing keys, features that we cannot apply faithfully.
    """
    with reading("cannot be used", where=folder, fix="restore the adapter's files"):
        return _load(folder, shapes, base_fingerprint)


def _load(
    folder: Path, shapes: Mapping[str, tuple[int, int]], base_fingerprint: str | None
) -> LoraWeights:
    if not (folder / CONFIG_FILE).exists():
        raise DataError(
            f"no {CONFIG_FILE}",
            where=folder,
            fix="give the folder that training wrote (--save_dir)",
        )
    config = read_json(folder / CONFIG_FILE)
    settings = settings_from(config, folder / CONFIG_FILE)
    if not (folder / WEIGHTS_FILE).exists():
        hint = (
            " (adapter_model.bin is a pickle and is not read: save it as safetensors)"
            if (folder / "adapter_model.bin").exists()
            else ""
        )
        raise DataError(
            f"no {WEIGHTS_FILE}{hint}",
            where=folder,
            fix="copy the weights beside the config or train again",
        )
    tensors = read_safetensors(folder / WEIGHTS_FILE)
    _check_base(folder, base_fingerprint)
    weights = LoraWeights(settings, _paired(tensors, shapes, config, folder))
    _check_ranks(weights, folder)
    return weights


def _check_ranks(weights: LoraWeights, folder: Path) -> None:
    """The scale depends on the rank: where two files differ, one is of another adapter."""
    settings = weights.settings
    settings.check_patterns(weights.pairs)
    for path, (a, _) in weights.pairs.items():
        if len(a) != settings.r_of(path):
            what = f"'{path}' has rank {len(a)} and {CONFIG_FILE} says {settings.r_of(path)}"
            raise DataError(
                what, where=folder / WEIGHTS_FILE, fix="restore both files from one training run"
            )


def _check_base(folder: Path, base_fingerprint: str | None) -> None:
    if base_fingerprint is None or not (folder / BASE_FILE).exists():
        return
    record = read_json(folder / BASE_FILE)
    if record.get("base_fingerprint") not in (None, base_fingerprint):
        raise DataError(
            "the adapter was trained on another base model",
            where=folder,
            fix=f"use --base_model {record.get('base_name')}",
        )


def _paired(
    tensors: dict[str, Tensor],
    shapes: Mapping[str, tuple[int, int]],
    config: Record,
    folder: Path,
) -> dict[str, tuple[Tensor, Tensor]]:
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(
            rf"{re.escape(KEY_PREFIX)}(.+)\.lora_([AB])(?:\.default)?\.weight", key
        )
        if match is None or match[1] not in shapes:
            raise DataError(
                f"unexpected key '{key}'",
                where=folder / WEIGHTS_FILE,
                fix="the adapter is for another model",
            )
        halves.setdefault(match[1], {})[match[2]] = tensor
    for path in _expected(shapes, config):
        if set(halves.get(path, {})) != {"A", "B"}:
            raise DataError(
                f"weights for '{path}' are missing",
                where=folder / WEIGHTS_FILE,
                fix="the file is incomplete or of another model",
            )
    return {
        path: _pair(half, path, shapes[path], folder / WEIGHTS_FILE)
        for path, half in halves.items()
    }


def _pair(
    half: Mapping[str, Tensor], path: str, shape: tuple[int, int], file: Path
) -> tuple[Tensor, Tensor]:
    """A and B of one layer in fp32, checked. shape: of the layer's weight [O, I]."""
    if set(half) != {"A", "B"}:
        raise DataError(
            f"only one half of '{path}' is there", where=file, fix="the file is incomplete"
        )
    a, b = half["A"], half["B"]
    rows, columns = shape
    r = len(a) if a.ndim else 0
    if tuple(a.shape) != (r, columns) or tuple(b.shape) != (rows, r):
        raise DataError(
            f"'{path}' has shapes A {tuple(a.shape)}, B {tuple(b.shape)} and the base "
            f"[{rows}, {columns}]",
            where=file,
            fix="the adapter is for another model",
        )
    pair = a.to(torch.float32), b.to(torch.float32)
    if not all(map(is_finite, pair)):
        raise DataError(
            f"'{path}' holds values that are not finite",
            where=file,
            fix="train again, with a lower --lr",
        )
    return pair


def _expected(shapes: Mapping[str, tuple[int, int]], config: Record) -> list[str]:
    """Layers that the config says have weights; left open where it says so by pattern or layer
    number."""
    targets = config.get("target_modules")
    if (
        not targets
        or isinstance(targets, str)
        or config.get("layers_to_transform") is not None
        or config.get("exclude_modules")
    ):
        return []
    return [p for p in shapes if any(matches(p, t) for t in targets)]
