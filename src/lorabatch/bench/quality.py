"""What 8-bit arithmetic costs in quality: both modes read the same documents, each token predicted
from the true ones before it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorabatch.config_measure import BenchInferConfig
from lorabatch.corpus.readers import Document, read_documents
from lorabatch.errors import DataError
from lorabatch.infer.runners import make_runner
from lorabatch.metrics.statistics import bits_per_byte
from lorabatch.model.native import NativeModel
from lorabatch.records import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODES = ("none", "int8")


def run_quality(
    config: BenchInferConfig, model: NativeModel, tokenizer: PreTrainedTokenizerBase
) -> int:
    """Print and write the comparison. UnavailableError where there is no int8, DataError without a
    document of two tokens."""
    assert config.quality
    documents = read_documents(Path(config.quality))[: config.max_documents]
    ids = [_token_ids(tokenizer, document)[: model.max_positions] for document in documents]
    ids = [i for i in ids if len(i) > 1]
    if not ids:
        raise DataError(
            "no document of two tokens or more",
            where=config.quality,
            fix="give plain text or prompts with completions",
        )
    nll, agreeing = _compare(model, ids)
    targets = sum(len(token_ids) - 1 for token_ids in ids)
    num_bytes = sum(len(tokenizer.decode(i[1:]).encode()) for i in ids)
    exact, int8 = (bits_per_byte(nll[mode], num_bytes) or 0.0 for mode in MODES)
    record = {
        "schema_version": 1,
        "kind": "int8 quality",
        "config": config.to_dict(),
        "bits_per_byte": exact,
        "int8_bits_per_byte": int8,
        "relative_loss": int8 / exact - 1,
        "greedy_agreement": agreeing / targets,
        "documents": len(ids),
        "tokens": targets,
        "bytes": num_bytes,
    }
    print(f"{len(ids)} documents, {targets} predicted tokens, {num_bytes} bytes")
    print(f"  bits per byte        exact {exact:.4f}, int8 {int8:.4f} ({int8 / exact - 1:+.2%})")
    print(f"  likeliest token      the same in {agreeing / targets:.2%} of the places")
    write_json(Path(config.output), record)
    return 0


def _compare(model: NativeModel, ids: Sequence[list[int]]) -> tuple[dict[str, float], int]:
    """(negative log-likelihood of each mode, number of places where both have the same likeliest
    token)."""
    capacity = max(map(len, ids))
    runners = {
        m: make_runner(model, num_slots=1, capacity=capacity, max_tokens=capacity, quantize=m)
        for m in MODES
    }
    nll, agreeing = dict.fromkeys(MODES, 0.0), 0
    for token_ids in ids:
        likeliest = []
        for mode, runner in runners.items():
            losses, best = runner.token_nll(token_ids)
            nll[mode] += float(losses.double().sum())
            likeliest.append(best)
        agreeing += int((likeliest[0] == likeliest[1]).sum())
    return nll, agreeing


def _token_ids(tokenizer: PreTrainedTokenizerBase, document: Document) -> list[int]:
    encoded = tokenizer(_text(document), return_attention_mask=False, verbose=False)
    token_ids: list[int] = encoded["input_ids"]
    return token_ids


def _text(document: Document) -> str:
    if document.messages is not None:
        return "\n".join(m["content"] for m in document.messages)
    return (document.prompt or "") + document.text
