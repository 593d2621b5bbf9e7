"""What is supervised: EOS, prompts, cuts and splits; byte counts; and evaluation as sums over tokens."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import CHAT_TEMPLATE, EOS, EOS_ID, native, randomise_b, tiny_corpus, tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from lorabatch.corpus.readers import Document
from lorabatch.corpus.tokens import TokenCorpus, TokenDocument, tokenise
from lorabatch.errors import DataError
from lorabatch.model.lora import LoraSettings
from lorabatch.train.batches import blocks_of
from lorabatch.train.evaluate import evaluate

TEXT = "The patient has a fever and a cough."


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def one(document, tokenizer, **options):
    """(token ids, ids of the supervised tokens) of the only piece of a document."""
    corpus = tokenise([document], tokenizer, **{"max_len": 128} | options)
    (piece,) = corpus.documents
    return piece.token_ids.tolist(), piece.token_ids[piece.first_target :].tolist()


# What is supervised


def test_text_ends_with_a_supervised_eos(tokenizer):
    token_ids, supervised = one(Document(TEXT, "a:1"), tokenizer)
    assert token_ids == [*ids(tokenizer, TEXT), EOS_ID]
    assert supervised == token_ids[1:]


def test_prompt_is_masked_and_the_completion_with_its_eos_is_not(tokenizer):
    document = Document(" rest.", "a:1", prompt=TEXT)
    token_ids, supervised = one(document, tokenizer)
    assert token_ids == [*ids(tokenizer, TEXT), *ids(tokenizer, " rest."), EOS_ID]
    assert supervised == [*ids(tokenizer, " rest."), EOS_ID]
    assert one(document, tokenizer, train_on_prompt=True) == (token_ids, token_ids[1:])


def test_a_prompt_of_one_token_leaves_the_whole_completion(tokenizer):
    token_ids, supervised = one(Document("ab", "a:1", prompt="x"), tokenizer)
    assert len(token_ids) == 1 + len(supervised) == 1 + len(ids(tokenizer, "ab")) + 1


def test_eos_inside_a_text_stays_supervised(tokenizer):
    """EOS is never masked by its value."""
    token_ids, supervised = one(Document(f"a{EOS}b", "a:1"), tokenizer)
    assert token_ids.count(EOS_ID) == supervised.count(EOS_ID) == 2


def test_messages_go_through_the_chat_template(tokenizer):
    messages = ({"role": "user", "content": "fever?"}, {"role": "assistant", "content": "rest"})
    token_ids, supervised = one(Document("", "a:1", messages=messages), tokenizer)
    assert token_ids == [*ids(tokenizer, f"<user>fever?{EOS}\n<assistant>"), *ids(tokenizer, "rest"), EOS_ID]
    assert supervised == [*ids(tokenizer, "rest"), EOS_ID]  # the template's EOS, not a second one


def test_only_the_last_answer_of_a_conversation_is_supervised(tokenizer):
    turns = [("user", "a"), ("assistant", "first"), ("user", "b"), ("assistant", "second")]
    messages = tuple({"role": role, "content": content} for role, content in turns)
    _, supervised = one(Document("", "a:1", messages=messages), tokenizer)
    assert supervised == [*ids(tokenizer, "second"), EOS_ID]


def test_a_template_without_eos_gets_one(tokenizer):
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token=EOS)
    tokenizer.chat_template = CHAT_TEMPLATE.replace(EOS, "</m>")
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    _, supervised = one(Document("", "a:1", messages=messages), tokenizer)
    assert supervised == [*ids(tokenizer, "b</m>"), EOS_ID]


def test_a_conversation_may_begin_with_the_assistant(tokenizer):
    """The reader lets it pass, so it must not be a traceback here."""
    document = Document("", "a:7", messages=({"role": "assistant", "content": "hello"},))
    try:
        _, supervised = one(document, tokenizer)
    except DataError as error:
        assert error.where == "a:7"
    else:
        assert supervised[-1] == EOS_ID


def test_chat_problems_name_the_line(tokenizer):
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    with pytest.raises(DataError, match="a:7: this model has no chat template"):
        tokenise([Document("", "a:7", messages=messages)], tiny_tokenizer(chat=False), max_len=64)
    turncoat = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token=EOS)
    turncoat.chat_template = "{{ messages | length }}" + CHAT_TEMPLATE
    with pytest.raises(DataError, match="a:7: the chat template writes the prompt differently"):
        tokenise([Document("", "a:7", messages=messages)], turncoat, max_len=64)


# What does not fit


def test_a_cut_answer_has_no_eos(tokenizer):
    document = Document(" and the patient should rest for days.", "a:1", prompt="The")
    whole, _ = one(document, tokenizer)
    corpus = tokenise([document], tokenizer, max_len=len(whole) - 1)
    assert corpus.documents[0].token_ids.tolist() == whole[:-1]
    assert EOS_ID not in corpus.documents[0].token_ids
    assert (corpus.num_cut, corpus.num_split, corpus.num_dropped) == (1, 0, 0)
    corpus = tokenise([document], tokenizer, max_len=len(whole))
    assert corpus.documents[0].token_ids.tolist() == whole
    assert corpus.num_cut == 0


def test_a_prompt_that_fills_everything_is_dropped_and_counted(tokenizer):
    long, short = Document("x", "a:1", prompt=TEXT * 3), Document("x", "a:2", prompt="a")
    corpus = tokenise([long, short], tokenizer, max_len=8)
    assert len(corpus.documents) == 1
    assert (corpus.num_read, corpus.num_cut, corpus.num_dropped) == (2, 1, 1)
    with pytest.raises(DataError, match="a: no document has a token to learn from; raise --max_len"):
        tokenise([long], tokenizer, max_len=8)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(3, 12))
def test_split_text_loses_no_token(length, max_len):
    """All pieces together are the text and its EOS, and only the first token of a piece is not predicted."""
    tokenizer = tiny_tokenizer()
    text = "z" * length  # z has no merges: one token a letter
    expected = [*ids(tokenizer, text), EOS_ID]
    assert len(expected) == length + 1
    corpus = tokenise([Document(text, "a:1")], tokenizer, max_len=max_len)
    assert [i for d in corpus.documents for i in d.token_ids.tolist()] == expected
    assert all(2 <= d.num_tokens <= max_len for d in corpus.documents)
    assert corpus.num_split == (length + 1 > max_len)
    assert (corpus.num_cut, corpus.num_dropped) == (0, 0)
    assert corpus.num_targets == len(expected) - len(corpus.documents)


def test_counts_add_up_and_order_is_kept(tokenizer):
    documents = [Document("one", "a:1"), Document(" 2", "a:2", prompt="two"), Document("three", "a:3")]
    corpus = tokenise(documents, tokenizer, max_len=64)
    assert [tokenizer.decode(d.token_ids) for d in corpus.documents] == [f"one{EOS}", f"two 2{EOS}", f"three{EOS}"]
    assert corpus.num_read == 3
    assert corpus.num_tokens == sum(len(d.token_ids) for d in corpus.documents)
    assert corpus.num_targets == corpus.num_tokens - 1 - len(ids(tokenizer, "two")) - 1
    assert corpus.target_bytes is None


# Bytes


def test_bytes_are_those_of_the_supervised_text(tokenizer):
    prompted = tokenise([Document(" à rest.", "a:1", prompt=TEXT)], tokenizer, max_len=128, count_bytes=True)
    assert prompted.target_bytes == len(" à rest.".encode())  # EOS has no bytes
    plain = tokenise([Document("zzz", "a:1"), Document("zz", "a:2")], tokenizer, max_len=128, count_bytes=True)
    assert plain.target_bytes == 2 + 1  # nothing predicts the first letter of each


def test_characters_cut_by_a_boundary_are_not_counted_twice(tokenizer):
    """Each byte of é, 🙂 and ã is a token of its own here; half a character is half its bytes."""
    text = "é🙂ã"
    size = len(text.encode())
    assert len(ids(tokenizer, "é")) == 2 and len(ids(tokenizer, "🙂")) == 4, "else nothing is cut"
    whole = tokenise([Document(text, "a:1")], tokenizer, max_len=128, count_bytes=True)
    assert whole.target_bytes == size - 1
    split = tokenise([Document(text, "a:1")], tokenizer, max_len=3, count_bytes=True)
    assert split.target_bytes == size - len(split.documents)


# Evaluation


class Uniform:
    """A model that gives each of four tokens the same chance: 2 bits a token."""

    def __init__(self):
        self.blocks = []

    def train(self, mode=True):
        self.training = mode

    def loss_sum(self, token_ids, first_targets):
        self.blocks.append([len(t) for t in token_ids])
        return torch.tensor(math.log(4.0) * sum(len(t) - f for t, f in zip(token_ids, first_targets, strict=True)))


def test_bits_per_byte_by_hand(tokenizer):
    """'zzz' is z z z EOS: three supervised tokens of 2 bits each over the two bytes after the first: 3 bits a byte."""
    corpus = tokenise([Document("zzz", "a:1")], tokenizer, max_len=16, count_bytes=True)
    result = evaluate(Uniform(), corpus, block_tokens=64)
    assert result.loss == pytest.approx(math.log(4))
    assert result.tokens == 3
    assert result.bits_per_byte == pytest.approx(3.0)
    record = result.record()
    assert record["perplexity"] == pytest.approx(4)
    assert set(record) == {"eval_loss", "perplexity", "bits_per_byte", "eval_tokens", "eval_s"}
    assert evaluate(Uniform(), replace(corpus, target_bytes=None), block_tokens=64).bits_per_byte is None


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
    results = [evaluate(model, c, block_tokens=n) for c in (corpus, shuffled) for n in (2, 45, 64, 4096)]
    assert len({len(list(blocks_of(corpus.documents, n))) for n in (2, 45, 64, 4096)}) == 4, "else the blocks do not differ"
    assert {r.tokens for r in results} == {corpus.num_targets} == {sum([4, 37, 1, 1, 28, 4, 21])}
    for result in results[1:]:
        assert result.loss == pytest.approx(results[0].loss, rel=1e-6)


def test_evaluation_needs_no_gradient():
    model = native(tiny_model("llama"))
    adapters = model.attach(LoraSettings(r=4), seed=0)
    evaluate(model, tiny_corpus([5, 9]), block_tokens=64)
    assert not adapters.grad.any()
    assert torch.is_grad_enabled()


def test_targets_of_a_document_are_never_negative():
    assert TokenDocument(np.arange(5), 2).num_targets == 3
    assert TokenDocument(np.arange(5), 9).num_targets == 0
