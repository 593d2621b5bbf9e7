"""From a model folder to something that trains or generates: backend choice, tokenizer, end
tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorabatch.corpus.tokens import Tokenizer
from lorabatch.errors import DataError, UnavailableError
from lorabatch.model import hub
from lorabatch.model.hf import HfModel
from lorabatch.model.hub import ModelSource
from lorabatch.model.native import NativeModel
from lorabatch.model.spec import check_numbers, spec_from_config
from lorabatch.model.tensorfiles import reading
from lorabatch.model.weights import MakeProduct
from lorabatch.spans import spanned

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Model = NativeModel | HfModel


def load_config(folder: Path) -> PretrainedConfig:
    """The transformers configuration. DataError for what no model can have, before anything is
    built by it."""
    from transformers import AutoConfig

    with reading(
        "config.json cannot be used", where=folder, fix="is it a transformers model folder?"
    ):
        check_numbers(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        spec_from_config(config)  # its errors are this file's
        return config


def load_tokenizer(folder: Path) -> Tokenizer:
    """The model's own tokenizer. DataError if it is missing or has no end-of-text token."""
    from transformers import AutoTokenizer

    with reading(
        "no usable tokenizer",
        where=folder,
        fix="copy tokenizer.json and tokenizer_config.json beside the weights",
    ):
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        if tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end-of-text token",
                fix="set eos_token in tokenizer_config.json",
            )
        # lengths are our business
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = (
            True
        )
        tokenizer.decode(
            tokenizer(["A trial."], return_attention_mask=False, verbose=False)["input_ids"][0]
        )  # some settings are not looked at before
        return tokenizer


def end_tokens(folder: Path, config: PretrainedConfig, tokenizer: Tokenizer) -> frozenset[int]:
    """All ids that end a completion: the tokenizer's, the configuration's and
    generation_config.json's."""
    from transformers import GenerationConfig

    values = [tokenizer.eos_token_id, config.eos_token_id]
    path = folder / "generation_config.json"
    if path.exists():
        with reading("not readable", where=path, fix="restore or remove it"):
            values.append(
                GenerationConfig.from_pretrained(folder, local_files_only=True).eos_token_id
            )
    flat = [
        i for v in values for i in (v if isinstance(v, (list, tuple)) else [v]) if i is not None
    ]
    if not all(type(i) is int for i in flat):
        raise DataError(
            f"the end tokens are no token ids ({str(flat)[:80]})",
            where=folder,
            fix="restore eos_token_id",
        )
    return frozenset(flat)


@spanned("load")
def load_model(
    source: ModelSource,
    config: PretrainedConfig,
    *,
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
    adapter_dir: Path | None = None,
    product: MakeProduct | None = None,
) -> Model:
    """The native decoder where it knows the architecture, else the hf backend (said in one
    line). DataError for what is wrong with its files.

    product: makes the native decoder's products from their weights; None: the fastest of this
    device.
    """
    with reading(
        "the model cannot be used",
        where=source.path,
        fix="is it a causal language model, and complete?",
    ):
        model = _load_model(
            source,
            config,
            backend=backend,
            dtype=dtype,
            device=device,
            adapter_dir=adapter_dir,
            product=product,
        )
        model.identity = hub.model_sha256(source.path)  # read once for each version of a file
    return model


def _load_model(
    source: ModelSource,
    config: PretrainedConfig,
    *,
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
    adapter_dir: Path | None,
    product: MakeProduct | None,
) -> Model:
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
        why = (
            "asked for"
            if backend == "hf"
            else f"'{config.model_type}' is not a native architecture"
        )
        print(
            f"backend: transformers ({why}): complete, but slower than the native decoder",
            file=sys.stderr,
        )
        return HfModel.load(source.path, spec, dtype=dtype, device=device, adapter_dir=adapter_dir)
    return NativeModel.load(
        source.path, spec, dtype=dtype, device=device, adapter_dir=adapter_dir, product=product
    )
