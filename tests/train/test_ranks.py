"""Several processes, one adapter: who they are, that their number changes nothing, and what happens
when one dies."""

import json
import os
import signal
import socket
import threading
import time

import pytest
import torch
from safetensors.torch import load_file
from support.commands import adapter_bytes, history
from support.models import LENGTHS, TARGETS, native, randomise_b, tiny_corpus, tiny_model
from support.processes import SLURM, Group, wait_for_lines
from support.training import flags
from torch.distributed import TCPStore

from lorabatch.cli import main
from lorabatch.config import TrainConfig
from lorabatch.errors import UnavailableError
from lorabatch.model.lora import LoraSettings
from lorabatch.train import checkpoint, loop
from lorabatch.train.ranks import (
    ALONE,
    Ranks,
    Rendezvous,
    find_rendezvous,
    first_host,
    joined,
    refuse_shared,
)
from lorabatch.train.state import Trainable

# Which process this is


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("gpu[003-007,012],cpu1", "gpu003"),
        ("a,b", "a"),
        ("rack[2,4]n[1-8]", "rack2n1"),
        ("n-1-[10-11]", "n-1-10"),
    ],
)
def test_first_host_of_a_slurm_list(nodelist, host):
    assert first_host(nodelist) == host


def test_place_from_the_launcher():
    torchrun = {
        "WORLD_SIZE": "2",
        "RANK": "1",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1234",
    }
    assert find_rendezvous({}) is None
    assert find_rendezvous(torchrun) == Rendezvous(1, 2, 1, "localhost", (1234,))
    assert find_rendezvous(SLURM | torchrun).host == "localhost", "torchrun inside a Slurm step"
    rendezvous = find_rendezvous(SLURM)
    assert (rendezvous.rank, rendezvous.count, rendezvous.local_rank, rendezvous.host) == (
        3,
        4,
        1,
        "gpu11",
    )
    # none that the system gives to whoever asks for any port
    assert all(1024 <= port < 32768 for port in rendezvous.ports)
    assert len(set(rendezvous.ports)) == 4
    runs = [
        find_rendezvous(SLURM | other)
        for other in ({}, {"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "812346"})
    ]
    assert len({run.ports[0] for run in runs}) == len({run.run for run in runs}) == 3
    assert find_rendezvous(SLURM | {"SLURM_STEP_NUM_NODES": "1"}).host == "127.0.0.1"
    batch_script = {k: v for k, v in SLURM.items() if "STEP" not in k} | {"SLURM_PROCID": "0"}
    assert find_rendezvous(batch_script) is None, (
        "one process started without srun must not wait for others"
    )
    with pytest.raises(UnavailableError, match="MASTER_ADDR is not"):
        find_rendezvous({k: v for k, v in torchrun.items() if k != "MASTER_ADDR"})


# Real processes


@pytest.mark.slow
@pytest.mark.parametrize("listener", ["silent", "another run"])
def test_ranks_meet_although_somebody_listens_at_their_port(
    tiny_llama_dir, corpus, tmp_path, listener
):
    place = SLURM | {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NUM_NODES": "1"}
    port = find_rendezvous(place).ports[0]
    if listener == "silent":
        other = socket.create_server(("", port))
    else:
        other = TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False)
    group = Group(2, flags(tiny_llama_dir, corpus, tmp_path / "out"), tmp_path, slurm=True)
    assert group.wait() == [0, 0], group.text()
    if listener == "silent":
        other.close()


@pytest.mark.slow
def test_a_leak_ends_every_rank(tiny_llama_dir, corpus, tmp_path):
    argv = flags(tiny_llama_dir, corpus, tmp_path / "out", "--data_checks", "warn")
    group = Group(2, argv, tmp_path, slurm=True)
    assert group.wait() == [65, 65], group.text()
    assert "leak.exact: 12 of 12" in group.text() and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_ranks_equal_one(tiny_llama_dir, corpus, tmp_path):
    """12 documents in steps of 5: the last step of each epoch is smaller, and one with a single
    document leaves a rank idle."""
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
    argv = flags(
        tiny_llama_dir, corpus, tmp_path / "run", "--resume", "auto", "--save_every_steps", 1000
    )
    events = tmp_path / "run" / "events.jsonl"

    group = Group(2, argv, tmp_path)
    wait_for_lines(events, 3, group.processes[0])
    # one rank is told, both stop after the same step
    group.processes[1].send_signal(signal.SIGUSR1)
    assert group.wait() == [75, 75], group.text()

    group = Group(2, argv, tmp_path)
    wait_for_lines(events, events.read_bytes().count(b"\n") + 2, group.processes[0])
    group.processes[1].kill()
    start_s = time.monotonic()
    assert group.wait() == [70, -signal.SIGKILL], group.text()
    assert time.monotonic() - start_s < 60
    assert "rank 0 of 2: another rank has ended or does not answer" in group.logs[0].read_text()
    steps = [e["step"] for e in history(tmp_path / "run") if e["event"] == "step"]
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").step == steps[-1], (
        "and nothing is lost"
    )

    group = Group(2, argv, tmp_path)
    assert group.wait() == [0, 0], group.text()
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(tmp_path / "whole")
    assert history(tmp_path / "run") == history(tmp_path / "whole")


@pytest.mark.slow
def test_a_rank_that_falls_silent_ends_the_job_in_time(tiny_llama_dir, corpus, tmp_path):
    """Its connection stays open: only the time limit tells."""
    argv = flags(
        tiny_llama_dir,
        corpus,
        tmp_path / "run",
        "--resume",
        "auto",
        "--epochs",
        1000,
        "--eval_every_steps",
        10000,
    )
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
    assert (
        "rank 0 of 2: another rank has ended or does not answer" in line
        and "ranks wait 15 s: --rank_timeout" in line
    )
    steps = [e["step"] for e in history(tmp_path / "run") if e["event"] == "step"]
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").step == steps[-1], (
        "and nothing is lost"
    )


