"""From a model folder to something that trains or generates: backend choice, tokenizer, end tokens."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from lorabatch.errors import DataError, UnavailableError
from lorabatch.hub import ModelSource
from lorabatch.model.hf import HfModel
from lorabatch.model.native import NativeModel
from lorabatch.model.spec import spec_from_config
from lorabatch.model.weights import MakeProduct

Model = NativeModel | HfModel


def load_config(folder: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a class for each kind of mistake
        what = f"config.json cannot be used ({' '.join(str(error).split())})"
        raise DataError(what, where=folder, fix="is it a transformers model folder?") from None


def load_tokenizer(folder: Path) -> Any:
    """The model's own tokenizer. DataError if it is missing or has no end-of-text token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise DataError(
            f"no usable tokenizer ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})",
            where=folder,
            fix="copy tokenizer.json and tokenizer_config.json beside the weights",
        ) from None
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-text token", where=folder, fix="set eos_token in tokenizer_config.json")
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True  # lengths are our business
    return tokenizer


def end_tokens(folder: Path, config: Any, tokenizer: Any) -> frozenset[int]:
    """All ids that end a completion: the tokenizer's, the configuration's and generation_config.json's."""
    from transformers import GenerationConfig

    values = [tokenizer.eos_token_id, config.eos_token_id]
    if (folder / "generation_config.json").exists():
        try:
            values.append(GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id)
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"not readable ({error})", where=folder / "generation_config.json", fix="restore or remove it") from None
    flat = [i for v in values for i in (v if isinstance(v, (list, tuple)) else [v])]
    return frozenset(i for i in flat if i is not None)


def load_model(
    source: ModelSource,
    config: Any,
    *,
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
    adapter_dir: Path | None = None,
    product: MakeProduct | None = None,
) -> Model:
    """The native decoder where it knows the architecture, the hf backend otherwise (said in one line).

    product: makes the native decoder's products from their weights; None: the fastest of this device.
    """
    spec = spec_from_config(config)
    if spec is None and backend == "native":
        raise UnavailableError(
            f"the native decoder does not know this kind of {config.model_type} model",
            where="--backend native",
            fix="use --backend auto or hf",
        )
    if backend == "hf" or spec is None:
        if product is not None:
            raise UnavailableError(
                "only the native decoder can quantise or shard its base",
                where=f"a {config.model_type} model",
                fix="leave out --load_in_4bit, --load_in_8bit and --shard_base",
            )
        why = "asked for" if backend == "hf" else f"'{config.model_type}' is not a native architecture"
        print(f"backend: transformers ({why}): complete, but slower than the native decoder", file=sys.stderr)
        return HfModel.load(source.path, dtype=dtype, device=device, adapter_dir=adapter_dir)
    return NativeModel.load(source.path, spec, dtype=dtype, device=device, adapter_dir=adapter_dir, product=product)
