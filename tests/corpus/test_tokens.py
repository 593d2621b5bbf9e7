"""What is supervised: EOS, prompts, cuts and splits; byte counts."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import (
    CHAT_TEMPLATE,
    EOS,
    EOS_ID,
    tiny_tokenizer,
)

from lorabatch.corpus.readers import Document
from lorabatch.corpus.tokens import TokenDocument, tokenise
from lorabatch.errors import DataError

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
    supervised = [i for a, b in piece.spans for i in piece.token_ids[a:b].tolist()]
    assert len(supervised) == piece.num_targets == corpus.num_targets
    return piece.token_ids.tolist(), supervised


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
    assert token_ids == [
        *ids(tokenizer, f"<user>fever?{EOS}\n<assistant>"),
        *ids(tokenizer, "rest"),
        EOS_ID,
    ]
    assert supervised == [*ids(tokenizer, "rest"), EOS_ID]  # the template's EOS, not a second one


def with_template(tokenizer, template):
    """The same tokenizer, which tests share, with another chat template."""
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token=EOS)
    tokenizer.chat_template = template
    return tokenizer


def conversation(*texts):
    """A document of user and assistant in turn."""
    roles = ("user", "assistant")
    return Document(
        "",
        "a:7",
        messages=tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(texts)),
    )


# A template, and what it makes of the conversation "a", "first", "b", "second" with what is learned
# between brackets. SmolLM2's writes a system message of its own and ends with a line end; that of
# Llama 3's form has headers; that of Mistral's form has no role for the assistant.
TEMPLATES = {
    "smollm2": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\n[first<|im_end|>]\n<|im_start|>user\nb<|im_end|>\n"
        "<|im_start|>assistant\n[second<|im_end|><eos>]",
    ),
    "headers": (
        "{% for m in messages %}{{ '<|h|>' + m['role'] + '<|/h|>\n\n' + m['content'] | trim + eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|h|>assistant<|/h|>\n\n' }}{% endif %}",
        "<|h|>user<|/h|>\n\na<eos><|h|>assistant<|/h|>\n\n[first<eos>]<|h|>user<|/h|>\n\nb<eos>"
        "<|h|>assistant<|/h|>\n\n[second<eos>]",
    ),
    "instructions": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}",
        "«INST» a «/INST»[ first<eos>]«INST» b «/INST»[ second<eos>]",
    ),
}


def marked(tokenizer, text):
    """(ids, supervised ids) of a text that has what is supervised between brackets."""
    text = text.replace("<eos>", EOS)
    pieces = [part.split("]") for part in text.split("[")]
    ids_, supervised = [], []
    for i, part in enumerate(pieces):
        taught, given = part if i else ("", part[0])
        learned = ids(tokenizer, taught)
        supervised += learned
        ids_ += learned + ids(tokenizer, given.replace("«", "[").replace("»", "]"))
    return ids_, supervised


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_of_a_conversation_is_supervised(tokenizer, name):
    template, text = TEMPLATES[name]
    tokenizer = with_template(tokenizer, template)
    document = conversation("a", "first", "b", "second")
    assert one(document, tokenizer, max_len=512) == marked(tokenizer, text)
    unmarked = re.sub(r"\[( ?first[^]]*)\]", r"\1", text)
    last = marked(tokenizer, unmarked)
    assert one(document, tokenizer, max_len=512, turns="last") == last
    token_ids, supervised = one(document, tokenizer, max_len=512, train_on_prompt=True)
    assert token_ids == last[0] and supervised == token_ids[1:]


def test_a_conversation_is_cut_behind_an_answer(tokenizer):
    """What the user says behind the last answer that fits would teach nothing."""
    document = conversation("a", "first", "what else?", "second")
    whole, _ = one(document, tokenizer)
    start = ids(tokenizer, f"<user>a{EOS}\n<assistant>")
    first = [*ids(tokenizer, "first"), EOS_ID]
    for max_len in range(len(start) + len(first), len(whole) - len(ids(tokenizer, "second"))):
        assert one(document, tokenizer, max_len=max_len) == (start + first, first)
    token_ids, supervised = one(document, tokenizer, max_len=len(whole) - 1)
    assert token_ids == whole[:-1] and supervised == first + ids(tokenizer, "second")


def test_a_template_whose_prefixes_do_not_nest_is_refused_with_the_place(tokenizer):
    """Like those that drop the reasoning of earlier answers."""
    forgetful = CHAT_TEMPLATE.replace(
        "m['content']", "(m['content'] if loop.last or m['role'] == 'user' else '...')"
    )
    assert forgetful != CHAT_TEMPLATE
    tokenizer = with_template(tokenizer, forgetful)
    document = conversation("a", "first", "b", "second")
    with pytest.raises(
        DataError, match=r"^a:7: the chat template writes .*--turns last"
    ) as refused:
        one(document, tokenizer)
    assert refused.value.exit_code == 65
    _, supervised = one(document, tokenizer, turns="last")
    assert supervised == [*ids(tokenizer, "second"), EOS_ID]


def test_a_template_without_eos_gets_one(tokenizer):
    tokenizer = with_template(tokenizer, CHAT_TEMPLATE.replace(EOS, "</m>"))
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
    turncoat = with_template(tokenizer, "{{ messages | length }}" + CHAT_TEMPLATE)
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
    with pytest.raises(
        DataError, match="a: no document has a token to learn from; raise --max_len"
    ):
        tokenise([long], tokenizer, max_len=8)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(3, 12))
def test_split_text_loses_no_token(length, max_len):
    """All pieces together are the text and its EOS, and only the first token of a piece is not
    predicted."""
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
    documents = [
        Document("one", "a:1"),
        Document(" 2", "a:2", prompt="two"),
        Document("three", "a:3"),
    ]
    corpus = tokenise(documents, tokenizer, max_len=64)
    assert [tokenizer.decode(d.token_ids) for d in corpus.documents] == [
        f"one{EOS}",
        f"two 2{EOS}",
        f"three{EOS}",
    ]
    assert corpus.num_read == 3
    assert corpus.num_tokens == sum(len(d.token_ids) for d in corpus.documents)
    assert corpus.num_targets == corpus.num_tokens - 1 - len(ids(tokenizer, "two")) - 1
    assert corpus.target_bytes is None


# Bytes


def test_bytes_are_those_of_the_supervised_text(tokenizer):
    prompted = tokenise(
        [Document(" à rest.", "a:1", prompt=TEXT)], tokenizer, max_len=128, count_bytes=True
    )
    assert prompted.target_bytes == len(" à rest.".encode())  # EOS has no bytes
    plain = tokenise(
        [Document("zzz", "a:1"), Document("zz", "a:2")], tokenizer, max_len=128, count_bytes=True
    )
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


def test_bytes_of_a_conversation_are_those_of_its_answers(tokenizer):
    corpus = tokenise(
        [conversation("à?", "é", "ô?", "ab")], tokenizer, max_len=128, count_bytes=True
    )
    assert corpus.target_bytes == len("éab".encode())


def test_targets_of_a_document_are_never_negative():
    assert TokenDocument(np.arange(5), 2).num_targets == 3
    assert TokenDocument(np.arange(5), 9).num_targets == 0
