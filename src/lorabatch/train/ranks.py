"""Several processes that train one adapter: who is there, who takes which documents, one sum per
step.

Started by ``torchrun`` or ``srun``; the sums go through torch.distributed (gloo between CPUs, NCCL
between GPUs).
Every rank keeps a whole adapter and optimiser: equal gradients keep them equal, so nothing else is
sent.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import TYPE_CHECKING, TypeVar

from lorabatch.corpus.packing import deal
from lorabatch.corpus.tokens import TokenDocument
from lorabatch.errors import TrainingError, UnavailableError

if TYPE_CHECKING:  # the command line asks who is there before torch is loaded
    from torch import Tensor
    from torch._C._distributed_c10d import Store
    from torch.distributed import ProcessGroup

# ranks may be this far apart before the first step: shared file systems are slow for some
LOADING_S = 1800
ANSWER_S = 5  # for the first rank's answer to one that asks at its port
MAX_ANSWER = 100  # bytes, whoever answers
T = TypeVar("T")


@dataclass(frozen=True)
class Rendezvous:
    """One process among several, and where the first one listens."""

    rank: int
    count: int
    local_rank: int
    host: str
    ports: tuple[int, ...]  # the first that is free
    run: str = ""  # tells whether whoever listens is of this run


def find_rendezvous(environ: Mapping[str, str]) -> Rendezvous | None:
    """From torchrun's variables, else from those of a Slurm step with several tasks; None for a
    process on its own.

    Only a step (``srun``) counts: a batch script that starts one process sees SLURM_NTASKS too.
    """
    if int(environ.get("WORLD_SIZE", "1")) > 1:
        return _from_torchrun(environ)
    if int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _from_slurm(environ)
    return None


def _from_torchrun(environ: Mapping[str, str]) -> Rendezvous:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    missing = [n for n in (*names, "MASTER_ADDR") if n not in environ]
    if missing:
        raise UnavailableError(
            f"WORLD_SIZE is set and {missing[0]} is not", fix="start with torchrun or srun"
        )
    rank, count, local, port = (int(environ[n]) for n in names)
    return Rendezvous(rank, count, local, environ["MASTER_ADDR"], (port,))


def _from_slurm(environ: Mapping[str, str]) -> Rendezvous:
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    rank, count, local = (int(environ[n]) for n in names)
    if environ.get("SLURM_STEP_NUM_NODES") == "1":  # whose own name need not resolve
        host = "127.0.0.1"
    else:
        host = first_host(environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"])
    # Other jobs on the node, and other steps of this job, listen elsewhere; what else listens there
    # nobody knows.
    job, step = int(environ["SLURM_JOB_ID"]), int(environ.get("SLURM_STEP_ID", "0"))
    first = 10000 + (7 * job + step) % 20000
    others = tuple(30000 + (first + i * 577) % 2000 for i in range(3))
    return Rendezvous(rank, count, local, host, (first, *others), f"Slurm step {job}.{step}")


def first_host(nodelist: str) -> str:
    """``"gpu[003-007,012],cpu1"`` -> ``"gpu003"``: Slurm's notation, read without scontrol."""
    first = re.split(r",(?![^\[]*\])", nodelist)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def refuse_shared(gpus: Sequence[str]) -> None:
    """UnavailableError if two ranks have the same GPU. gpus: each rank's, named by node and
    UUID."""
    for rank, gpu in enumerate(gpus):
        first = gpus.index(gpu)
        if first < rank:
            raise UnavailableError(
                f"have the same GPU ({gpu})",
                where=f"ranks {first} and {rank}",
                fix="start as many ranks on a node as it has GPUs, or use --no_cuda",
            )


class Ranks:
    """All processes of the run. Alone, every method does nothing at once; this class is also that
    case."""

    rank, count = 0, 1
    # whether all ranks must make the same number of passes: a sharded base is gathered in each
    even = False

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def shares(self, documents: Sequence[TokenDocument]) -> list[list[TokenDocument]]:
        """The documents of each rank, near-equal in tokens; the order is kept."""
        return [
            [documents[i] for i in share]
            for share in deal([d.num_tokens for d in documents], self.count)
        ]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace the tensor by its sum over all ranks."""
        return tensor

    def any(self, flag: bool) -> bool:
        return flag

    def gather(self, shard: Tensor) -> Tensor:
        """[n, …] of every rank -> [count * n, …]."""
        return shard

    def from_first(self, value: T) -> T:
        """The first rank's value on every rank."""
        return value

    def wait_for_loading(self) -> None:
        """Until every rank is here; the first of the calls that have a short time limit comes after
        it."""


ALONE = Ranks()


