"""Runs that are killed, stopped, corrupted and starved of disk, and then go on: the end must be
that of a run that was not."""

import json
import os
import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from support.commands import ALL_CORES, TEXTS, adapter_bytes, history, write_lines
from support.models import NATIVE_TYPES
from support.paths import SAMPLE
from support.processes import start, wait_for_lines
from support.training import STEPS, finish, flags

from lorabatch.cli import main
from lorabatch.records import write_json
from lorabatch.train import checkpoint


def assert_as_if_uninterrupted(folder, reference):
    assert adapter_bytes(folder) == adapter_bytes(reference)
    assert history(folder) == history(reference)
    assert [e["step"] for e in history(folder) if e["event"] == "step"] == list(range(1, STEPS + 1))
    ours, theirs = (json.loads((Path(f) / "metrics.json").read_text()) for f in (folder, reference))
    for name in (
        "steps",
        "loss",
        "eval_loss",
        "eval_loss_before",
        "best_step",
        "total_tokens",
        "target_tokens",
    ):
        assert ours[name] == theirs[name], name
    assert json.loads((Path(folder) / "run.json").read_text())["status"] == "completed"


@pytest.fixture(scope="module")
def uninterrupted(tiny_llama_dir, tmp_path_factory):
    """Finished runs in fp32 and bf16, and how long one takes."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    write_lines(folder / "train.txt", TEXTS)
    for dtype in ("fp32", "bf16"):
        assert (
            main(flags(tiny_llama_dir, folder / "train.txt", folder / dtype, "--dtype", dtype)) == 0
        )
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "kills"), [("fp32", 12), ("bf16", 4)])
def test_killed_at_random_instants_ends_with_the_same_bits(
    dtype, kills, attempts, uninterrupted, tiny_llama_dir, corpus, tmp_path
):
    argv = flags(tiny_llama_dir, corpus, tmp_path / "run", "--dtype", dtype, "--resume", "auto")
    codes = finish(attempts, argv, tmp_path / "log", seed=5, kills=kills)
    assert codes.count(-signal.SIGKILL) >= kills, codes
    assert_as_if_uninterrupted(tmp_path / "run", uninterrupted / dtype)


@pytest.mark.slow
def test_killed_at_every_write_of_a_save_ends_with_the_same_bits(
    attempts, uninterrupted, tiny_llama_dir, corpus, tmp_path
):
    """Whatever call comes next (fsync, rename, delete), dying before it loses nothing that was
    saved."""
    argv = flags(tiny_llama_dir, corpus, tmp_path / "run", "--resume", "auto")
    codes = []
    for number in range(14, 32):  # as many as one save has, from the first write after loading on
        codes.append(attempts(argv, tmp_path / "log", kill_at_write=number))
        found = checkpoint.newest(tmp_path / "run" / "checkpoints")
        assert found is None or checkpoint.load(found.path)
        if codes[-1] == 0:
            break
    assert codes.count(-signal.SIGKILL) >= 5, codes
    assert attempts(argv, tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert_as_if_uninterrupted(tmp_path / "run", uninterrupted / "fp32")


@pytest.mark.parametrize(
    "number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name
)
def test_a_signal_saves_and_exits_75_until_the_same_bits_are_there(
    number, attempts, uninterrupted, tiny_llama_dir, corpus, tmp_path
):
    argv = flags(
        tiny_llama_dir, corpus, tmp_path / "run", "--resume", "auto", "--save_every_steps", 1000
    )
    log, events, codes = tmp_path / "log", str(tmp_path / "run" / "events.jsonl"), []
    instants = [
        {"kill_after_s": random.Random(3).uniform(0, 0.3)},  # while it loads
        {"kill_at_lines": [events, 3]},
        {"kill_at_lines": [events, 7]},
    ]
    while 75 not in codes:  # on a busy machine a run may end before it is told to
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        for instant in instants:
            codes.append(attempts(argv, log, **instant, number=number))
            # -number: before it had a handler
            assert codes[-1] in (0, 75, -number), log.read_text()
    assert "stopped by " + number.name in (tmp_path / "log").read_text()
    assert attempts(argv, tmp_path / "log") == 0
    assert_as_if_uninterrupted(tmp_path / "run", uninterrupted / "fp32")
    assert attempts(argv, tmp_path / "log") == 0
    assert "nothing to do" in (tmp_path / "log").read_text()


DAMAGES = {
    "truncated": lambda p: os.truncate(p / "state.safetensors", 1000),
    "empty": lambda p: os.truncate(p / "state.json", 0),
    "bit flipped": lambda p: flip_a_bit(p / "state.safetensors"),
    "half deleted": lambda p: (p / "state.safetensors").unlink(),
    "without its mark": lambda p: (p / "COMPLETE").unlink(),
    "mark of nothing": lambda p: (p / "COMPLETE").write_text("{}"),
    "mark cut": lambda p: os.truncate(p / "COMPLETE", 20),
    "empty folder": lambda p: [f.unlink() for f in p.iterdir()],
}


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def two_checkpoints(tiny_llama_dir, tmp_path_factory):
    """The folder of a run that was killed after step 11 of 12, with the checkpoints of steps 10 and
    11."""
    folder = tmp_path_factory.mktemp("two")
    write_lines(folder / "train.txt", TEXTS)
    argv = flags(tiny_llama_dir, folder / "train.txt", folder / "run", "--keep_checkpoints", 3)
    assert main(argv) == 0
    checkpoint.discard_after(folder / "run" / "checkpoints", 11)
    write_json(
        folder / "run" / "run.json",
        json.loads((folder / "run" / "run.json").read_text()) | {"status": "running"},
    )
    assert [p.name for p in checkpoint.listed(folder / "run" / "checkpoints")] == [
        "step-00000010",
        "step-00000011",
    ]
    return folder / "run"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    damage, two_checkpoints, uninterrupted, tiny_llama_dir, corpus, tmp_path, capsys
):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    DAMAGES[damage](run / "checkpoints" / "step-00000011")
    assert main(flags(tiny_llama_dir, corpus, run, "--resume", "auto")) == 0
    out = capsys.readouterr()
    assert (
        out.err.count("warning: skipped a damaged checkpoint") == 1 and "step-00000011" in out.err
    )
    assert "step-00000010 (step 10, last loss" in out.out
    assert_as_if_uninterrupted(run, uninterrupted / "fp32")


def test_only_damaged_checkpoints_is_an_error_that_changes_nothing(
    two_checkpoints, tiny_llama_dir, corpus, tmp_path, capsys
):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    for path in checkpoint.listed(run / "checkpoints"):
        flip_a_bit(path / "state.safetensors")
    before = [(run / name).read_bytes() for name in ("events.jsonl", "run.json")]
    assert main(flags(tiny_llama_dir, corpus, run, "--resume", "auto")) == 65
    assert "none of 2 checkpoints is usable; restart with --overwrite" in capsys.readouterr().err
    assert [(run / name).read_bytes() for name in ("events.jsonl", "run.json")] == before
    assert (
        main(flags(tiny_llama_dir, corpus, run, "--resume", run / "checkpoints" / "step-00000011"))
        == 65
    )
    assert "does not have the SHA-256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--lr", "0.5"], "lr 0.01 -> 0.5"),
        (["--batch_size", "2", "--seed", "7"], "batch_size 3 -> 2; seed 42 -> 7"),
        (["--max_train_documents", "11"], "training data "),
        (["--dtype", "bf16"], "dtype fp32 -> bf16"),
        (["--backend", "hf"], "backend native -> hf"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_another_run_is_refused_in_one_line(
    more, named, two_checkpoints, tiny_llama_dir, corpus, tmp_path, capsys
):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    assert main(flags(tiny_llama_dir, corpus, run, "--resume", "auto", *more)) == 64
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert named in line and "--resume_anyway" in line
    for name in ("run.json", "events.jsonl", "adapter_model.safetensors"):
        assert (run / name).read_bytes() == (two_checkpoints / name).read_bytes(), (
            "a refusal changes nothing"
        )


def test_another_base_is_refused(two_checkpoints, tiny_gpt2_dir, corpus, tmp_path, capsys):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    assert main(flags(tiny_gpt2_dir, corpus, run, "--resume", "auto")) == 64
    assert "base " in capsys.readouterr().err


def test_resume_anyway_says_what_is_lost_and_goes_on(
    two_checkpoints, tiny_llama_dir, corpus, tmp_path, capsys
):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    assert (
        main(
            flags(tiny_llama_dir, corpus, run, "--resume", "auto", "--resume_anyway", "--epochs", 4)
        )
        == 0
    )
    assert (
        "resuming anyway: epochs 3 -> 4: the result is not that of one uninterrupted run"
        in capsys.readouterr().err
    )
    assert [e["step"] for e in history(run) if e["event"] == "step"] == list(range(1, 17))
    assert (
        main(
            flags(tiny_llama_dir, corpus, run, "--resume", "auto", "--resume_anyway", "--lora_r", 8)
        )
        == 64
    )
    assert "adapter weights" in capsys.readouterr().err


def test_an_older_checkpoint_by_its_path_rewinds_the_run(
    two_checkpoints, uninterrupted, tiny_llama_dir, corpus, tmp_path
):
    run = shutil.copytree(two_checkpoints, tmp_path / "run")
    assert (
        main(flags(tiny_llama_dir, corpus, run, "--resume", run / "checkpoints" / "step-00000010"))
        == 0
    )
    assert_as_if_uninterrupted(run, uninterrupted / "fp32")
    other = tmp_path / "other"
    # nothing left to do, into another folder
    assert main(flags(tiny_llama_dir, corpus, other, "--resume", run)) == 0
    assert adapter_bytes(other)[0] == adapter_bytes(run)[0]


def test_the_hf_backend_goes_on_with_the_same_bits(tiny_neox_dir, corpus, tmp_path):
    argv = flags(tiny_neox_dir, corpus, tmp_path / "run", "--keep_checkpoints", 20)
    assert main(argv) == 0
    before = adapter_bytes(tmp_path / "run"), history(tmp_path / "run")
    assert main([*argv, "--resume", str(tmp_path / "run" / "checkpoints" / "step-00000004")]) == 0
    assert (adapter_bytes(tmp_path / "run"), history(tmp_path / "run")) == before
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["resumed_step"] == 4


def test_only_the_newest_checkpoints_are_kept(uninterrupted):
    found = checkpoint.listed(uninterrupted / "fp32" / "checkpoints")
    assert [p.name for p in found] == ["step-00000011", "step-00000012"]
    metrics = json.loads((uninterrupted / "fp32" / "metrics.json").read_text())
    assert (
        metrics["checkpoints"] == STEPS + 1
        and metrics["checkpoint_bytes"] > 1000
        and metrics["median_checkpoint_s"] > 0
    )


def test_the_time_limit_stops_before_the_wall(attempts, tiny_llama_dir, corpus, tmp_path):
    argv = flags(
        tiny_llama_dir,
        corpus,
        tmp_path / "run",
        "--epochs",
        100000,
        "--save_every_steps",
        100000,
        "--eval_every_steps",
        100000,
    )
    # a machine that is frozen for those seconds does not get to its first step: code 70
    for _ in range(5):
        code = attempts([*argv, "--overwrite", "--time_limit", "0:00:06"], tmp_path / "log")
        if code == 75:
            break
    assert code == 75, (tmp_path / "log").read_text()
    assert "stopped by --time_limit 0:00:06 with everything saved" in (tmp_path / "log").read_text()
    assert attempts([*argv, "--resume", "auto", "--time_limit", "0:00:01"], tmp_path / "log") == 70
    assert (
        "not enough time left for a single step; request a longer time limit"
        in (tmp_path / "log").read_text()
    )


@pytest.fixture
def small_disk(tmp_path):
    """A file system with room for two checkpoints of the tiny run, but not for a third."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_spoils_nothing(
    small_disk, uninterrupted, tiny_llama_dir, corpus, tmp_path, capsys
):
    argv = flags(tiny_llama_dir, corpus, small_disk / "run", "--resume", "auto")
    ballast = small_disk / "ballast"
    free = shutil.disk_usage(small_disk).free
    size = sum(
        f.stat().st_size
        for f in (uninterrupted / "fp32" / "checkpoints" / "step-00000012").iterdir()
    )
    ballast.write_bytes(bytes(max(0, free - int(2.5 * size))))
    assert main(argv) == 69
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "No space left on device" in line
    assert checkpoint.newest(small_disk / "run" / "checkpoints") is not None
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    assert main(argv) == 0
    assert_as_if_uninterrupted(small_disk / "run", uninterrupted / "fp32")


@pytest.mark.slow
def test_real_model_killed_and_resumed_ends_with_the_same_bits(tmp_path):
    documents = SAMPLE / "train.txt"
    options = [
        "--max_train_documents",
        12,
        "--val_path",
        "none",
        "--batch_size",
        2,
        "--epochs",
        1,
        "--max_len",
        64,
        "--lora_r",
        8,
    ]
    whole, killed = (
        flags(
            "smollm2-135m",
            documents,
            tmp_path / name,
            *options,
            *ALL_CORES,
            "--dtype",
            NATIVE_TYPES[-1],
        )
        for name in ("whole", "killed")
    )
    assert main(whole) == 0
    process = start(killed, log=tmp_path / "log")
    wait_for_lines(tmp_path / "killed" / "events.jsonl", 6, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert main([*killed, "--resume", "auto"]) == 0
    assert history(tmp_path / "killed") == history(tmp_path / "whole")
    ours, theirs = (
        (tmp_path / n / "adapter_model.safetensors").read_bytes() for n in ("killed", "whole")
    )
    assert ours == theirs
