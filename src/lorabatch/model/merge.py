"""``lorabatch merge``: a checkpoint with the adapter added in fp32 and rounded once."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from lorabatch import hub
from lorabatch.config import MergeConfig
from lorabatch.errors import DataError, UnavailableError, UsageError
from lorabatch.model import load
from lorabatch.model.device import TYPES
from lorabatch.model.lora import load_adapter
from lorabatch.model.spec import spec_from_config
from lorabatch.model.tensorfiles import is_finite, write_safetensors
from lorabatch.model.weights import FAMILY_NAMES, checked, fingerprint, linear_shapes, read_checkpoint


def merge_to_folder(config: MergeConfig) -> Path:
    """Write the merged model and return its folder. The base on disk is not touched."""
    if config.adapter_dir is None or config.output_dir is None:
        raise UsageError("needs both --adapter_dir and --output_dir", fix="see lorabatch merge --help")
    output = Path(config.output_dir)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError("exists and is not empty", where=f"--output_dir {output}", fix="choose another folder")
    hub.prepare_environment()
    source = hub.find_model(config.base_model)
    spec = spec_from_config(load.load_config(source.path))
    if spec is None:
        raise UnavailableError(
            "only native architectures can be merged here", where=f"--base_model {config.base_model}", fix="use peft's merge_and_unload"
        )
    tensors = checked(spec, read_checkpoint(source.path), where=source.path)
    adapter = load_adapter(Path(config.adapter_dir), linear_shapes(spec), base_fingerprint=fingerprint(spec, tensors))
    for path in adapter.pairs:
        delta, weight = adapter.delta(path), tensors[f"{path}.weight"]
        assert delta is not None
        merged = weight.to(torch.float32) + (delta.t() if FAMILY_NAMES[spec.family].transposed else delta)
        tensors[f"{path}.weight"] = merged.to(weight.dtype if config.dtype == "auto" else torch.float32)
    if config.dtype != "auto":
        tensors = {name: tensor.to(TYPES[config.dtype]) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            what = f"'{name}' is not finite in {tensor.dtype} with the adapter merged"
            raise DataError(what, where=source.path, fix="check the weights, or choose another --dtype")
    output.mkdir(parents=True, exist_ok=True)
    for file in source.path.iterdir():
        if file.is_file() and not file.name.startswith(("model", "pytorch_model")) and file.name != hub.MANIFEST:
            shutil.copyfile(file, output / file.name)
    write_safetensors(output / "model.safetensors", tensors)
    hub.write_manifest(
        output,
        name=f"{source.name}+{Path(config.adapter_dir).name}",
        revision=source.revision,
        origin=f"{source.name} with {config.adapter_dir} merged",
    )
    return output
