"""``lorabatch status RUN``: what a folder tells of a run that goes on, ended, or was killed."""

import pytest
from support.commands import infer_flags, train_flags, write_lines
from support.processes import start, wait_for_lines

from lorabatch.cli import main
from lorabatch.errors import TrainingError
from lorabatch.records import utc_now
from lorabatch.runs import RunFolder


def status(folder, capsys):
    code = main(["status", str(folder)])
    return code, capsys.readouterr().out


def begun(folder, kind):
    """A run that this process has."""
    return RunFolder.create(
        folder, kind=kind, config={}, command=[], environment={}, folder_flag="--save_dir"
    )


def step(number, **more):
    return {"event": "step", "step": number, "loss": 2.0, "lr": 1e-4, "tokens": 600,
            "tokens_per_s": 100.0, **more}  # fmt: skip


def test_a_training_that_runs(tmp_path, capsys):
    run = begun(tmp_path / "run", "train")
    assert status(run.path, capsys) == (0, f"{run.path}: train running; no step yet\n")
    run.save(planned_steps=30)
    with run.jsonl("events.jsonl") as file:
        file.write({"event": "eval", "step": 0, "eval_loss": 4.0, "bits_per_byte": None})
        for number in range(1, 11):
            file.write(step(number, loss=3.0 - number / 10))
        file.write({"event": "eval", "step": 10, "eval_loss": 3.5, "bits_per_byte": None})
    with (run.path / "events.jsonl").open("ab") as file:
        file.write(b'{"event": "step", "st')  # is being written
    code, out = status(run.path, capsys)
    assert code == 0 and out == (
        f"{run.path}: train running; step 10 of 30, loss 2.0000, validation 4.0000 -> 3.5000, "
        "100 tokens/s, about 2:00 left\n"
    )
    run.finish("completed")


def test_an_inference_that_runs(tmp_path, capsys, tiny_llama_dir):
    """Of a resumed run the pace is that of this attempt."""
    prompts = write_lines(tmp_path / "p.txt", ["one", "z" * 5000, "three"])
    folder = tmp_path / "run"
    assert main(infer_flags(tiny_llama_dir, prompts, folder, "--max_new_tokens", "3")) == 0
    capsys.readouterr()
    assert status(folder, capsys)[1] == (f"{folder}: infer completed; 3 of 3 requests, 1 failed\n")
    run = RunFolder.create(
        folder, kind="infer", config={}, command=[], environment={}, folder_flag="--output_dir",
        resume=True,
    )  # fmt: skip
    run.save(requests={"total": 5, "earlier": 1, "begun_at": utc_now()})
    out = status(folder, capsys)[1]
    assert f"{folder}: infer running; 3 of 5 requests, 1 failed, " in out
    assert "a minute, about 0:0" in out
    run.finish("completed")


def test_how_a_run_ended(tmp_path, capsys):
    run = begun(tmp_path / "run", "train")
    run.end_with(TrainingError("the loss is not a number"))
    code, out = status(run.path, capsys)
    assert code == 70 and out.endswith("train failed; no step yet, the loss is not a number\n")


def test_runs_of_one_command_and_shared_work(tmp_path, capsys):
    for name in ("b", "a"):
        begun(tmp_path / "jobs" / name, "train").finish("completed")
    assert status(tmp_path / "jobs", capsys)[1].splitlines() == [
        f"{tmp_path}/jobs/{name}: train completed; no step yet" for name in ("a", "b")
    ]
    for i in range(3):
        (tmp_path / "shared" / "shards" / f"{i:04}").mkdir(parents=True)
    (tmp_path / "shared" / "shards" / "0001" / "DONE.json").touch()
    assert status(tmp_path / "shared", capsys) == (
        0,
        f"{tmp_path}/shared: 1 of 3 begun shards done\n",
    )


@pytest.mark.parametrize("folder", ["nowhere", "."])
def test_what_is_no_run_is_one_line(tmp_path, capsys, folder):
    assert main(["status", str(tmp_path / folder)]) == 65
    assert "neither a run nor a submission" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_training_is_told_from_one_that_runs(tiny_llama_dir, corpus, tmp_path, capsys):
    folder = tmp_path / "run"
    flags = train_flags(tiny_llama_dir, corpus, folder, "--epochs", "5000", "--batch_size", "1")
    process = start(flags, log=tmp_path / "log")
    try:
        wait_for_lines(folder / "events.jsonl", 5, process)
        code, out = status(folder, capsys)
        assert code == 0 and "train running; step" in out and "of 60000" in out and "left" in out
    finally:
        process.kill()
        process.wait()
    out = status(folder, capsys)[1]
    assert "train no longer running, and did not end by itself: resume it; step" in out
