"""MedQuAD's XML files become rows to learn from, and nothing of validation is in training."""

import json
import subprocess
import sys
from xml.sax.saxutils import escape

import pytest
from support.paths import ROOT

BOILERPLATE = "The signs listed here were gathered from many reports and need not all be present. "


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(training rows, validation rows) of 300 files; each subject has two of them."""
    folder = tmp_path_factory.mktemp("MedQuAD")
    (folder / "1_Real_QA").mkdir()
    for n in range(300):
        subject, own = n // 2, " ".join(f"word{n}x{i}" for i in range(12))
        answers = [f"About {own}.    -  First {own}", BOILERPLATE * 3 + own, "See above", "", own]
        pairs = "".join(
            f"<QAPair><Question>Question {i} of {n} &amp; more ?</Question>"
            f"<Answer>{escape(answer)}</Answer></QAPair>"
            for i, answer in enumerate([*answers, own])
        )
        (folder / "1_Real_QA" / f"{n:07d}.xml").write_text(
            f'<Document source="Real" url="page {n}"><Focus>Subject {n}</Focus>'
            f"<CUI>C{subject}</CUI><QAPairs>{pairs}</QAPairs></Document>",
            encoding="utf-8",
        )
    (folder / "10_Empty_QA").mkdir()
    subprocess.run([sys.executable, ROOT / "scripts" / "medquad.py", folder], check=True)
    return [
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_bytes().splitlines()]
        for name in ("train", "val")
    ]


def subjects(rows):
    return {int(row["id"].split("-")[1]) // 2 for row in rows}


def test_subjects_are_on_one_side(made):
    train, val = made
    assert len(subjects(train)) > 100 and len(subjects(val)) > 5
    assert not subjects(train) & subjects(val)


def test_short_empty_and_repeated_answers_are_left_out(made):
    texts = [row["answer"] for rows in made for row in rows]
    assert len(texts) == len(set(texts)) and not {"", "See above"} & set(texts)
    assert all(row["question"].endswith("& more ?") for rows in made for row in rows)


def test_a_validation_answer_does_not_repeat_a_training_answer(made):
    train, val = made
    assert any(row["answer"].startswith("The signs") for row in train)
    assert not any(row["answer"].startswith("The signs") for row in val)


def test_items_of_a_list_have_lines_of_their_own(made):
    assert all("\n- First" in r["answer"] for r in made[1] if r["answer"].startswith("About"))
