"""``lorabatch export --to TRACKER``: every number of a run arrives, at its step, once."""

import json
import subprocess
import sys
from datetime import datetime

import pytest
from support.processes import ENVIRONMENT
from support.run_folders import train_run, write_jsonl

from lorabatch.cli import main
from lorabatch.report import trackers
from lorabatch.report.trackers import Point, history

READ = """
import json, sys, warnings
warnings.simplefilter("ignore")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
found = EventAccumulator(sys.argv[1])
found.Reload()
scalars = {tag: found.Scalars(tag) for tag in found.Tags()["scalars"]}
print(json.dumps({tag: [(e.step, e.value) for e in events] for tag, events in scalars.items()}))
"""


@pytest.fixture
def run(tmp_path):
    folder = train_run(tmp_path / "run", torn='{"event": "st')
    samples = [
        {"t_s": 1.04, "cpu_percent": 50.0, "gpu_power_w": None},
        {"t_s": 2.06, "cpu_percent": 75.0, "gpu_power_w": None},
    ]
    write_jsonl(folder / "system.jsonl", samples)
    return folder


def test_history_has_the_numbers_and_times_of_the_records(run):
    found = history(run)
    start_s = datetime.fromisoformat(
        json.loads((run / "run.json").read_text())["started_at"]
    ).timestamp()
    assert found.name == "run" and found.settings["lr"] == 1e-3
    assert [p[:3] for p in found.points if p.name == "train/loss"] == [
        ("train/loss", 1, 3.5),
        ("train/loss", 2, 3.0),
        ("train/loss", 3, 2.5),
    ]
    assert Point("system/cpu_percent", 2, 75.0, start_s + 2.06) in found.points
    assert {p.name for p in found.points if p.name.startswith("system")} == {"system/cpu_percent"}
    times = [p.time_s for p in found.points if not p.name.startswith("system")]
    assert times == sorted(times) and times[0] >= start_s


def test_tensorboard_reads_what_was_written(run, tmp_path, capsys):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed here")
    output = tmp_path / "board"
    words = ["export", str(run), "--to", "tensorboard", "--output", str(output)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "lorabatch", *words],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and f"{output}/run" in done.stdout, done.stderr
    read = subprocess.run(
        [sys.executable, "-c", READ, output / "run"], capture_output=True, text=True, check=True
    )
    found = json.loads(read.stdout.splitlines()[-1])
    assert found["eval/bits_per_byte"] == [[0, pytest.approx(1.2)], [3, pytest.approx(0.9)]]
    assert found["train/loss"] == [[1, 3.5], [2, 3.0], [3, 2.5]]
    assert found["system/cpu_percent"] == [[1, 50.0], [2, 75.0]]


def test_what_is_missing_is_said_before_anything_is_sent(run, tmp_path, monkeypatch, capsys):
    def absent(found, output):
        import a_tracker_that_nobody_has  # noqa: F401

    monkeypatch.setitem(trackers.TRACKERS, "wandb", absent)
    assert main(["export", str(run), "--to", "wandb", "--output", str(tmp_path / "w")]) == 69
    assert "pip install wandb" in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path), "--to", "wandb"]) == 64
    assert "is no run folder" in capsys.readouterr().err
