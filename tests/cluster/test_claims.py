"""Claims without locks: exactly one owner, takeover from the dead and the silent, nothing taken
from the living."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lorabatch.cluster.claims import abandoned_earlier, is_done, owners, try_claim, work_through
from lorabatch.schema import sealed

WORKER = """
import sys, time
from pathlib import Path
from lorabatch.cluster.claims import work_through
root, items, log, pause = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])
def work(index, claim):
    with log.open("a") as file:
        file.write(f"{index}\\n")
    time.sleep(pause)
    while log.with_name("hold").exists():
        time.sleep(0.01)
    claim.finish({"index": index})
work_through([root / str(i) for i in range(items)], work, timeout_s=2, wait=True, stop_requested=lambda: False, poll_s=0.05)
"""


def start_worker(root, items, log, pause=0.0):
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(root), str(items), str(log), str(pause)]
    )


def test_processes_that_race_do_every_item_exactly_once(tmp_path):
    items = 60
    logs = [tmp_path / f"log{i}" for i in range(4)]
    workers = [start_worker(tmp_path / "items", items, log, 0.002) for log in logs]
    assert [w.wait(timeout=300) for w in workers] == [0] * 4
    done = [int(line) for log in logs if log.exists() for line in log.read_text().split()]
    assert sorted(done) == list(range(items))


def test_a_living_claim_is_left_alone_and_a_dead_process_s_is_taken_at_once(tmp_path):
    worker = start_worker(tmp_path, 1, tmp_path / "log", pause=600)
    while not (tmp_path / "log").exists():
        assert worker.poll() is None
        time.sleep(0.05)
    assert try_claim(tmp_path / "0", timeout_s=60) is None
    assert str(worker.pid) in owners([tmp_path / "0"])[0]
    worker.kill()
    worker.wait()
    claim = try_claim(tmp_path / "0", timeout_s=3600)
    assert claim is not None and claim.generation == 1 and abandoned_earlier(tmp_path / "0", 0)


def test_a_silent_process_is_taken_over_and_when_it_wakes_nothing_breaks(tmp_path):
    (tmp_path / "hold").touch()  # its work lasts as long as this file
    worker = start_worker(tmp_path, 1, tmp_path / "log")
    try:
        while not (tmp_path / "log").exists():
            time.sleep(0.02)
        os.kill(worker.pid, signal.SIGSTOP)
        begin, claim = time.monotonic(), None
        while claim is None and time.monotonic() < begin + 60:
            claim = try_claim(tmp_path / "0", timeout_s=2)
            time.sleep(0.1)
        assert claim is not None and claim.generation == 1 and time.monotonic() - begin > 1
        with claim:
            claim.outputs.mkdir()
            (tmp_path / "hold").unlink()
            os.kill(worker.pid, signal.SIGCONT)
            assert worker.wait(timeout=120) == 0
            claim.finish({"index": 0})
        assert is_done(tmp_path / "0")
    finally:
        worker.kill()
        worker.wait()


def test_who_looked_before_the_claim_was_made_does_not_get_it_too(tmp_path, monkeypatch):
    claim = try_claim(tmp_path / "0", timeout_s=60)
    written = claim.path.read_text()
    # as the slower of two saw it
    monkeypatch.setattr("lorabatch.cluster.claims._latest", lambda folder: -1)
    assert try_claim(tmp_path / "0", timeout_s=60) is None
    assert claim.path.read_text() == written


OTHERS = {
    "on another host": {"host": "elsewhere"},
    "of another boot, or of another namespace on this host": {"where": "another"},
    "of a process that cannot say where it is": {"where": None},
    "of an earlier version": {"where": None, "started": None},
    "damaged": {"host": 3, "pid": "x" * 9},
}


@pytest.mark.parametrize("owner", OTHERS)
@pytest.mark.parametrize(("age_s", "free"), [(50, False), (70, True)])
def test_where_nothing_proves_a_death_the_age_of_the_heartbeat_alone_decides(
    owner, age_s, free, tmp_path
):
    path = try_claim(tmp_path / "0", timeout_s=60).path
    gone = {"pid": 2**22 - 1, "started": 1}  # no such process
    path.write_bytes(sealed(json.loads(path.read_text()) | gone | OTHERS[owner]))
    os.utime(path, (time.time() - age_s,) * 2)
    claim = try_claim(tmp_path / "0", timeout_s=60)
    assert (claim is not None) == free
    assert claim is None or claim.generation == 1


@pytest.mark.parametrize(
    "change",
    [{"pid": 2**22 - 1}, {"started": 1}],
    ids=["no such process", "a later process has its number"],
)
def test_a_death_that_is_proven_is_not_waited_for(change, tmp_path):
    path = try_claim(tmp_path / "0", timeout_s=60).path
    assert try_claim(tmp_path / "0", timeout_s=60) is None, "we live"
    path.write_bytes(sealed(json.loads(path.read_text()) | change))
    assert try_claim(tmp_path / "0", timeout_s=3600).generation == 1


def test_a_killed_process_that_nobody_has_waited_for_is_dead(tmp_path):
    worker = start_worker(tmp_path, 1, tmp_path / "log", pause=600)
    while not (tmp_path / "log").exists():
        time.sleep(0.05)
    worker.kill()
    end = time.monotonic() + 60
    while (claim := try_claim(tmp_path / "0", timeout_s=3600)) is None:  # until it is a zombie
        assert time.monotonic() < end
        time.sleep(0.05)
    assert claim.generation == 1
    worker.wait()


def test_a_living_process_of_another_namespace_is_not_taken_for_dead(tmp_path):
    """As containers on one host: its number there means nothing here, nor ours there."""
    inside = [sys.executable, "-c", WORKER, str(tmp_path), "1", str(tmp_path / "log"), "600"]
    alone = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to make a namespace")
    worker = subprocess.Popen([*alone, *inside])
    try:
        while not (tmp_path / "log").exists():
            assert worker.poll() is None
            time.sleep(0.05)
        assert json.loads((tmp_path / "0/claim-000").read_text())["pid"] != worker.pid
        assert try_claim(tmp_path / "0", timeout_s=60) is None
        assert try_claim(tmp_path / "1", timeout_s=60) is not None
        ask = (
            "import sys; from pathlib import Path; from lorabatch.cluster.claims import try_claim; "
        )
        ask += f"sys.exit(try_claim(Path({str(tmp_path / '1')!r}), timeout_s=60) is not None)"
        assert subprocess.run([*alone, sys.executable, "-c", ask], check=False).returncode == 0, (
            "our number is unknown there"
        )
    finally:
        worker.kill()
        worker.wait()


def test_the_thousandth_claim_is_not_the_last(tmp_path):
    for number in range(1002):
        (tmp_path / f"claim-{number:03d}").touch()
        (tmp_path / f"claim-{number:03d}.released").touch()
    assert try_claim(tmp_path, timeout_s=60).generation == 1002


def test_the_heartbeat_keeps_a_long_claim_and_outlives_a_failing_file_system(tmp_path, monkeypatch):
    failures, real = iter([OSError(5, "Input/output error")]), os.utime

    def utime(*args):
        for failure in failures:
            raise failure
        real(*args)

    monkeypatch.setattr(os, "utime", utime)
    claim = try_claim(tmp_path / "0", timeout_s=1)
    with claim:
        before = claim.path.stat().st_mtime
        time.sleep(1.5)
        assert claim.path.stat().st_mtime > before + 0.5
        assert try_claim(tmp_path / "0", timeout_s=60) is None


def test_released_work_is_free_at_once_and_finished_work_never(tmp_path):
    first = try_claim(tmp_path / "0", timeout_s=60)
    first.release()
    second = try_claim(tmp_path / "0", timeout_s=60)
    assert second.generation == 1 and not abandoned_earlier(tmp_path / "0", 0)
    second.finish({})
    assert try_claim(tmp_path / "0", timeout_s=0) is None


def test_work_that_fails_is_free_again_at_once(tmp_path):
    def work(index, claim):
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        work_through([tmp_path / "0"], work, timeout_s=60, wait=False, stop_requested=lambda: False)
    assert try_claim(tmp_path / "0", timeout_s=60).generation == 1


def test_leaving_early_or_staying(tmp_path):
    held = try_claim(tmp_path / "0", timeout_s=60)
    folders, seen = [tmp_path / "0", tmp_path / "1"], []

    def work(index, claim):
        seen.append(index)
        claim.finish({})
        if index == 1:
            held.release()

    assert (
        work_through(folders[:1], work, timeout_s=60, wait=False, stop_requested=lambda: False) == 1
    )
    assert (
        work_through(
            folders, work, timeout_s=60, wait=True, stop_requested=lambda: False, poll_s=0.01
        )
        == 0
    )
    assert seen == [1, 0]
