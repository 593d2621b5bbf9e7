"""Several processes on one machine: which cores each gets, and how far they are together."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

from lorabatch.cluster.claims import is_done
from lorabatch.errors import UsageError
from lorabatch.progress import LOG_EVERY_S, Progress

SYSTEM = Path("/sys/devices/system")


def share_cores(cores: set[int], count: int, system: Path = SYSTEM) -> list[list[int]]:
    """The cores in ``count`` near-equal parts (0: one per NUMA node), those of a node and of a physical core side by side.

    UsageError if there are more parts than cores. ``system``: where Linux describes them.
    """
    node_of = {core: i for i, path in enumerate(sorted(system.glob("node/node*/cpulist"))) for core in _cores(path)}
    nodes = {core: node_of.get(core, 0) for core in cores}

    def place(core: int) -> tuple[int, int, int]:
        siblings = system / f"cpu/cpu{core}/topology/thread_siblings_list"
        return nodes[core], min(_cores(siblings), default=core), core

    ordered, parts = sorted(cores, key=place), count or len(set(nodes.values()))
    if parts > len(cores):
        raise UsageError(f"only {len(cores)} cores are usable here", where=f"--processes {count}", fix="give fewer")
    if not count:
        return [[core for core in ordered if nodes[core] == node] for node in sorted(set(nodes.values()))]
    bounds = [i * len(ordered) // parts for i in range(parts + 1)]
    return [ordered[a:b] for a, b in pairwise(bounds)]


def _cores(path: Path) -> list[int]:
    """The kernel's lists: ``"0-2,8"`` -> [0, 1, 2, 8]; empty where it says nothing."""
    try:
        spans = [span.partition("-")[::2] for span in path.read_text(encoding="ascii").strip().split(",") if span]
    except OSError:
        return []
    return [core for first, last in spans for core in range(int(first), int(last or first) + 1)]


@contextmanager
def watched(shards: Sequence[Path], sizes: Sequence[int]) -> Iterator[None]:
    """A progress bar of all shards [completions each], whoever computes them: the records on disk are counted now and then."""
    seen: dict[Path, tuple[int, int]] = {}  # bytes read, lines in them
    finished: set[Path] = set()
    ended = threading.Event()

    def lines(path: Path) -> int:
        offset, count = seen.get(path, (0, 0))
        with suppress(OSError), path.open("rb") as file:  # a file system that fails for a moment is looked at again
            file.seek(offset)
            new = file.read()
            seen[path] = offset + len(new), count + new.count(b"\n")
        return seen.get(path, (0, 0))[1]

    def written(shard: Path, size: int) -> int:
        """The most that one process has of it: a successor begins with a copy of what was there."""
        if shard not in finished and is_done(shard):
            finished.add(shard)
        if shard in finished:
            return size
        return min(size, max(map(lines, shard.glob("output-*/*/completions.jsonl")), default=0))

    def look() -> None:
        every_s = 1.0 if sys.stderr.isatty() else LOG_EVERY_S  # every look is work for a parallel file system
        done = sum(map(written, shards, sizes))
        progress = Progress(sum(sizes), unit="request", description="infer", done=done)
        while not ended.wait(every_s):
            now = max(done, sum(map(written, shards, sizes)))
            progress.update(now - done)
            done = now
        progress.close()

    thread = threading.Thread(target=look, name="watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
