"""What ``train`` looks for before it loads a model, and what stops it."""

import json
import random
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase

import pytest
from support.commands import FIXED, write_lines, write_rows

from lorabatch.cli import main
from lorabatch.config import TrainConfig
from lorabatch.errors import DataError
from lorabatch.records import read_json
from lorabatch.runs import RunFolder
from lorabatch.train.datachecks import look_at_data
from lorabatch.train.planned import planned_runs
from lorabatch.train.ranks import ALONE

GENERATOR = random.Random(5)
SECRET = "390.533.447-05"


def sentence(count=12):
    return " ".join("".join(GENERATOR.choices(ascii_lowercase, k=5)) for _ in range(count))


def rows(count, group=""):
    return [{"text": sentence(), "ward": f"{group}{n}"} for n in range(count)]


def flags(model, train, val, folder, *more):
    words = ["train", "--base_model", model, "--train_path", train, "--val_path", val]
    words += ["--save_dir", folder, *FIXED, "--max_steps", 1, "--batch_size", 2, "--lora_r", 2]
    return [str(w) for w in (*words, *more)]


@pytest.fixture
def files(tmp_path):
    """(training, validation) files without a flaw but their size."""
    parts = ("train", rows(12, "a")), ("val", rows(3, "b"))
    return [write_rows(tmp_path / f"{name}.jsonl", part) for name, part in parts]


def test_a_leak_stops_before_anything_is_loaded_or_written(tmp_path, capsys):
    texts = write_lines(tmp_path / "t.txt", [sentence() for _ in range(5)])
    folder = tmp_path / "run"
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")  # would be refused, had it been read
    assert main(flags(model, texts, texts, folder)) == 65
    error = capsys.readouterr().err
    assert error.startswith(f"lorabatch train: {texts}: leak.exact: 5 of 5 validation texts")
    assert error.endswith("or give --data_checks off\n") and error.count("\n") == 1
    assert not folder.exists()


def test_off_looks_for_nothing(tmp_path, tiny_llama_dir, capsys):
    texts = write_lines(tmp_path / "t.txt", [sentence() for _ in range(5)])
    assert main(flags(tiny_llama_dir, texts, texts, tmp_path / "run", "--data_checks", "off")) == 0
    assert "data checks" not in capsys.readouterr().out
    assert read_json(tmp_path / "run" / "run.json")["data"]["checks"] is None


def test_a_group_in_both_files_stops(files, tmp_path, tiny_llama_dir, capsys):
    write_rows(files[1], [*rows(2, "b"), {"text": sentence(), "ward": "a7"}])
    argv = flags(tiny_llama_dir, *files, tmp_path / "run", "--group_field", "ward")
    assert main(argv) == 65
    error = capsys.readouterr().err
    assert "leak.group: 1 of 3" in error and "val.jsonl:3 = train.jsonl:8" in error
    assert main(flags(tiny_llama_dir, *files, tmp_path / "run")) == 0  # nobody said what a group is


def test_warnings_are_printed_and_kept_and_repeat_no_identifier(
    files, tmp_path, tiny_llama_dir, capsys
):
    write_rows(files[0], [*rows(11), {"text": f"CPF {SECRET} {sentence()}"}])
    assert main(flags(tiny_llama_dir, *files, tmp_path / "run")) == 0
    out, err = capsys.readouterr()
    assert "warn  pii.number" in out and "train.jsonl:12" in out
    assert "data checks: Looked at 15 documents in " in out
    checks = read_json(tmp_path / "run" / "run.json")["data"]["checks"]
    assert {c["check"]: c["level"] for c in checks["checks"] if c["level"] != "ok"} == {
        "pii.number": "warn",
        "size": "warn",
    }
    written = [p.read_bytes().decode(errors="replace") for p in (tmp_path / "run").rglob("*.json*")]
    assert len(written) > 4
    assert not any(SECRET in text for text in (out, err, *written))
    assert main(flags(tiny_llama_dir, *files, tmp_path / "strict", "--data_checks", "strict")) == 65
    assert "pii.number: 1 of 15" in capsys.readouterr().err and not (tmp_path / "strict").exists()


def test_several_runs_over_the_same_files_are_looked_at_once(
    files, tmp_path, tiny_llama_dir, capsys
):
    jobs = [
        {"name": "a", "lr": 1e-4},
        {"name": "b", "lora_r": 4},
        {"name": "c", "val_path": "none"},
    ]
    file = write_lines(tmp_path / "jobs.jsonl", map(json.dumps, jobs))
    assert main(flags(tiny_llama_dir, *files, tmp_path / "runs", "--jobs", file)) == 0
    assert capsys.readouterr().out.count("data checks: ") == 2
    found = [read_json(tmp_path / "runs" / n / "run.json")["data"]["checks"] for n in "abc"]
    assert found[0] == found[1] != found[2]


def test_a_resumed_run_of_the_same_files_does_not_look_again(files, tmp_path, capsys):
    config = TrainConfig(
        train_path=(str(files[0]),), val_path=str(files[1]), save_dir=str(tmp_path), resume="auto"
    )
    facts = {"kind": "train", "command": [], "environment": {}, "folder_flag": "--save_dir"}

    def looked(config):
        """(the runs, whether anybody looked)."""
        runs = look_at_data(planned_runs(config, Path(tmp_path)), ALONE)
        return runs, "data checks" in capsys.readouterr().out

    runs, fresh = looked(config)
    assert fresh
    folder = RunFolder.create(tmp_path, config=config.to_dict(), **facts)
    folder.save(data={"checks": runs[0].checks})
    folder.finish("interrupted")
    again, fresh = looked(replace(config, lr=1.0))
    assert not fresh and again[0].checks == json.loads(json.dumps(runs[0].checks))
    assert looked(replace(config, group_field="ward"))[1]
    assert looked(replace(config, resume=None))[1]
    write_rows(files[1], rows(4))
    assert looked(config)[1]


def test_only_the_documents_that_are_used_are_looked_at(files, tmp_path):
    write_rows(files[1], [*rows(3), json.loads(files[0].read_text().splitlines()[0])])
    config = TrainConfig(
        train_path=(str(files[0]),), val_path=str(files[1]), save_dir=str(tmp_path)
    )
    with pytest.raises(DataError, match=r"leak\.exact: 1 of 4"):
        look_at_data(planned_runs(config, tmp_path), ALONE)
    look_at_data(planned_runs(replace(config, max_val_documents=3), tmp_path), ALONE)
