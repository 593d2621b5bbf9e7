"""Files that somebody changes while a run reads or writes them, that hold something twice, or of
which half an older run is left."""

import json
import os
import shutil
from pathlib import Path

import pytest
from support.commands import completions, infer_flags

from lorabatch.cli import main
from lorabatch.infer.results import Results
from lorabatch.schema import sealed

PROMPTS = "".join(f"Patient {i} reports\n" for i in range(9))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text(PROMPTS)
    return path


def infer(model, prompts, out, *more):
    fixed = ["--max_new_tokens", 3, "--batch_size", 2, "--ignore_eos"]
    return main(infer_flags(model, prompts, out, *fixed, *more))


def run_record(out):
    return json.loads((out / "run.json").read_text())


def texts(out):
    return {record["id"]: record["text"] for record in completions(out)}


@pytest.fixture
def after(monkeypatch):
    """Let something happen after the n-th record of a run."""

    def arrange(count, action):
        write, seen = Results._write, []

        def counting(self, request):
            write(self, request)
            seen.append(request)
            if len(seen) == count:
                action()

        monkeypatch.setattr(Results, "_write", counting)

    return arrange


def replaced(path):
    shutil.copy(path, path.with_name("copy"))
    path.with_name("copy").rename(path)


def edited(path):
    """In place, the size stays."""
    with path.open("r+b") as file:
        file.seek(2)
        file.write(b"X")


def lengthened(path):
    with path.open("ab") as file:
        file.write(b"Patient 10 reports\n")


def removed(path):
    path.unlink()


def truncated(path):
    os.truncate(path, 5)


WHEN = [
    (removed, 4),
    (truncated, 4),
    (replaced, 4),
    (lengthened, 4),
    (edited, 4),
    (removed, 9),
    (edited, 9),
]  # after that many of 9 records


@pytest.mark.parametrize(
    ("damage", "count"), WHEN, ids=lambda x: x if isinstance(x, int) else x.__name__
)
def test_completions_that_somebody_else_changes_end_the_run(
    damage, count, tiny_llama_dir, prompts, tmp_path, after, capsys
):
    out = tmp_path / "out"
    after(count, lambda: damage(out / "completions.jsonl"))
    assert infer(tiny_llama_dir, prompts, out) == 70
    assert (
        "completions.jsonl: changed, replaced or removed during the run; keep other programs away"
        in capsys.readouterr().err
    )
    assert run_record(out)["status"] == "failed"


@pytest.mark.parametrize(
    ("damage", "count"), WHEN, ids=lambda x: x if isinstance(x, int) else x.__name__
)
def test_prompts_that_change_end_the_run(
    damage, count, tiny_llama_dir, prompts, tmp_path, after, capsys
):
    out = tmp_path / "out"
    after(count, lambda: damage(prompts))
    assert infer(tiny_llama_dir, prompts, out) == 65
    assert (
        "p.txt: changed, replaced or removed during the run; leave it alone"
        in capsys.readouterr().err
    )
    assert run_record(out)["status"] == "failed"
    prompts.write_text(PROMPTS)
    assert infer(tiny_llama_dir, prompts, out, "--resume") == 0 and len(texts(out)) == 9


def test_prompts_that_are_appended_before_they_are_read_again(
    tiny_llama_dir, prompts, tmp_path, monkeypatch, capsys
):
    """What the second reading finds behind the end is no request of this run."""
    from lorabatch.infer.feed import Feed

    begin = Feed.__init__

    def appended(self, *args, **kwargs):
        lengthened(prompts)
        begin(self, *args, **kwargs)

    monkeypatch.setattr(Feed, "__init__", appended)
    assert infer(tiny_llama_dir, prompts, tmp_path / "out") == 65
    assert "changed, replaced or removed" in capsys.readouterr().err


def test_a_change_ends_a_resumed_run_that_was_completed_once(
    tiny_llama_dir, prompts, tmp_path, after
):
    out = tmp_path / "out"
    assert infer(tiny_llama_dir, prompts, out) == 0
    lengthened(prompts)
    after(1, lambda: edited(prompts))
    assert infer(tiny_llama_dir, prompts, out, "--resume") == 65
    assert run_record(out)["status"] == "failed"


