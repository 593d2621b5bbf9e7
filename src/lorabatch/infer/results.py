"""Where finished requests go: a record each, the tally, and what is shown meanwhile."""

from __future__ import annotations

import time

from lorabatch.infer.load import Loaded
from lorabatch.infer.requests import Request, completion_record
from lorabatch.infer.sink import Completions, Tally
from lorabatch.progress import Progress, rounded


class Results:
    """``iterations``: passes over the work, of which one is recorded."""

    def __init__(self, file: Completions, tally: Tally, loaded: Loaded, *, iterations: int) -> None:
        self._file, self._tally, self._loaded = file, tally, loaded
        earlier = sum(tally.done)
        left = len(tally.done) - earlier
        self.progress = Progress(
            earlier + left * iterations, unit="request", description="infer", done=earlier
        )

    def refused(self, request: Request, *, record: bool) -> None:
        """A request that cannot run."""
        if record:
            self._write(request)
        self.progress.update()

    def finished(
        self, request: Request, *, begin_s: float, output_tokens: int, running: int, record: bool
    ) -> None:
        """output_tokens: of this pass so far, which began at ``begin_s`` of ``perf_counter``."""
        if record:
            self._write(request)
        self.progress.update(
            tokens_per_s=rounded(output_tokens / (time.perf_counter() - begin_s)),
            running=str(running),
            waiting=str(self.progress.left - 1 - running),
        )

    def _write(self, request: Request) -> None:
        key = request.key(self._loaded.work_key)
        record = completion_record(
            request, self._loaded.tokenizer, key=key, adapter=self._loaded.adapter
        )
        self._file.write(record)
        self._tally.add(record)
