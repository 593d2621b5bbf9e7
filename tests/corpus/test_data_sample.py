"""The promises of data_sample/README.md."""

import re
from collections import Counter

import pytest
from support.paths import SAMPLE

from lorabatch.corpus.readers import read_documents

FOLDERS = [SAMPLE, SAMPLE / "pt"]
TRAIN = {"data_sample": 512, "pt": 543}


def sentences(text):
    pieces = re.split(r"(?<=[.!?])\s+|\n", text)
    return {piece.strip() for piece in pieces if len(piece.split()) >= 4}


@pytest.mark.parametrize("folder", FOLDERS, ids=["en", "pt"])
def test_counts_and_no_duplicates(folder):
    train, val = (read_documents(folder / f"{name}.txt") for name in ("train", "val"))
    prompts = (folder / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert (len(train), len(val), len(prompts)) == (TRAIN[folder.name], 80, 48)
    assert len({d.text for d in [*train, *val]}) == len(train) + len(val)
    assert len(set(prompts)) == 48 and all(
        prompt.strip() == prompt and prompt for prompt in prompts
    )


@pytest.mark.parametrize("folder", FOLDERS, ids=["en", "pt"])
def test_validation_shares_no_sentence_with_training(folder):
    seen = set().union(*(sentences(d.text) for d in read_documents(folder / "train.txt")))
    val = [sentences(d.text) for d in read_documents(folder / "val.txt")]
    assert len(seen) > 2000 and min(map(len, val)) >= 1
    assert not seen & set().union(*val)


@pytest.mark.parametrize("folder", FOLDERS, ids=["en", "pt"])
def test_documents_vary_in_form_and_length(folder):
    texts = [d.text for d in read_documents(folder / "train.txt")]
    words = sorted(len(text.split()) for text in texts)
    assert words[0] < 40 and words[len(words) // 2] > 55 and words[-1] > 200
    openings = Counter(" ".join(text.split()[:3]) for text in texts)
    assert max(openings.values()) <= 12
    assert sum("\n" in text for text in texts) >= 60, (
        "forms with several lines: notes, logs, dialogues"
    )


PERSONAL = {
    "address on the web": r"https?://|www\.",
    "e-mail": r"[\w.+-]+@[\w-]+\.\w+",
    "CPF": r"\b\d{3}\.\d{3}\.\d{3}-\d{2}\b",
    "telephone": r"(?<![\d:.])\(?\b\d{2}\)? ?9?\d{4}-\d{4}\b",
    "title and name": r"\b(?:Mr|Mrs|Ms|Dr|Sr|Sra|Dra)\.? (?!the\b)[A-ZÁÉÍÓÚ][a-zà-ú]+",
}


@pytest.mark.parametrize("folder", FOLDERS, ids=["en", "pt"])
@pytest.mark.parametrize("kind", PERSONAL)
def test_no_personal_data(folder, kind):
    text = "\n".join(
        (folder / f"{name}.txt").read_text(encoding="utf-8") for name in ("train", "val", "prompts")
    )
    assert re.findall(PERSONAL[kind], text) == []


def test_the_patterns_for_personal_data_find_some():
    examples = [
        "see https://a.example",
        "write to a.b@c.org",
        "CPF 123.456.789-09",
        "(21) 99876-5432",
        "Dr. Silva said",
    ]
    for pattern, example in zip(PERSONAL.values(), examples, strict=True):
        assert re.search(pattern, example)
