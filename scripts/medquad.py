#!/usr/bin/env python3
"""Questions and answers to learn from, out of MedQuAD's XML files:

    git clone https://github.com/abachaa/MedQuAD
    python scripts/medquad.py MedQuAD

writes MedQuAD/train.jsonl and MedQuAD/val.jsonl with ``id``, ``question``, ``answer``, ``source``
and ``url``. Whatever shares a file, a page, a subject or a question goes to one side whole, and a
validation answer that mostly repeats a training answer is left out: otherwise the validation loss
would measure memory. Collections 10 to 12 have no answers.

Source: Ben Abacha and Demner-Fushman, BMC Bioinformatics 20(1):511, 2019; licence CC BY 4.0.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from pathlib import Path

VAL_PERCENT = 8
SHINGLE_WORDS = 8
REPEATED = 0.5  # of an answer's shingles, in one training answer
FEWEST_WORDS = 5  # of an answer: a shorter one is a heading that lost its text

Row = dict[str, str]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a clone of MedQuAD")
    folder = parser.parse_args().folder
    pairs = list(unrepeated(read(folder)))
    if not pairs:
        parser.error(f"{folder}: no questions and answers (*_QA*/*.xml) in it")
    groups = joined([keys for _, keys in pairs])
    train = [row for (row, _), group in zip(pairs, groups, strict=True) if not for_val(group)]
    held_out = [row for (row, _), group in zip(pairs, groups, strict=True) if for_val(group)]
    val = list(new_answers(held_out, train))
    for name, rows in (("train", train), ("val", val)):
        path = folder / f"{name}.jsonl"
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_text("".join(lines), encoding="utf-8")
        print(f"{path}: {len(rows)} questions and answers")
    return 0


def read(folder: Path) -> Iterator[tuple[Row, set[str]]]:
    """Rows with an answer, and what each has in common with others."""
    for path in sorted(folder.glob("*_QA*/*.xml")):
        document = ElementTree.parse(path).getroot()
        collection = path.parent.name.split("_")[0]
        url, focus = document.get("url", ""), document.findtext("Focus", "")
        cuis = {f"cui {cui.text}" for cui in document.iter("CUI") if cui.text}
        for number, pair in enumerate(document.iter("QAPair"), 1):
            question, answer = (cleaned(pair.findtext(x) or "") for x in ("Question", "Answer"))
            if question and len(answer.split()) >= FEWEST_WORDS:
                row_id = f"{int(collection):02d}-{path.stem}-{number}"
                source = document.get("source", "")
                shared = {f"file {path}", f"url {url}", f"focus {key(focus)}", key(question)}
                row = {"id": row_id, "question": question, "answer": answer}
                yield row | {"source": source, "url": url}, shared | cuis


def cleaned(text: str) -> str:
    """Spaces and blank lines collapsed, each item of a list on a line of its own."""
    text = re.sub(r"\s+-\s{1,4}(?=\S)", "\n- ", unicodedata.normalize("NFC", text))
    return "\n".join(filter(None, (" ".join(line.split()) for line in text.splitlines())))


def key(text: str) -> str:
    """Texts with the same letters and digits count as one."""
    return "".join(c for c in text.casefold() if c.isalnum())


def unrepeated(pairs: Iterable[tuple[Row, set[str]]]) -> Iterator[tuple[Row, set[str]]]:
    """The first of those with equal questions, and of those with equal answers."""
    seen: set[str] = set()
    for row, shared in pairs:
        texts = {f"q {key(row['question'])}", f"a {key(row['answer'])}"}
        if not texts & seen:
            seen |= texts
            yield row, shared


def joined(keys: list[set[str]]) -> list[int]:
    """Of each set, the first one that it hangs together with through shared members."""
    parent = list(range(len(keys)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    owner: dict[str, int] = {}
    for i, names in enumerate(keys):
        for name in names:
            one, other = sorted((root(owner.setdefault(name, i)), root(i)))
            parent[other] = one
    return [root(i) for i in range(len(keys))]


def for_val(group: int) -> bool:
    digest = hashlib.sha256(str(group).encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < VAL_PERCENT


def new_answers(held_out: list[Row], train: list[Row]) -> Iterator[Row]:
    """Those of ``held_out`` whose answer is not mostly that of one training row."""
    where: dict[int, list[int]] = {}
    for number, row in enumerate(train):
        for shingle in shingles(row["answer"]):
            where.setdefault(shingle, []).append(number)
    for row in held_out:
        own, counts = shingles(row["answer"]), dict[int, int]()
        for number in (n for shingle in own for n in where.get(shingle, ())):
            counts[number] = counts.get(number, 0) + 1
        if max(counts.values(), default=0) < REPEATED * max(1, len(own)):
            yield row


def shingles(text: str) -> set[int]:
    words = re.findall(r"\w+", text.casefold())
    return {
        hash(tuple(words[i : i + SHINGLE_WORDS])) for i in range(len(words) - SHINGLE_WORDS + 1)
    }


if __name__ == "__main__":
    sys.exit(main())
