"""Sharded inference without a cluster: the same completions as in one run, from whoever computes them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorabatch.cli import main
from lorabatch.cluster import child, shards
from lorabatch.cluster.crew import share_cores
from lorabatch.errors import UsageError

slow = pytest.mark.slow


@pytest.fixture
def words(tiny_llama_dir, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": f"p{i}", "prompt": f"The patient in bed {i} has a fever"} for i in range(9)]
    rows[4] = {"id": "bad", "prompt": ""}
    rows[7]["n"] = 2
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--base_model", tiny_llama_dir, "--prompts", prompts, "--dtype", "fp32", "--threads", 1, "--max_new_tokens", 6]
    return ["infer", *map(str, flags), "--temperature", "0.9", "--output_order", "input"]


def completions(folder):
    lines = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    return [(r["id"], r["sample"], r["index"], r["seed"], r["text"], r["error"], r["key"]) for r in lines]


@slow
def test_two_processes_give_what_one_run_gives_and_doing_it_again_changes_nothing(words, tmp_path, capsys):
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
    assert sorted(p for p in shared.rglob("*") if p.is_file()) == before and completions(shared) == completions(whole)
    assert main(["report", str(whole), str(shared), "--output_dir", str(tmp_path / "report")]) == 0

    capsys.readouterr()
    assert main([*sharded, "--max_new_tokens", "7"]) == 64
    assert "max_new_tokens" in capsys.readouterr().err
    assert main([*words, "--output_dir", str(whole), "--shards", "3"]) == 64


@slow
def test_a_mistake_that_every_shard_would_make_ends_the_work_with_its_code(words, tmp_path, capsys):
    flags = [*words, "--output_dir", str(tmp_path / "out"), "--shards", "2", "--base_model", "no/such-model"]
    assert main(flags) == 69
    assert "no/such-model" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("DONE.json"))


@slow
def test_another_adapter_in_the_same_folder_is_other_work(words, tmp_path, capsys):
    weights = tmp_path / "adapter/adapter_model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"one")
    sharded = [*words, f"--adapters=a={weights.parent}", "--output_dir", str(tmp_path / "out"), "--shards", "2"]
    assert main(sharded) == 65, "these weights are none, but the plan stands"
    for changed in (weights, weights.with_name("adapter_config.json")):
        before = changed.read_bytes() if changed.exists() else None
        changed.write_bytes(b"two")
        assert main(sharded) == 64 and "adapters_sha256" in capsys.readouterr().err
        changed.write_bytes(before) if before else changed.unlink()


@slow
def test_when_every_process_dies_nothing_is_blamed_on_the_prompts(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(child.sys, "executable", "/bin/false")
    assert main([*words, "--output_dir", str(tmp_path / "out"), "--shards", "2"]) == 70
    assert "every process dies" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("DONE.json"))


@slow
def test_a_prompt_that_kills_its_process_is_in_quarantine_once_however_many_completions_it_owes(words, tmp_path, monkeypatch):
    def run_child(words, *args, **kwargs):
        first = words[words.index("--rows") + 1].partition(":")[0]
        return child.Ended(-9, "") if first == "0" else child.run_child(words, *args, **kwargs)

    monkeypatch.setattr(shards, "run_child", run_child)
    (tmp_path / "prompts.jsonl").write_text('{"id": "p0", "prompt": "fever"}\n{"id": "p1", "prompt": "cough"}\n')
    assert main([*words, "--n", "2", "--adapter_dir", "none", "--output_dir", str(tmp_path / "out"), "--shards", "1"]) == 0
    assert json.loads((tmp_path / "out/metrics.json").read_text())["quarantined"] == ["p0"]
    assert '"adapter": "none"' not in (tmp_path / "out/completions.jsonl").read_text()
    assert [(r[0], bool(r[5])) for r in completions(tmp_path / "out")] == [("p0", True), ("p0", True), ("p1", False), ("p1", False)]


@pytest.mark.parametrize("rows", ["3", "5:2", "a:b", "-1:4", "4:4"])
def test_ranges_that_are_none(words, tmp_path, rows):
    assert main([*words, "--output_dir", str(tmp_path / "out"), f"--rows={rows}"]) == 64


def machine(folder, nodes, siblings):
    """Linux's description of a machine: cores of each NUMA node, and of each physical core."""
    for i, cores in enumerate(nodes):
        (folder / f"node/node{i}").mkdir(parents=True)
        (folder / f"node/node{i}/cpulist").write_text(cores + "\n")
    for cores in siblings:
        for core in cores:
            (folder / f"cpu/cpu{core}/topology").mkdir(parents=True)
            (folder / f"cpu/cpu{core}/topology/thread_siblings_list").write_text(",".join(map(str, cores)) + "\n")
    return folder


def test_parts_follow_sockets_and_keep_both_threads_of_a_core_together(tmp_path):
    folder = machine(tmp_path, ["0-3,8-11", "4-7,12-15"], [(i, i + 8) for i in range(8)])
    every = set(range(16))
    assert share_cores(every, 0, folder) == [[0, 8, 1, 9, 2, 10, 3, 11], [4, 12, 5, 13, 6, 14, 7, 15]]
    assert share_cores(every, 4, folder)[:2] == [[0, 8, 1, 9], [2, 10, 3, 11]]
    assert share_cores({5, 12, 13}, 0, folder) == [[12, 5, 13]], "a node without a usable core gets no process"
    assert share_cores({1, 2}, 2, tmp_path / "unknown") == [[1], [2]]
    with pytest.raises(UsageError, match="only 2 cores"):
        share_cores({1, 2}, 3, folder)


@given(st.sets(st.integers(0, 200), min_size=1), st.data())
def test_every_core_is_in_one_part_and_parts_differ_by_one_core_at_most(cores, data):
    parts = share_cores(cores, data.draw(st.integers(1, len(cores))), system=child.Path("/nowhere"))
    assert sorted(core for part in parts for core in part) == sorted(cores)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two processes need two cores")
def test_one_command_with_two_processes_is_killed_and_gives_what_one_run_gives(words, tmp_path):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    words = words[: words.index("--threads")] + words[words.index("--threads") + 2 :]  # how many is what --processes decides
    assert main([*words, "--output_dir", str(whole)]) == 0
    command = [sys.executable, "-m", "lorabatch", *words, "--output_dir", str(shared), "--processes", "2"]

    def children():
        return set(shared.glob("shards/*/output-*/*/run.json"))

    for number, code in ((signal.SIGKILL, -9), (signal.SIGTERM, 75)):
        before = children()
        started = subprocess.Popen(command, start_new_session=True)
        while children() == before:
            assert started.poll() is None
            time.sleep(0.01)
        if number == signal.SIGKILL:
            os.killpg(started.pid, number)  # the children too
        else:
            started.send_signal(number)
        assert started.wait(timeout=300) in (code, 0)
    assert subprocess.run(command, timeout=300).returncode == 0
    assert completions(shared) == completions(whole)
    runs = [json.loads(path.read_text()) for path in shared.glob("shards/*/output-*/*/run.json")]
    finished = [run for run in runs if run["status"] == "completed"]
    assert {run["environment"]["usable_cores"] for run in finished} == {1} and {run["threads"] for run in finished} == {1}