def test_completions_that_are_there_twice_are_dropped_and_counted(
    tiny_llama_dir, prompts, tmp_path, capsys
):
    out = tmp_path / "out"
    assert infer(tiny_llama_dir, prompts, out) == 0
    path = out / "completions.jsonl"
    lines, expected = path.read_text().splitlines(keepends=True), texts(out)
    path.write_text("".join([lines[0], *lines[:4], lines[2]]) + lines[5][:20])
    capsys.readouterr()
    assert infer(tiny_llama_dir, prompts, out, "--resume") == 0
    said = capsys.readouterr()
    assert (
        f"{path}: 2 completions were there twice: one of each is kept" in said.err
        and "4 finished earlier" in said.out
    )
    assert path.read_text().count("\n") == 9 and texts(out) == expected
    assert path.read_text().startswith("".join(lines[:4])), (
        "what was there first stays, in its order"
    )
    path.write_text("".join(lines + lines))
    assert infer(tiny_llama_dir, prompts, out, "--resume") == 0
    assert path.read_text() == "".join(lines) and run_record(out)["status"] == "completed"


def test_of_a_failure_and_a_completion_the_completion_stays(tiny_llama_dir, prompts, tmp_path):
    out = tmp_path / "out"
    assert infer(tiny_llama_dir, prompts, out) == 0
    path = out / "completions.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    failed = sealed(json.loads(lines[3]) | {"error": "lost", "text": ""}).decode() + "\n"
    path.write_text("".join([failed, *lines]))
    assert infer(tiny_llama_dir, prompts, out, "--resume") == 0
    assert path.read_text() == "".join(lines) and run_record(out)["failed"] == 0


@pytest.mark.parametrize(
    "line",
    [
        '{"id": "1"}',
        "[]",
        '{"id": "1", "sample": 0, "key": "no number", "error": null, "text": "a"}',
        '"x"',
    ],
)
def test_a_line_that_is_no_completion_is_put_aside(line, tiny_llama_dir, prompts, tmp_path, capsys):
    out = tmp_path / "out"
    assert infer(tiny_llama_dir, prompts, out) == 0
    before = (out / "completions.jsonl").read_text()
    (out / "completions.jsonl").write_text(before + line + "\n")
    assert infer(tiny_llama_dir, prompts, out, "--resume") == 0
    assert "1 damaged lines moved to completions.jsonl.damaged" in capsys.readouterr().err
    assert (out / "completions.jsonl").read_text() == before and (
        out / "completions.jsonl.damaged"
    ).read_text() == line + "\n"


OLD = ("--temperature", 0.7, "--output_format", "openai")


def killed_at_a_removal(number, *words):
    """Run in a process of its own that dies at its n-th removal of a file; False if it had none so
    late."""
    child = os.fork()
    if child == 0:
        unlink, seen = Path.unlink, []

        def dying(self, missing_ok=False):
            seen.append(self)
            if len(seen) == number:
                os._exit(9)
            unlink(self, missing_ok=missing_ok)

        Path.unlink = dying
        infer(*words)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


# that it has threads and forks: the child loads no model
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_kill_while_an_earlier_run_is_removed_leaves_no_mixture(
    tiny_llama_dir, prompts, tmp_path, capsys
):
    old, out = tmp_path / "old", tmp_path / "out"
    assert (
        infer(tiny_llama_dir, prompts, old, *OLD) == 0
        and infer(tiny_llama_dir, prompts, tmp_path / "new") == 0
    )
    (old / "notes.txt").write_text("the user's own")
    for number in range(1, 7):
        shutil.copytree(old, out)
        assert killed_at_a_removal(number, tiny_llama_dir, prompts, out, "--overwrite"), (
            "the run removes at least six names"
        )
        assert infer(tiny_llama_dir, prompts, out) == 64
        assert "add --resume" in capsys.readouterr().err
        left = {p.name for p in out.iterdir()}
        if infer(tiny_llama_dir, prompts, out, "--resume") == 64:
            assert (
                "completions.jsonl" in left
                and infer(tiny_llama_dir, prompts, out, "--overwrite") == 0
            )
        assert texts(out) == texts(tmp_path / "new") and not (out / "batch_output.jsonl").exists()
        assert (out / "notes.txt").read_text() == "the user's own"
        shutil.rmtree(out)