class _Group(Ranks):
    def __init__(self, rendezvous: Rendezvous, timeout_s: float) -> None:
        import torch
        import torch.distributed as dist

        self.rank, self.count, self._timeout_s = rendezvous.rank, rendezvous.count, timeout_s
        self._torch, self._dist = torch, dist
        os.environ |= {
            "RANK": str(rendezvous.rank),
            "WORLD_SIZE": str(rendezvous.count),
            "LOCAL_RANK": str(rendezvous.local_rank),
            "MASTER_ADDR": rendezvous.host,
            "MASTER_PORT": str(rendezvous.ports[0]),
        }
        # NCCL's own watchdog would end the process without a word; so a wait that is too long
        # raises here
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
        at = f"{rendezvous.host}:{' or '.join(map(str, rendezvous.ports))}"
        with self._told(f"cannot reach the other ranks at {at}"):
            dist.init_process_group(
                "gloo",
                timeout=timedelta(seconds=LOADING_S),
                store=_store(rendezvous) if rendezvous.run else None,
                rank=self.rank,
                world_size=self.count,
            )
            self._control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
            self._gpu = None
            if torch.cuda.is_available():
                torch.cuda.set_device(rendezvous.local_rank % torch.cuda.device_count())
                self._own_gpu(f"{socket.gethostname()} {torch.cuda.get_device_properties().uuid}")
                self._gpu = dist.new_group(backend="nccl", timeout=timedelta(seconds=timeout_s))

    def _own_gpu(self, gpu: str) -> None:
        """UnavailableError if two ranks have one GPU: NCCL would fail in its own words."""
        gpus: list[str] = [""] * self.count
        self._dist.all_gather_object(gpus, gpu)
        refuse_shared(gpus)

    @contextmanager
    def _told(self, what: str = "another rank has ended or does not answer") -> Iterator[None]:
        """A dead or silent peer as one line: gloo raises when a connection breaks or the time limit
        is over."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            raise TrainingError(
                f"{what} ({str(error).splitlines()[0][:160]})",
                where=f"rank {self.rank} of {self.count}",
                fix=(
                    "look at the rank that ended first, then resume with --resume auto (ranks "
                    f"wait {self._timeout_s:g} s: --rank_timeout)"
                ),
            ) from None

    def _between(self, tensor: Tensor) -> ProcessGroup | None:
        return self._control if tensor.device.type == "cpu" else self._gpu

    def sum_(self, tensor: Tensor) -> Tensor:
        with self._told():
            if tensor.device.type != "cpu":
                # gloo hears at once of a rank that is gone, NCCL when the time limit is over
                self._dist.all_reduce(self._torch.zeros(1), group=self._control)
            self._dist.all_reduce(tensor, group=self._between(tensor))
        return tensor

    def gather(self, shard: Tensor) -> Tensor:
        whole = shard.new_empty(self.count * shard.shape[0], *shard.shape[1:])
        with self._told():
            self._dist.all_gather_into_tensor(whole, shard, group=self._between(shard))
        return whole

    def any(self, flag: bool) -> bool:
        return bool(self.sum_(self._torch.tensor(int(flag))))

    def from_first(self, value: T) -> T:
        box = [value]
        with self._told():
            self._dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait_for_loading(self) -> None:
        with self._told():
            self._dist.monitored_barrier(timeout=timedelta(seconds=LOADING_S))

    def leave(self) -> None:
        self._dist.destroy_process_group()


def _store(rendezvous: Rendezvous) -> Store:
    """What the ranks of a Slurm step agree through: it listens anywhere on the first node, and the
    first rank tells where, at the first of the run's ports that nobody else holds.

    A rank that finds somebody else at a port, even the first rank of another run, asks at the next.
    (torch's own client would wait for ever for the answer of a program that is no store.)
    OSError if all ports are taken; TimeoutError if no first rank is found.
    """
    # a name of torch's public interface that it does not list as exported
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    loading = timedelta(seconds=LOADING_S)
    host, count = rendezvous.host, rendezvous.count
    if rendezvous.rank == 0:
        listener = _listen(rendezvous.ports)
        store = TCPStore(host, 0, count, True, loading, wait_for_workers=False)
        Thread(target=_tell, args=(listener, rendezvous, store.port), daemon=True).start()
        return store
    end_s = time.monotonic() + LOADING_S
    while time.monotonic() < end_s:
        for port in rendezvous.ports:
            with suppress(OSError, ValueError):
                if store_port := _ask(host, port, rendezvous.run):
                    return TCPStore(host, store_port, count, False, loading)
        time.sleep(0.2)
    raise TimeoutError("nobody of this run listens there")


def _listen(ports: Sequence[int]) -> socket.socket:
    for port in ports:
        with suppress(OSError):
            return socket.create_server(("", port))
    raise OSError("other programs listen there")


def _ask(host: str, port: int, run: str) -> int | None:
    """The port of the run's store. OSError or ValueError if somebody else listens here, or nobody;
    None if it is another run."""
    with socket.create_connection((host, port), ANSWER_S) as asked:
        asked.sendall(f"{run}\n".encode())
        answer = asked.makefile().readline(MAX_ANSWER)
    return int(answer) if answer else None


def _tell(listener: socket.socket, rendezvous: Rendezvous, port: int) -> None:
    """Answer every other rank of the run, once."""
    with listener:
        told = 1
        while told < rendezvous.count:
            with suppress(OSError, ValueError), listener.accept()[0] as asking:
                asking.settimeout(ANSWER_S)
                if asking.makefile().readline(MAX_ANSWER).strip() == rendezvous.run:
                    asking.sendall(f"{port}\n".encode())
                    told += 1


@contextmanager
def joined(rendezvous: Rendezvous | None, *, timeout_s: float) -> Iterator[Ranks]:
    """The process group while it is needed. TrainingError if the others do not come."""
    if rendezvous is None:
        yield ALONE
        return
    group = _Group(rendezvous, timeout_s)
    try:
        yield group
    finally:
        group.leave()
