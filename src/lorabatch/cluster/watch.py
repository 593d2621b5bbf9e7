"""How far all processes that share a prompt file are together."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lorabatch.cluster.claims import is_done
from lorabatch.progress import LOG_EVERY_S, Progress


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