@pytest.mark.slow
def test_a_sharded_base_equals_a_whole_one(tiny_llama_dir, corpus, tmp_path):
    """Ranks with unequal numbers of blocks, and a step that leaves one without documents: nobody
    waits for a gather that never comes."""
    more = ["--lora_dropout", 0, "--batch_size", 11, "--block_tokens", 80, "--epochs", 1]
    assert main(flags(tiny_llama_dir, corpus, tmp_path / "whole", *more)) == 0
    group = Group(
        2, flags(tiny_llama_dir, corpus, tmp_path / "shared", *more, "--shard_base"), tmp_path
    )
    assert group.wait() == [0, 0], group.text()
    for a, b in zip(history(tmp_path / "whole"), history(tmp_path / "shared"), strict=True):
        assert (b.pop("event"), b) == (a.pop("event"), pytest.approx(a, rel=2e-5))
    sizes = [
        json.loads((tmp_path / n / "run.json").read_text())["model"]["base_bytes"]
        for n in ("whole", "shared")
    ]
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
    learner = Trainable(model.attach(LoraSettings(r=4, alpha=8.0), seed=0), TrainConfig())
    randomise_b(learner.adapters)
    return model, learner


def gradient_of_a_step(model, learner, ranks, batch_size, accumulation):
    config = TrainConfig(
        batch_size=batch_size,
        grad_accum_steps=accumulation,
        max_steps=1,
        max_grad_norm=0,
        block_tokens=40,
    )
    nothing = dict.fromkeys(("sink", "on_step", "on_eval"), lambda *_: None)
    loop.train(
        model,
        learner,
        tiny_corpus(LENGTHS, first_targets=TARGETS),
        None,
        config,
        **nothing,
        stop_requested=bool,
        ranks=ranks,
    )
    return learner.adapters.grad


@pytest.mark.parametrize(
    ("count", "batch_size", "accumulation"), [(1, 2, 4), (1, 8, 1), (2, 4, 2), (3, 8, 1), (9, 8, 1)]
)
def test_the_number_of_ranks_does_not_change_the_gradient(count, batch_size, accumulation):
    """8 documents a step, cut in every way; with 9 ranks one has nothing to do."""
    expected = gradient_of_a_step(*fresh_learner(), ALONE, 1, 8)
    shared, found = ({}, threading.Barrier(count)), {}
    learners = [fresh_learner() for _ in range(count)]

    def work(rank):
        found[rank] = gradient_of_a_step(
            *learners[rank], Threads(rank, count, shared), batch_size, accumulation
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == count and float(expected.norm()) > 0.1
    for gradient in found.values():
        assert float((gradient - expected).norm() / expected.norm()) <= 1e-6
        assert torch.equal(gradient, found[0])


def test_ranks_that_share_a_gpu_are_refused_before_nccl_fails():
    refuse_shared(["a GPU-1", "a GPU-2", "b GPU-1"])
    with pytest.raises(UnavailableError, match=r"ranks 0 and 2: have the same GPU \(a GPU-1\)"):
        refuse_shared(["a GPU-1", "a GPU-2", "a GPU-1"])


def test_a_wait_for_a_dead_gpu_rank_raises_here(monkeypatch):
    """And does not end the process from a thread of NCCL's; torch reads the variable when the group
    is made."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    for name in (*names, "TORCH_NCCL_BLOCKING_WAIT"):
        monkeypatch.setenv(name, "0")  # restored afterwards
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with joined(Rendezvous(0, 1, 0, "127.0.0.1", (port,)), timeout_s=20) as ranks:
        assert os.environ["TORCH_NCCL_BLOCKING_WAIT"] == "1"
        assert ranks.sum_(torch.ones(3)).tolist() == [1, 1, 1]
