"""Prompts from tables and packed files, and the fields that go along into the records."""

import csv
import gzip
import json

import pytest
from support.commands import completions, infer_flags, write_rows

from lorabatch.cli import main

ROWS = [
    {"id": "a", "prompt": "The patient", "max_new_tokens": 5, "ward": "7", "bed": "1"},
    {"id": "b", "prompt": "A fever, and\na cough", "temperature": 0.5, "ward": None, "bed": "2"},
    {"id": "c", "prompt": "z" * 5000, "ward": "9", "bed": "3"},
]
FIELDS = ("id", "prompt", "max_new_tokens", "temperature", "ward", "bed")
FLAGS = ["--no_cuda", "--max_new_tokens", "4", "--output_order", "input"]
KEEP = ["--keep_fields", "ward", "id"]


def as_csv(path):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows({k: v for k, v in row.items() if v is not None} for row in ROWS)
    return path


def as_parquet(path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    parquet.write_table(pyarrow.Table.from_pylist([dict.fromkeys(FIELDS) | r for r in ROWS]), path)
    return path


def as_packed(path):
    path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in ROWS).encode()))
    return path


KINDS = {"p.csv": as_csv, "p.parquet": as_parquet, "p.jsonl.gz": as_packed}


@pytest.mark.parametrize("name", KINDS)
def test_a_table_gives_the_records_of_its_jsonl(tiny_llama_dir, tmp_path, capsys, name):
    for folder, prompts in (
        ("jsonl", write_rows(tmp_path / "p.jsonl", ROWS)),
        ("table", KINDS[name](tmp_path / name)),
    ):
        flags = infer_flags(tiny_llama_dir, prompts, tmp_path / folder, *FLAGS, *KEEP)
        assert main(flags) == 0
        assert "ignored fields of the prompts: bed\n" in capsys.readouterr().out
    wanted, found = (completions(tmp_path / folder) for folder in ("jsonl", "table"))
    same = ("id", "prompt", "text", "output_tokens", "error", "fields", "index", "key")
    for ours, theirs in zip(found, wanted, strict=True):
        if name == "p.csv" and ours["fields"]["ward"] == "":  # of an empty cell the text is empty
            ours["fields"]["ward"] = None
        assert {k: ours[k] for k in same} == {k: theirs[k] for k in same}
    assert [r["fields"] for r in wanted] == [{"ward": row["ward"], "id": row["id"]} for row in ROWS]
    assert wanted[0]["output_tokens"] == 5 and wanted[2]["error"], "errors keep their fields too"


def test_without_the_flag_records_have_no_fields(tiny_llama_dir, tmp_path):
    prompts = write_rows(tmp_path / "p.jsonl", ROWS[:1])
    assert main(infer_flags(tiny_llama_dir, prompts, tmp_path / "out", *FLAGS)) == 0
    assert "fields" not in completions(tmp_path / "out")[0]


def test_dates_of_a_table_are_kept_as_text(tiny_llama_dir, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import datetime

    import pyarrow

    rows = [{"prompt": "a b", "day": datetime.date(2026, 11, 30)}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    flags = infer_flags(
        tiny_llama_dir, tmp_path / "p.parquet", tmp_path / "out", *FLAGS, "--keep_fields", "day"
    )
    assert main(flags) == 0
    assert completions(tmp_path / "out")[0]["fields"] == {"day": "2026-11-30"}


MISTAKES = [
    ("p.csv", "prompt,ward\na,1\n", ["--keep_fields", "wart"], "did you mean 'ward'"),
    ("p.txt", "a\n", ["--keep_fields", "ward"], "no row has this field"),
    ("p.csv", "prompt,ward\na\n", [], "p.csv:2: 1 cells where the header names 2"),
    ("p.csv", "question_,ward\na,1\n", [], "p.csv:2: no 'prompt'"),
    ("p.csv.gz", "prompt\na\n", [], "not a readable gzip file"),
    ("p.xlsx", "prompt\na\n", [], "unknown kind of file '.xlsx'"),
]


@pytest.mark.parametrize(("name", "content", "flags", "text"), MISTAKES)
def test_mistakes_are_named_before_the_model_loads(tmp_path, capsys, name, content, flags, text):
    (tmp_path / name).write_text(content)
    command = infer_flags("/no/such/model", tmp_path / name, tmp_path / "out", *flags)
    assert main(command) == 65
    err = capsys.readouterr().err
    assert text in err and err.count("\n") == 1 and not (tmp_path / "out").exists()
