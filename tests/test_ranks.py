"""Several processes, one adapter: who they are, that their number changes nothing, and what happens when one dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from helpers import native, randomise_b, tiny_corpus, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_cli import ROOT, TEXTS, wait_for_lines
from test_resume import adapter_bytes, flags, history
from test_train_loop import LENGTHS, TARGETS

from lorabatch.cli import main
from lorabatch.config import TrainConfig
from lorabatch.corpus.packing import deal
from lorabatch.errors import UnavailableError
from lorabatch.model.lora import LoraSettings
from lorabatch.train import checkpoint, loop
from lorabatch.train.ranks import ALONE, Place, Ranks, find_place, first_host
from lorabatch.train.state import Learner

# Which process this is


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [("node1", "node1"), ("gpu[003-007,012],cpu1", "gpu003"), ("a,b", "a"), ("rack[2,4]n[1-8]", "rack2n1"), ("n-1-[10-11]", "n-1-10")],
)
def test_first_host_of_a_slurm_list(nodelist, host):
    assert first_host(nodelist) == host


SLURM = {
    "SLURM_JOB_ID": "812345",
    "SLURM_JOB_NODELIST": "gpu[11-12]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_ID": "0",
}


def test_place_from_the_launcher():
    torchrun = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1234"}
    assert find_place({}) is None
    assert find_place(torchrun) == Place(1, 2, 1, "localhost", 1234)
    assert find_place(SLURM | torchrun).host == "localhost", "torchrun inside a Slurm step"
    place = find_place(SLURM)
    assert (place.rank, place.count, place.local_rank, place.host) == (3, 4, 1, "gpu11")
    assert 10000 <= place.port < 30000
    assert place.port != find_place(SLURM | {"SLURM_STEP_ID": "1"}).port != find_place(SLURM | {"SLURM_JOB_ID": "812346"}).port
    assert find_place(SLURM | {"SLURM_STEP_NUM_NODES": "1"}).host == "127.0.0.1"
    batch_script = {k: v for k, v in SLURM.items() if "STEP" not in k} | {"SLURM_PROCID": "0"}
    assert find_place(batch_script) is None, "one process started without srun must not wait for others"
    with pytest.raises(UnavailableError, match="MASTER_ADDR is not"):
        find_place({k: v for k, v in torchrun.items() if k != "MASTER_ADDR"})


@given(st.lists(st.integers(1, 500), max_size=40), st.integers(1, 6))
def test_every_document_is_dealt_once_and_evenly(lengths, count):
    shares = deal(lengths, count)
    assert len(shares) == count
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in share) for share in shares]
    assert max(sums) - min(sums) <= max(lengths, default=0)


# Real processes


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


class Group:
    """``count`` processes of one run, started as torchrun would start them."""

    def __init__(self, count, argv, folder, *, slurm=False, timeout_s=600):
        base = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        base |= {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        port, job = free_port(), str(os.getpid())
        self.logs = [folder / f"log{rank}" for rank in range(count)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            place = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
            if slurm:
                place = SLURM | {"SLURM_JOB_ID": job, "SLURM_JOB_NODELIST": "localhost", "SLURM_PROCID": rank, "SLURM_LOCALID": rank}
                place |= {"SLURM_NTASKS": count, "SLURM_STEP_NUM_TASKS": count}
            with log.open("a") as output:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "lorabatch", *argv, "--rank_timeout", str(timeout_s)],
                        env=base | {k: str(v) for k, v in place.items()},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

    def wait(self):
        return [p.wait(timeout=600) for p in self.processes]

    def text(self):
        return "\n".join(f"== rank {i}\n{log.read_text()}" for i, log in enumerate(self.logs))


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


@pytest.mark.slow
def test_two_ranks_equal_one(tiny_llama_dir, corpus, tmp_path):
    """12 documents in steps of 5: the last step of each epoch is smaller, and one with a single document leaves a rank idle."""
    more = ["--lora_dropout", 0, "--batch_size", 11, "--max_grad_norm", 0]
    assert main(flags(tiny_llama_dir, corpus, tmp_path / "one", *more)) == 0
    group = Group(2, flags(tiny_llama_dir, corpus, tmp_path / "two", *more), tmp_path, slurm=True)
    assert group.wait() == [0, 0], group.text()
    one, two = history(tmp_path / "one"), history(tmp_path / "two")
    assert [e["step"] for e in two] == [e["step"] for e in one] and len(one) > 6
    assert min(e["documents"] for e in two if e["event"] == "step") == 1
    for a, b in zip(one, two, strict=True):
        for name in ("loss", "eval_loss", "grad_norm"):
            if name in a:
                assert b[name] == pytest.approx(a[name], rel=2e-5), (name, a, b)
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert all(torch.allclose(a[k], b[k], rtol=1e-3, atol=1e-5) for k in a)
    assert not (tmp_path / "log1").read_text().strip(), "only the first rank speaks"


@pytest.mark.slow
def test_two_ranks_stopped_and_killed_end_with_the_same_bits(tiny_llama_dir, corpus, tmp_path):
    whole = Group(2, flags(tiny_llama_dir, corpus, tmp_path / "whole"), tmp_path)
    assert whole.wait() == [0, 0], whole.text()
    argv = flags(tiny_llama_dir, corpus, tmp_path / "run", "--resume", "auto", "--save_every_steps", 1000)
    events = tmp_path / "run" / "events.jsonl"

    group = Group(2, argv, tmp_path)
    wait_for_lines(events, 3, group.processes[0])
    group.processes[1].send_signal(signal.SIGUSR1)  # one rank is told, both stop after the same step
    assert group.wait() == [75, 75], group.text()

    group = Group(2, argv, tmp_path)
    wait_for_lines(events, events.read_bytes().count(b"\n") + 2, group.processes[0])
    group.processes[1].kill()
    start_s = time.monotonic()
    assert group.wait() == [70, -signal.SIGKILL], group.text()
    assert time.monotonic() - start_s < 60
    assert "rank 0 of 2: another rank is gone" in group.logs[0].read_text()
    steps = [e["step"] for e in history(tmp_path / "run") if e["event"] == "step"]
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").step == steps[-1], "and nothing is lost"

    group = Group(2, argv, tmp_path)
    assert group.wait() == [0, 0], group.text()
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    assert history(tmp_path / "run") == history(tmp_path / "whole")


@pytest.mark.slow
def test_a_rank_that_falls_silent_ends_the_job_in_time(tiny_llama_dir, corpus, tmp_path):
    """Its connection stays open: only the time limit tells."""
    argv = flags(tiny_llama_dir, corpus, tmp_path / "run", "--resume", "auto", "--epochs", 1000, "--eval_every_steps", 10000)
    group = Group(2, argv, tmp_path, timeout_s=15)
    try:
        wait_for_lines(tmp_path / "run" / "events.jsonl", 3, group.processes[0])
        group.processes[1].send_signal(signal.SIGSTOP)
        start_s = time.monotonic()
        assert group.processes[0].wait(timeout=300) == 70, group.text()
        assert time.monotonic() - start_s < 15 + 45
    finally:
        group.processes[1].kill()  # a stopped process dies of it too
        group.processes[1].wait()
    line = group.logs[0].read_text().strip().splitlines()[-1]
    assert "rank 0 of 2: another rank is gone" in line and "ranks wait 15 s: --rank_timeout" in line
    steps = [e["step"] for e in history(tmp_path / "run") if e["event"] == "step"]
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").step == steps[-1], "and nothing is lost"


@pytest.mark.slow
def test_a_sharded_base_equals_a_whole_one(tiny_llama_dir, corpus, tmp_path):
    """Ranks with unequal numbers of blocks, and a step that leaves one without documents: nobody waits for a gather that never comes."""
    more = ["--lora_dropout", 0, "--batch_size", 11, "--block_tokens", 80, "--epochs", 1]
    assert main(flags(tiny_llama_dir, corpus, tmp_path / "whole", *more)) == 0
    group = Group(2, flags(tiny_llama_dir, corpus, tmp_path / "shared", *more, "--shard_base"), tmp_path)
    assert group.wait() == [0, 0], group.text()
    for a, b in zip(history(tmp_path / "whole"), history(tmp_path / "shared"), strict=True):
        assert (b.pop("event"), b) == (a.pop("event"), pytest.approx(a, rel=2e-5))
    sizes = [json.loads((tmp_path / n / "run.json").read_text())["model"]["base_bytes"] for n in ("whole", "shared")]
    embedding = 300 * 64 * 4 * 2
    assert (sizes[1] - embedding) * 2 == sizes[0] - embedding, "half of the layers on each rank"


# The gradient, exactly


class Threads(Ranks):
    """Ranks that are threads of this process: the sum is a list and a barrier."""

    def __init__(self, rank, count, shared):
        self.rank, self.count, (self._box, self._barrier) = rank, count, shared

    def sum_(self, tensor):
        self._box[self.rank] = tensor.clone()
        self._barrier.wait()
        tensor.copy_(sum(self._box.values()))
        self._barrier.wait()
        return tensor


def fresh_learner():
    model = native(tiny_model("llama"))
    learner = Learner(model.attach(LoraSettings(r=4, alpha=8.0), seed=0), TrainConfig())
    randomise_b(learner.adapters)
    return model, learner


def gradient_of_a_step(model, learner, ranks, batch_size, accumulation):
    config = TrainConfig(batch_size=batch_size, grad_accum_steps=accumulation, max_steps=1, max_grad_norm=0, block_tokens=40)
    nothing = dict.fromkeys(("sink", "on_step", "on_eval"), lambda *_: None)
    loop.train(model, learner, tiny_corpus(LENGTHS, first_targets=TARGETS), None, config, **nothing, stop_requested=bool, ranks=ranks)
    return learner.adapters.grad


@pytest.mark.parametrize(("count", "batch_size", "accumulation"), [(1, 2, 4), (1, 8, 1), (2, 4, 2), (3, 8, 1), (9, 8, 1)])
def test_the_number_of_ranks_does_not_change_the_gradient(count, batch_size, accumulation):
    """8 documents a step, cut in every way; with 9 ranks one has nothing to do."""
    expected = gradient_of_a_step(*fresh_learner(), ALONE, 1, 8)
    shared, found = ({}, threading.Barrier(count)), {}
    learners = [fresh_learner() for _ in range(count)]

    def work(rank):
        found[rank] = gradient_of_a_step(*learners[rank], Threads(rank, count, shared), batch_size, accumulation)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == count and float(expected.norm()) > 0.1
    for gradient in found.values():
        assert float((gradient - expected).norm() / expected.norm()) <= 1e-6
        assert torch.equal(gradient, found[0])
