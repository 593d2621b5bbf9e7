"""Sharded inference without a cluster: the same completions as in one run, from whoever computes
them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from support import commands
from support.commands import infer_flags, write_lines, write_rows
from support.paths import SRC
from support.processes import ENVIRONMENT

from lorabatch.cli import main
from lorabatch.cluster import child

slow = pytest.mark.slow


@pytest.fixture
def words(tiny_llama_dir, tmp_path):
    rows = [{"id": f"p{i}", "prompt": f"The patient in bed {i} has a fever"} for i in range(9)]
    rows[4] = {"id": "bad", "prompt": ""}
    rows[7]["n"] = 2
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)
    fixed = ["--max_new_tokens", 6, "--temperature", 0.9, "--output_order", "input"]
    return infer_flags(tiny_llama_dir, prompts, tmp_path / "out", *fixed)


def completions(folder):
    names = ("id", "sample", "index", "seed", "text", "error", "key")
    return [tuple(record[name] for name in names) for record in commands.completions(folder)]


@slow
def test_two_processes_give_what_one_run_gives_and_doing_it_again_changes_nothing(
    words, tmp_path, capsys
):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    assert main([*words, "--output_dir", str(whole)]) == 0
    sharded = [*words, "--output_dir", str(shared), "--shards", "3"]
    other = subprocess.Popen([sys.executable, "-m", "lorabatch", *sharded, "--leave_early"])
    assert main(sharded) == 0
    assert other.wait(timeout=300) == 0
    assert completions(shared) == completions(whole) and len(completions(whole)) == 10
    metrics, reference = (json.loads((f / "metrics.json").read_text()) for f in (shared, whole))
    for name in ("completed", "failed", "total_input_tokens", "total_output_tokens"):
        assert metrics[name] == reference[name], name
    before = sorted(p for p in shared.rglob("*") if p.is_file())
    assert main(sharded) == 0
    assert sorted(p for p in shared.rglob("*") if p.is_file()) == before and completions(
        shared
    ) == completions(whole)
    assert main(["report", str(whole), str(shared), "--output_dir", str(tmp_path / "report")]) == 0

    capsys.readouterr()
    assert main([*sharded, "--max_new_tokens", "7"]) == 64
    assert "max_new_tokens" in capsys.readouterr().err
    assert main([*words, "--output_dir", str(whole), "--shards", "3"]) == 64


@slow
def test_a_mistake_that_every_shard_would_make_ends_the_work_with_its_code(words, tmp_path, capsys):
    flags = [
        *words,
        "--output_dir",
        str(tmp_path / "out"),
        "--shards",
        "2",
        "--base_model",
        "no/such-model",
    ]
    assert main(flags) == 69
    assert "no/such-model" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("DONE.json"))


@slow
def test_another_adapter_in_the_same_folder_is_other_work(words, tmp_path, capsys):
    weights = tmp_path / "adapter/adapter_model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"one")
    sharded = [
        *words,
        f"--adapters=a={weights.parent}",
        "--output_dir",
        str(tmp_path / "out"),
        "--shards",
        "2",
    ]
    assert main(sharded) == 65, "these weights are none, but the plan stands"
    for changed in (weights, weights.with_name("adapter_config.json")):
        before = changed.read_bytes() if changed.exists() else None
        changed.write_bytes(b"two")
        assert main(sharded) == 64 and "adapters_sha256" in capsys.readouterr().err
        changed.write_bytes(before) if before else changed.unlink()


@slow
def test_when_every_process_dies_nothing_is_blamed_on_the_prompts(
    words, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(child.sys, "executable", "/bin/false")
    assert main([*words, "--output_dir", str(tmp_path / "out"), "--shards", "2"]) == 70
    assert "every process dies" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("DONE.json"))


def dies_on(prompt, *, tried, times=1000):
    """Options of ``attempts``: what the process that completes ranges dies on."""
    return {"dies_on": {"prompt": prompt, "times": times, "tried": str(tried)}}


@pytest.fixture
def many(words, tmp_path):
    """Two completions of each of two prompts, and where to."""
    (tmp_path / "prompts.jsonl").write_text(
        '{"id": "p0", "prompt": "fever"}\n{"id": "p1", "prompt": "cough"}\n'
    )
    return [
        *words,
        "--n",
        "2",
        "--adapter_dir",
        "none",
        "--output_dir",
        str(tmp_path / "out"),
        "--shards",
        "1",
    ]


@slow
def test_a_prompt_is_in_quarantine_after_two_deaths_alone_and_a_later_run_may_try_it_again(
    many, attempts, tmp_path
):
    log, nothing = tmp_path / "log", dies_on(-1, tried=tmp_path / "all")
    assert attempts(many, log, **dies_on(0, tried=tmp_path / "tried")) == 0, log.read_text()
    assert (tmp_path / "tried").read_text().split() == ["0:2", "0:1", "0:1", "1:2"]
    assert json.loads((tmp_path / "out/metrics.json").read_text())["quarantined"] == ["p0"]
    assert '"adapter": "none"' not in (tmp_path / "out/completions.jsonl").read_text()
    assert [(r[0], bool(r[5])) for r in completions(tmp_path / "out")] == [
        ("p0", True),
        ("p0", True),
        ("p1", False),
        ("p1", False),
    ]
    assert attempts(many, log, **nothing) == 0
    assert json.loads((tmp_path / "out/metrics.json").read_text())["quarantined"] == ["p0"], (
        "only asked for is it tried again"
    )
    again = [*many, "--retry_failed"]
    assert attempts(again, log, **dies_on(0, tried=tmp_path / "tried again")) == 0
    assert (tmp_path / "tried again").read_text().split() == ["0:1", "0:1"]
    assert json.loads((tmp_path / "out/metrics.json").read_text())["quarantined"] == ["p0"]
    assert attempts(again, log, **nothing) == 0
    assert json.loads((tmp_path / "out/metrics.json").read_text())["quarantined"] == []
    assert [(r[0], bool(r[5])) for r in completions(tmp_path / "out")] == [
        ("p0", False),
        ("p0", False),
        ("p1", False),
        ("p1", False),
    ]


@slow
def test_one_death_alone_is_held_against_no_prompt(many, attempts, tmp_path):
    twice = dies_on(0, times=2, tried=tmp_path / "tried")
    assert attempts(many, tmp_path / "log", **twice) == 0
    assert (tmp_path / "tried").read_text().split() == ["0:2", "0:1", "0:1", "1:2"]
    assert json.loads((tmp_path / "out/metrics.json").read_text())["completed"] == 4


@slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_owners_that_are_killed_or_stopped_are_held_against_no_prompt(
    how, tiny_llama_dir, tmp_path
):
    """One prompt in one range, which was the whole shard: three owners in a row are lost over
    it."""
    prompts = write_lines(tmp_path / "prompts.txt", ["The patient has a fever"])
    fixed = ["--shards", 1, "--max_new_tokens", 4, "--claim_timeout_s", 2]
    words = infer_flags(tiny_llama_dir, prompts, tmp_path / "out", *fixed)
    command, owners_lost = [sys.executable, "-m", "lorabatch", *words], []
    for number in range(3):
        process = subprocess.Popen(command, start_new_session=True)
        while not (tmp_path / f"out/shards/0000/output-{number:03d}/0-1/log.txt").exists():
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, how)
        owners_lost.append(process)
    try:
        assert subprocess.run(command, timeout=300).returncode == 0
        metrics = json.loads((tmp_path / "out/metrics.json").read_text())
        assert metrics["completed"] == 1 and metrics["quarantined"] == []
    finally:
        for process in owners_lost:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@slow
def test_what_an_orphan_finished_counts_even_for_a_prompt_in_quarantine(many, attempts, tmp_path):
    log, nothing = tmp_path / "log", dies_on(-1, tried=tmp_path / "all")
    assert attempts(many, log, **dies_on(0, tried=tmp_path / "tried")) == 0, log.read_text()
    whole = [*many, "--shards", "none", "--output_dir", str(tmp_path / "whole")]
    assert main(whole) == 0
    orphan = tmp_path / "out/shards/0000/output-007/0-2/completions.jsonl"
    orphan.parent.mkdir(parents=True)
    lines = (tmp_path / "whole/completions.jsonl").read_text().splitlines(keepends=True)
    forged = json.loads(lines[0]) | {"key": "1" * 16, "text": "forged"}
    # sample 1 whole; sample 0 torn, and forged
    orphan.write_text(json.dumps(forged) + "\n" + "{damaged\n" + lines[1] + lines[0][:-5])
    assert attempts(many, log, **nothing) == 0
    texts = [r[4] for r in completions(tmp_path / "whole")]
    assert [(r[4], bool(r[5])) for r in completions(tmp_path / "out")][1:] == [
        (t, False) for t in texts[1:]
    ]
    assert completions(tmp_path / "out")[0][5], (
        "what no process of this work can have written is not believed"
    )


@slow
def test_killed_at_file_operations_every_request_is_there_once_and_completed(
    tiny_llama_dir, tmp_path
):
    script = [sys.executable, "-m", "support.shard_kills", tiny_llama_dir, tmp_path / "kills"]
    done = subprocess.run(
        list(map(str, [*script, "--kills", 20])),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert counts["kills"] >= 20 and counts["owner"] and counts["group"] and counts["at open"], (
        counts
    )


def sharded(words, output_dir, shards):
    """The command, for a process of its own."""
    more = ["--output_dir", str(output_dir), "--shards", str(shards)]
    return [sys.executable, "-m", "lorabatch", *words, *more]


@slow
def test_many_shards_are_one_process_with_one_loaded_model(words, tmp_path):
    log = tmp_path / "started"
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(
        f"import sys\nif 'lorabatch.infer.ranges' in sys.orig_argv:\n    open({str(log)!r}, "
        "'a').write('started\\n')\n"
    )
    command = sharded(words, tmp_path / "out", 9)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(SRC)])}
    assert subprocess.run(command, env=environment, timeout=300).returncode == 0
    assert log.read_text() == "started\n"
    loads = [p.read_text().count("base ") for p in sorted((tmp_path / "out").rglob("log.txt"))]
    assert len(loads) == 9 and sum(loads) == 1


@slow
def test_a_child_dies_with_its_parent(words, tmp_path):
    # work for far longer than we wait
    rows = [{"prompt": f"The patient in bed {i} has a fever"} for i in range(5000)]
    write_rows(tmp_path / "prompts.jsonl", rows)
    command = sharded(words, tmp_path / "out", 1)
    process = subprocess.Popen(command, start_new_session=True)
    while not (found := child_of(process.pid)):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()  # itself alone, not its group
    process.wait()
    end = time.monotonic() + 5
    while any(running(pid) for pid in found):
        assert time.monotonic() < end
        time.sleep(0.05)


def child_of(pid):
    return [
        int(p.parent.name)
        for p in child.Path("/proc").glob("[0-9]*/stat")
        if stat_of(p)[1:2] == [str(pid)]
    ]


def stat_of(path):
    try:
        return path.read_text().rpartition(")")[2].split()
    except OSError:
        return []


def running(pid):
    return stat_of(child.Path(f"/proc/{pid}/stat"))[:1] not in ([], ["Z"])


def test_a_process_whose_parent_has_died_before_it_asked_ends_at_once():
    # process 1 is not its parent
    words = [sys.executable, "-m", "lorabatch.cluster.leash", "1", "platform"]
    assert subprocess.run(words, capture_output=True).returncode == -signal.SIGKILL
    words[3] = str(os.getpid())
    assert subprocess.run(words, capture_output=True).returncode == 0


@slow
def test_a_run_killed_between_plan_and_run_json_goes_on(many, tmp_path):
    assert main(many) == 0
    (tmp_path / "out/run.json").unlink()
    assert main(many) == 0
    assert json.loads((tmp_path / "out/run.json").read_text())["status"] == "completed"


@slow
def test_failed_requests_of_a_plain_run_are_tried_again_too(words, tmp_path, capsys):
    plain = [*words, "--output_dir", str(tmp_path / "out"), "--max_len", "12"]
    assert main([*plain, "--retry_failed"]) == 64 and "--resume" in capsys.readouterr().err
    assert main(plain) in (0, 65)
    before = completions(tmp_path / "out")
    assert main([*plain, "--resume", "--retry_failed"]) in (0, 65)
    assert completions(tmp_path / "out") == before and any(r[5] for r in before)
    log = capsys.readouterr().out
    assert f"{sum(bool(r[5]) for r in before)} requests" in log, "only those, and each once"


@pytest.mark.parametrize("rows", ["3", "5:2", "a:b", "-1:4", "4:4"])
def test_ranges_that_are_none(words, tmp_path, rows):
    assert main([*words, "--output_dir", str(tmp_path / "out"), f"--rows={rows}"]) == 64
