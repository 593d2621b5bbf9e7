"""Several processes that train one adapter: who is there, who takes which documents, one sum per step.

Started by ``torchrun`` or ``srun``; the sums go through torch.distributed (gloo between CPUs, NCCL between GPUs).
Every rank keeps a whole adapter and optimiser: equal gradients keep them equal, so nothing else is sent.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lorabatch.corpus.packing import deal
from lorabatch.corpus.tokens import TokenDocument
from lorabatch.errors import TrainingError, UnavailableError

if TYPE_CHECKING:  # the command line asks for its place before torch is loaded
    from torch import Tensor

LOADING_S = 1800  # ranks may be this far apart before the first step: shared file systems are slow for some


@dataclass(frozen=True)
class Place:
    """One process among several, and where the first one listens."""

    rank: int
    count: int
    local_rank: int
    host: str
    port: int


def find_place(environ: Mapping[str, str]) -> Place | None:
    """From torchrun's variables, else from those of a Slurm step with several tasks; None for a process on its own.

    Only a step (``srun``) counts: a batch script that starts one process sees SLURM_NTASKS too.
    """
    if int(environ.get("WORLD_SIZE", "1")) > 1:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
        missing = [n for n in (*names, "MASTER_ADDR") if n not in environ]
        if missing:
            raise UnavailableError(f"WORLD_SIZE is set and {missing[0]} is not", fix="start with torchrun or srun")
        rank, count, local, port = (int(environ[n]) for n in names)
        return Place(rank, count, local, environ["MASTER_ADDR"], port)
    if int(environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        one_node = environ.get("SLURM_STEP_NUM_NODES") == "1"  # whose own name need not resolve
        host = "127.0.0.1" if one_node else first_host(environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"])
        # Other jobs on the node, and other steps of this job, listen elsewhere.
        port = 10000 + (7 * int(environ["SLURM_JOB_ID"]) + int(environ.get("SLURM_STEP_ID", "0"))) % 20000
        count, rank, local = (int(environ[f"SLURM_{n}"]) for n in ("STEP_NUM_TASKS", "PROCID", "LOCALID"))
        return Place(rank, count, local, host, port)
    return None


def first_host(nodelist: str) -> str:
    """``"gpu[003-007,012],cpu1"`` -> ``"gpu003"``: Slurm's notation, read without scontrol."""
    first = re.split(r",(?![^\[]*\])", nodelist)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


class Ranks:
    """All processes of the run. Alone, every method does nothing at once; this class is also that case."""

    rank, count = 0, 1
    even = False  # whether all ranks must make the same number of passes: a sharded base is gathered in each

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def shares(self, documents: Sequence[TokenDocument]) -> list[list[TokenDocument]]:
        """The documents of each rank, near-equal in tokens; the order is kept."""
        return [[documents[i] for i in share] for share in deal([d.num_tokens for d in documents], self.count)]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace the tensor by its sum over all ranks."""
        return tensor

    def any(self, flag: bool) -> bool:
        return flag

    def gather(self, shard: Tensor) -> Tensor:
        """[n, …] of every rank -> [count * n, …]."""
        return shard

    def from_first(self, value: Any) -> Any:
        """The first rank's value on every rank."""
        return value

    def wait_for_loading(self) -> None:
        """Until every rank is here; the first of the calls that have a short time limit comes after it."""


ALONE = Ranks()


class _Group(Ranks):
    def __init__(self, place: Place, timeout_s: float) -> None:
        import torch
        import torch.distributed as dist

        self.rank, self.count, self._timeout_s = place.rank, place.count, timeout_s
        self._torch, self._dist = torch, dist
        os.environ |= {
            "RANK": str(place.rank),
            "WORLD_SIZE": str(place.count),
            "LOCAL_RANK": str(place.local_rank),
            "MASTER_ADDR": place.host,
            "MASTER_PORT": str(place.port),
        }
        with self._told(f"cannot meet the others at {place.host}:{place.port}"):
            dist.init_process_group("gloo", timeout=timedelta(seconds=LOADING_S))
            self._control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
            self._gpu = None
            if torch.cuda.is_available():
                torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
                self._gpu = dist.new_group(backend="nccl", timeout=timedelta(seconds=timeout_s))

    @contextmanager
    def _told(self, what: str = "another rank is gone") -> Iterator[None]:
        """A dead or silent peer as one line: gloo raises when a connection breaks or the time limit is over."""
        try:
            yield
        except RuntimeError as error:
            raise TrainingError(
                f"{what} ({str(error).splitlines()[0][:160]})",
                where=f"rank {self.rank} of {self.count}",
                fix=f"look at the rank that ended first, then go on with --resume auto (ranks wait {self._timeout_s:g} s: --rank_timeout)",
            ) from None

    def _between(self, tensor: Tensor) -> Any:
        return self._control if tensor.device.type == "cpu" else self._gpu

    def sum_(self, tensor: Tensor) -> Tensor:
        with self._told():
            self._dist.all_reduce(tensor, group=self._between(tensor))
        return tensor

    def gather(self, shard: Tensor) -> Tensor:
        whole = shard.new_empty(self.count * shard.shape[0], *shard.shape[1:])
        with self._told():
            self._dist.all_gather_into_tensor(whole, shard, group=self._between(shard))
        return whole

    def any(self, flag: bool) -> bool:
        return bool(self.sum_(self._torch.tensor(int(flag))))

    def from_first(self, value: Any) -> Any:
        box = [value]
        with self._told():
            self._dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait_for_loading(self) -> None:
        with self._told():
            self._dist.monitored_barrier(timeout=timedelta(seconds=LOADING_S))

    def leave(self) -> None:
        self._dist.destroy_process_group()


@contextmanager
def joined(place: Place | None, *, timeout_s: float) -> Iterator[Ranks]:
    """The process group while it is needed. TrainingError if the others do not come."""
    if place is None:
        yield ALONE
        return
    group = _Group(place, timeout_s)
    try:
        yield group
    finally:
        group.leave()
