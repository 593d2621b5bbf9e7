"""What 8-bit arithmetic costs in quality: both modes read the same documents, each token predicted from the true ones before it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lorabatch.config import BenchInferConfig
from lorabatch.corpus.readers import Document, read_documents
from lorabatch.errors import DataError
from lorabatch.infer.runner import Runner, make_runner
from lorabatch.measure.statistics import bits_per_byte
from lorabatch.model.attention import Segment
from lorabatch.model.native import NativeModel
from lorabatch.records import write_json

MODES = ("none", "int8")


def run_quality(config: BenchInferConfig, model: NativeModel, tokenizer: Any) -> int:
    """Print and write the comparison. UnavailableError where there is no int8, DataError without a document of two tokens."""
    assert config.quality
    documents = read_documents(Path(config.quality))[: config.max_documents]
    ids = [tokenizer(_text(d), return_attention_mask=False, verbose=False)["input_ids"][: model.max_positions] for d in documents]
    ids = [i for i in ids if len(i) > 1]
    if not ids:
        raise DataError("no document of two tokens or more", where=config.quality, fix="give plain text or prompts with completions")
    capacity = max(map(len, ids))
    runners = {m: make_runner(model, num_slots=1, capacity=capacity, max_tokens=capacity, quantize=m) for m in MODES}
    num_bytes = sum(len(tokenizer.decode(i[1:]).encode()) for i in ids)
    nll, agreeing, targets = dict.fromkeys(MODES, 0.0), 0, 0
    for token_ids in ids:
        likeliest = []
        for mode, runner in runners.items():
            loss, best = _score(runner, token_ids)
            nll[mode] += loss
            likeliest.append(best)
        agreeing += int((likeliest[0] == likeliest[1]).sum())
        targets += len(token_ids) - 1
    exact, int8 = (bits_per_byte(nll[mode], num_bytes) or 0.0 for mode in MODES)
    record = {"bits_per_byte": exact, "int8_bits_per_byte": int8, "relative_loss": int8 / exact - 1}
    record |= {"greedy_agreement": agreeing / targets, "documents": len(ids), "tokens": targets, "bytes": num_bytes}
    print(f"{len(ids)} documents, {targets} predicted tokens, {num_bytes} bytes")
    print(f"  bits per byte        exact {exact:.4f}, int8 {int8:.4f} ({int8 / exact - 1:+.2%})")
    print(f"  likeliest token      the same in {agreeing / targets:.2%} of the places")
    write_json(Path(config.output), {"schema_version": 1, "kind": "int8 quality", "config": config.to_dict()} | record)
    return 0


def _text(document: Document) -> str:
    if document.messages is not None:
        return "\n".join(m["content"] for m in document.messages)
    return (document.prompt or "") + document.text


def _score(runner: Runner, token_ids: list[int]) -> tuple[float, Tensor]:
    """(negative log-likelihood of all tokens but the first, in nats; the likeliest token at each of their places)."""
    inputs, targets = token_ids[:-1], token_ids[1:]
    logits = runner.logits(runner.forward([Segment(0, 0, inputs, num_logits=len(inputs))])).float()
    places = range(len(targets))
    return -float(logits.log_softmax(dim=-1)[places, targets].double().sum()), logits.argmax(dim=-1)
