"""Several training files, each with a weight."""

import pytest
from support.commands import train_flags, write_lines
from support.models import tiny_tokenizer

from lorabatch.cli import main
from lorabatch.errors import UsageError
from lorabatch.records import read_json, read_jsonl
from lorabatch.train.planned import weighted_paths

FLAGS = ["--batch_size", "4", "--epochs", "2", "--lora_r", "2"]


@pytest.fixture
def files(tmp_path):
    """Documents of two lengths, so that steps tell whose they read."""
    short = write_lines(tmp_path / "short.txt", ["zz"] * 8)
    long = write_lines(tmp_path / "long:1.txt", ["z" * 30] * 10)
    return short, long


def test_an_epoch_reads_of_each_file_its_share(tiny_llama_dir, files, tmp_path, capsys):
    short, long = files
    command = train_flags(tiny_llama_dir, short, tmp_path / "run", *FLAGS)
    command += ["--train_path", str(short), f"{long}:0.3", "--val_path", "none"]
    assert main(command) == 0
    assert "train 18 documents" in (out := capsys.readouterr().out)
    assert "11 of them in an epoch" in out
    sizes = [len(tiny_tokenizer()(text)["input_ids"]) + 1 for text in ("zz", "z" * 30)]
    steps = [e for e in read_jsonl(tmp_path / "run" / "events.jsonl") if e["event"] == "step"]
    assert len(steps) == 2 * 3 and sum(e["documents"] for e in steps) == 2 * 11
    assert sum(e["tokens"] for e in steps) == 2 * (8 * sizes[0] + 3 * sizes[1])
    assert read_json(tmp_path / "run" / "run.json")["config"]["train_path"][1] == f"{long}:0.3"
    # the same command has nothing to do; other weights are another run
    assert main([*command, "--resume", "auto"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    other = [word.replace(":0.3", ":0.5") for word in command]
    assert main([*other, "--resume", "auto"]) == 64
    assert "was saved by a run with other settings" in capsys.readouterr().err


def test_paths_and_weights(files):
    short, long = files
    assert weighted_paths([str(short), f"{short}:2", f"{short}:0", str(long), f"{long}:.5"]) == [
        (str(short), 1.0), (str(short), 2.0), (str(short), 0.0), (str(long), 1.0), (str(long), 0.5),
    ]  # fmt: skip
    assert weighted_paths(["data:7/a.txt"]) == [("data:7/a.txt", 1.0)]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["a.txt:much"], "the weight 'much' is not a number from 0"),
        (["a.txt:-1"], "the weight '-1' is not"),
        (["a.txt:nan"], "the weight 'nan' is not"),
        (["a.txt:1e9"], "the weight '1e9' is not"),
        (["a.txt:0", "b.txt:0"], "all weights are 0"),
    ],
)
def test_weights_that_are_none(words, text, capsys, tmp_path):
    with pytest.raises(UsageError, match=text):
        weighted_paths(words)
    assert main(["train", "--train_path", *words, "--save_dir", str(tmp_path / "run")]) == 64
    err = capsys.readouterr().err
    assert text in err and err.count("\n") == 1 and not (tmp_path / "run").exists()
