"""Evaluation as sums over tokens, whatever the blocks."""

import math
from dataclasses import replace

import pytest
import torch
from support.models import native, randomise_b, tiny_corpus, tiny_model, tiny_tokenizer

from lorabatch.corpus.readers import Document
from lorabatch.corpus.tokens import TokenCorpus, tokenise
from lorabatch.model.lora import LoraSettings
from lorabatch.train.batches import blocks_of
from lorabatch.train.validation import evaluate


class Uniform:
    """A model that gives each of four tokens the same chance: 2 bits a token."""

    def __init__(self):
        self.blocks = []

    def train(self, mode=True):
        self.training = mode

    def loss_sum(self, token_ids, first_targets):
        self.blocks.append([len(t) for t in token_ids])
        return torch.tensor(
            math.log(4.0) * sum(len(t) - f for t, f in zip(token_ids, first_targets, strict=True))
        )


def test_bits_per_byte_by_hand():
    """'zzz' is z z z EOS: three supervised tokens of 2 bits each over the two bytes after the
    first: 3 bits a byte."""
    corpus = tokenise([Document("zzz", "a:1")], tiny_tokenizer(), max_len=16, count_bytes=True)
    result = evaluate(Uniform(), corpus, block_tokens=64)
    assert result.loss == pytest.approx(math.log(4))
    assert result.tokens == 3
    assert result.bits_per_byte == pytest.approx(3.0)
    record = result.record()
    assert record["perplexity"] == pytest.approx(4)
    assert set(record) == {"eval_loss", "perplexity", "bits_per_byte", "eval_tokens", "eval_s"}
    assert (
        evaluate(Uniform(), replace(corpus, target_bytes=None), block_tokens=64).bits_per_byte
        is None
    )


def test_evaluation_is_in_eval_mode_in_blocks_and_can_be_stopped():
    model, corpus = Uniform(), tiny_corpus([5, 9, 3, 7])
    evaluate(model, corpus, block_tokens=10)
    assert model.training is False
    assert sorted(n for block in model.blocks for n in block) == [3, 5, 7, 9]
    assert all(sum(block) <= 10 for block in model.blocks)
    answers = iter([False, True])
    model.blocks.clear()
    assert evaluate(model, corpus, block_tokens=10, stop_requested=lambda: next(answers)) is None
    assert len(model.blocks) == 1


def test_loss_does_not_depend_on_blocks_or_order():
    model = native(tiny_model("llama"))
    randomise_b(model.attach(LoraSettings(r=4, dropout=0.5), seed=0))
    corpus = tiny_corpus([5, 40, 17, 2, 30, 9, 22], first_targets=[1, 3, 16, 1, 2, 5, 1])
    order = [3, 6, 0, 2, 5, 1, 4]
    shuffled = TokenCorpus(tuple(corpus.documents[i] for i in order), 7, 0, 0, 0)
    results = [
        evaluate(model, c, block_tokens=n) for c in (corpus, shuffled) for n in (2, 45, 64, 4096)
    ]
    assert len({len(list(blocks_of(corpus.documents, n))) for n in (2, 45, 64, 4096)}) == 4, (
        "else the blocks do not differ"
    )
    assert {r.tokens for r in results} == {corpus.num_targets} == {sum([4, 37, 1, 1, 28, 4, 21])}
    for result in results[1:]:
        assert result.loss == pytest.approx(results[0].loss, rel=1e-6)


def test_evaluation_needs_no_gradient():
    model = native(tiny_model("llama"))
    adapters = model.attach(LoraSettings(r=4), seed=0)
    evaluate(model, tiny_corpus([5, 9]), block_tokens=64)
    assert not adapters.grad.any()
    assert torch.is_grad_enabled()
