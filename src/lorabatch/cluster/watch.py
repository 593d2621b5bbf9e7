"""How far all processes that share a prompt file are together."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lorabatch.cluster.claims import is_done
from lorabatch.progress import LOG_EVERY_S, Progress


class _Counter:
    """Completions on disk; what was read once is not read again."""

    def __init__(self) -> None:
        self._seen: dict[Path, tuple[int, int]] = {}  # bytes read, lines in them
        self._finished: set[Path] = set()

    def written(self, shard: Path, size: int) -> int:
        """The most that one process has of it: a successor begins with a copy of what was there."""
        if shard not in self._finished and is_done(shard):
            self._finished.add(shard)
        if shard in self._finished:
            return size
        files = shard.glob("output-*/*/completions.jsonl")
        return min(size, max(map(self._lines, files), default=0))

    def _lines(self, path: Path) -> int:
        offset, count = self._seen.get(path, (0, 0))
        # a file system that fails for a moment is looked at again
        with suppress(OSError), path.open("rb") as file:
            file.seek(offset)
            new = file.read()
            self._seen[path] = offset + len(new), count + new.count(b"\n")
        return self._seen.get(path, (0, 0))[1]


@contextmanager
def watched(shards: Sequence[Path], sizes: Sequence[int]) -> Iterator[None]:
    """A progress bar of all shards [completions each], whoever computes them: the records on disk
    are counted now and then."""
    counter, ended = _Counter(), threading.Event()

    def look() -> None:
        # every look is work for a parallel file system
        every_s = 1.0 if sys.stderr.isatty() else LOG_EVERY_S
        done = sum(map(counter.written, shards, sizes))
        progress = Progress(sum(sizes), unit="request", description="infer", done=done)
        while not ended.wait(every_s):
            now = max(done, sum(map(counter.written, shards, sizes)))
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
