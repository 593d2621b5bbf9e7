"""``lorabatch merge``: a checkpoint with the adapter added in fp32 and rounded once."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from lorabatch.config import MergeConfig
from lorabatch.errors import DataError, UnavailableError, UsageError
from lorabatch.machine.device import TYPES
from lorabatch.model import hub, load
from lorabatch.model.lora import LoraWeights, load_adapter
from lorabatch.model.spec import spec_from_config
from lorabatch.model.tensorfiles import is_finite, write_safetensors
from lorabatch.model.weights import (
    FAMILY_NAMES,
    checked,
    fingerprint,
    linear_shapes,
    read_checkpoint,
)


def run_merge(config: MergeConfig, command: list[str]) -> int:
    print(merge_to_folder(config))
    return 0


def merge_to_folder(config: MergeConfig) -> Path:
    """Write the merged model and return its folder. The base on disk is not touched."""
    if config.adapter_dir is None or config.output_dir is None:
        raise UsageError(
            "needs both --adapter_dir and --output_dir", fix="see lorabatch merge --help"
        )
    output = Path(config.output_dir)
    _check_free(output)
    hub.prepare_environment()
    source = hub.find_model(config.base_model)
    spec = spec_from_config(load.load_config(source.path))
    if spec is None:
        raise UnavailableError(
            "only native architectures can be merged here",
            where=f"--base_model {config.base_model}",
            fix="use peft's merge_and_unload",
        )
    tensors = checked(spec, read_checkpoint(source.path), where=source.path)
    adapter = load_adapter(
        Path(config.adapter_dir), linear_shapes(spec), base_fingerprint=fingerprint(spec, tensors)
    )
    _merge(tensors, adapter, config.dtype, transposed=FAMILY_NAMES[spec.family].transposed)
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            what = f"'{name}' is not finite in {tensor.dtype} with the adapter merged"
            raise DataError(
                what, where=source.path, fix="check the weights, or choose another --dtype"
            )
    output.mkdir(parents=True, exist_ok=True)
    _copy_all_but_weights(source.path, output)
    write_safetensors(output / "model.safetensors", tensors)
    hub.write_manifest(
        output,
        name=f"{source.name}+{Path(config.adapter_dir).name}",
        revision=source.revision,
        origin=f"{source.name} with {config.adapter_dir} merged",
    )
    return output


def _check_free(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(
            "exists and is not empty", where=f"--output_dir {output}", fix="choose another folder"
        )


def _copy_all_but_weights(source: Path, output: Path) -> None:
    for file in source.iterdir():
        weights = file.name.startswith(("model", "pytorch_model"))
        if file.is_file() and not weights and file.name != hub.MANIFEST:
            shutil.copyfile(file, output / file.name)


def _merge(
    tensors: dict[str, Tensor], adapter: LoraWeights, dtype: str, *, transposed: bool
) -> None:
    """Add the adapter in fp32, and round once: to each weight's own type, or all tensors to
    ``dtype``."""
    for path in adapter.pairs:
        delta, weight = adapter.delta(path), tensors[f"{path}.weight"]
        assert delta is not None
        merged = weight.to(torch.float32) + (delta.t() if transposed else delta)
        tensors[f"{path}.weight"] = merged.to(weight.dtype) if dtype == "auto" else merged
    if dtype != "auto":
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(TYPES[dtype])
