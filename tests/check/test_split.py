"""``lorabatch split`` keeps together what belongs together, and changes no row."""

import csv
import json
import random

import pytest
from support.commands import write_lines, write_rows

from lorabatch.cli import main
from lorabatch.corpus.readers import read_documents

GENERATOR = random.Random(3)


def sentence(count=30):
    return " ".join(f"word{GENERATOR.randrange(10**6)}" for _ in range(count))


def split(folder, file, *words):
    out = folder / "out"
    assert main(["split", str(file), "--output_dir", str(out), *map(str, words)]) == 0
    return [sorted(out.glob(f"{name}.*"))[0] for name in ("train", "val")]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_groups_and_near_equal_texts_stay_on_one_side(tmp_path):
    rows = [{"text": sentence(), "patient": n % 60, "n": n} for n in range(200)]
    for n in range(0, 40, 2):  # near-equal to its neighbour, who is another patient
        rows[n + 1]["text"] = rows[n]["text"] + " more"
    train, val = map(
        rows_of,
        split(
            tmp_path,
            write_rows(tmp_path / "d.jsonl", rows),
            "--group_field",
            "patient",
            "--val_fraction",
            0.2,
        ),
    )
    assert sorted(r["n"] for r in (*train, *val)) == list(range(200))
    assert [r["n"] for r in val] == sorted(r["n"] for r in val) and 20 <= len(val) <= 40
    assert not {r["patient"] for r in train} & {r["patient"] for r in val}
    assert not {r["text"].removesuffix(" more") for r in train} & {
        r["text"].removesuffix(" more") for r in val
    }
    assert (
        main(
            [
                "check",
                str(tmp_path / "out/train.jsonl"),
                str(tmp_path / "out/val.jsonl"),
                "--group_field",
                "patient",
                "--output_dir",
                str(tmp_path / "check"),
            ]
        )
        == 0
    )


def test_a_seed_says_which(tmp_path):
    file = write_lines(tmp_path / "d.txt", [sentence() for _ in range(50)])
    found = []
    for n, seed in enumerate((1, 1, 2)):
        (tmp_path / str(n)).mkdir()
        found.append(
            split(tmp_path / str(n), file, "--val_fraction", 0.3, "--seed", seed)[1].read_text()
        )
    assert found[0] == found[1] != found[2] and len(found[0].splitlines()) == 15


@pytest.mark.parametrize("suffix", ["txt", "blocks", "csv", "jsonl", "parquet"])
def test_every_kind_of_file_reads_back(suffix, tmp_path):
    texts = [f'{sentence(4)}, "so"' for _ in range(20)]
    if suffix == "blocks":
        texts = [text + "\nsecond line" for text in texts]
    file = tmp_path / f"d.{'txt' if suffix == 'blocks' else suffix}"
    if suffix == "csv":
        with file.open("w", newline="") as out:
            csv.writer(out).writerows([["text"], *([text + "\nx"] for text in texts)])
    elif suffix == "jsonl":
        write_rows(file, [{"text": text} for text in texts])
    elif suffix == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        parquet.write_table(pyarrow.table({"text": texts}), file)
    else:
        file.write_text(("\n\n" if suffix == "blocks" else "\n").join(texts) + "\n")
    before = [d.text for d in read_documents(file)]
    sides = [
        [d.text for d in read_documents(path)]
        for path in split(tmp_path, file, "--val_fraction", 0.25)
    ]
    assert len(before) == 20 and len(sides[1]) == 5
    assert sorted([*sides[0], *sides[1]]) == sorted(before)


def test_what_cannot_be_split_is_refused(tmp_path, capsys):
    rows = [{"text": sentence(), "patient": 1} for _ in range(9)]
    file = write_rows(tmp_path / "d.jsonl", rows)
    out = tmp_path / "out"
    words = ["split", str(file), "--output_dir", str(out)]
    assert main([*words, "--group_field", "patient"]) == 65
    error = capsys.readouterr().err
    assert "9 documents in 1 groups, the largest of 9" in error and error.count("\n") == 1
    assert main([*words, "--group_field", "ward"]) == 65 and not out.exists()
    out.mkdir()
    (out / "val.jsonl").write_text("mine")
    assert main([*words, "--val_fraction", "0.5"]) == 64
    assert "is there already" in capsys.readouterr().err
    assert (out / "val.jsonl").read_text() == "mine" and not (out / "train.jsonl").exists()
