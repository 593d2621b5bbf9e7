"""What stands between the prompts and the engine: the model, its adapters, the tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorabatch.config import InferConfig
from lorabatch.corpus.tokens import Tokenizer
from lorabatch.errors import UnavailableError
from lorabatch.infer.adapters import AdapterNames, merged_adapter
from lorabatch.infer.runners import load_for_runner, programmed
from lorabatch.kernels import variant
from lorabatch.machine.device import TYPE_NAMES, choose_device, choose_dtype, choose_threads
from lorabatch.machine.environment import gpu_description
from lorabatch.model import hub, load
from lorabatch.model.load import Model
from lorabatch.model.lora import LoraWeights, load_adapter
from lorabatch.model.native import NativeModel
from lorabatch.model.spec import spec_from_config
from lorabatch.progress import counted
from lorabatch.schema import Record


@dataclass(frozen=True)
class Loaded:
    """Everything of a run that does not change from one prompt to the next."""

    model: Model
    device: torch.device
    tokenizer: Tokenizer
    eos_ids: frozenset[int]
    adapter: str | None
    adapters: tuple[LoraWeights, ...]  # of --adapters, in their order
    adapter_bytes: int  # of them in the type of the run
    work_key: str  # what, besides a request itself, its completion depends on
    limit: int  # positions of prompt and completion together
    facts: Record  # what run.json says of it


def load_for_inference(config: InferConfig, source: hub.ModelSource, names: AdapterNames) -> Loaded:
    """The model and the adapters of a run, checked against each other; says what serves."""
    device = choose_device(no_cuda=config.no_cuda)
    threads = choose_threads(config.threads)
    dtype = choose_dtype(config.dtype, device)
    model_config = load.load_config(source.path)
    tokenizer = load.load_tokenizer(source.path)
    if names.folders and (config.backend == "hf" or spec_from_config(model_config) is None):
        raise UnavailableError(
            "not on the hf backend", where="--adapters", fix="one run for each, with --adapter_dir"
        )
    model = load_for_runner(
        source,
        model_config,
        backend=config.backend,
        dtype=dtype,
        device=device,
        quantize=config.quantize,
        adapter_dir=merged_adapter(config),
    )
    adapters = tuple(
        load_adapter(folder, model.linear_shapes, base_fingerprint=model.base_fingerprint)
        for folder in names.folders.values()
    )
    merged = merged_adapter(config)
    limit = min(model.max_positions, config.max_len or model.max_positions)
    loaded = Loaded(
        model=model,
        device=device,
        tokenizer=tokenizer,
        eos_ids=load.end_tokens(source.path, model_config, tokenizer),
        adapter=str(merged) if merged else None,
        adapters=adapters,
        adapter_bytes=sum(weights.num_params for weights in adapters) * dtype.itemsize,
        work_key=_work_key(config, source, model, dtype, limit)
        + "".join(f" {n}={w.digest()}" for n, w in zip(names.folders, adapters, strict=True)),
        limit=limit,
        facts=_facts(config, source, model, device, dtype, threads),
    )
    print(_description(loaded, config, source))
    return loaded


def _work_key(
    config: InferConfig, source: hub.ModelSource, model: Model, dtype: torch.dtype, limit: int
) -> str:
    merged = model.adapter.digest() if model.adapter else "base"
    settings = f"{TYPE_NAMES[dtype]} {config.quantize} {limit} {config.long_prompt}"
    return f"{source.name} {model.identity} {merged} {settings}"


def _facts(
    config: InferConfig,
    source: hub.ModelSource,
    model: Model,
    device: torch.device,
    dtype: torch.dtype,
    threads: int,
) -> Record:
    merged = merged_adapter(config)
    ours = isinstance(model, NativeModel) and programmed(
        model.spec, dtype, device, quantize=config.quantize
    )
    return {
        "model": {
            "name": source.name,
            "revision": source.revision,
            "converted_from": source.converted_from,
            "fingerprint": model.base_fingerprint,
            "adapter": str(merged) if merged else None,
        },
        "device": str(device),
        "dtype": TYPE_NAMES[dtype],
        "threads": threads,
        "backend": model.backend,
        "cpu_kernels": ours,
        "kernel_variant": variant() if ours else None,
        "gpu": gpu_description(),
    }


def _description(loaded: Loaded, config: InferConfig, source: hub.ModelSource) -> str:
    facts, dtype = loaded.facts, loaded.facts["dtype"]
    precision = dtype if config.quantize == "none" else f"{config.quantize} weights, {dtype} cache"
    kernels = f", {facts['kernel_variant']} kernels" if facts["cpu_kernels"] else ""
    if loaded.adapters:
        adapters = counted(len(loaded.adapters), "adapter")
        megabytes = f"{loaded.adapter_bytes / 1e6:.0f} MB"
        adapter = f"{adapters}, unmerged ({megabytes}), chosen by each request"
    else:
        adapter = f"adapter {loaded.adapter} merged" if loaded.adapter else "no adapter"
    machine = f"{precision} on {facts['device']}, {counted(facts['threads'], 'thread')}{kernels}"
    return f"base {source.name} ({machine}), {adapter}"
