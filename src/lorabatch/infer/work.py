"""The requests of a run on their way through a loaded model: what is left of them, where their records go, what is shown of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorabatch.config import InferConfig
from lorabatch.infer.prompts import PromptFile
from lorabatch.infer.requests import Request, completion_record
from lorabatch.progress import Phases, Progress
from lorabatch.signals import StopSignals

if TYPE_CHECKING:
    from lorabatch.infer.feed import Feed
    from lorabatch.infer.metrics import Latencies, Pass
    from lorabatch.infer.session import Session
    from lorabatch.infer.sink import Completions, Tally
    from lorabatch.model.lora import LoraWeights


@dataclass
class Loaded:
    """Everything that stands between the prompts and the engine."""

    model: Any
    tokenizer: Any
    eos_ids: frozenset[int]
    adapter: str | None
    bank: tuple[LoraWeights, ...]  # of --adapters, in their order
    bank_bytes: int  # of the bank in the type of the run
    work_key: str  # what, besides a request itself, its completion depends on
    limit: int  # positions of prompt and completion together
    facts: dict[str, Any]  # what run.json says of it


@dataclass
class Kept:
    """What a process that completes one range of prompts after another has from the first one on; ``lasting`` in such a process."""

    loaded: Loaded
    session: Session | None = None
    lasting: bool = False


class Work:
    """The requests that are left, where their completions go, and what is shown of them."""

    def __init__(self, prompts: PromptFile, kept: Kept, config: InferConfig, tally: Tally, file: Completions) -> None:
        self._prompts, self._kept, self._config, self._tally, self._file = prompts, kept, config, tally, file
        self._loaded, self._earlier, self.num_slots = kept.loaded, sum(tally.done), 1
        left = len(prompts) - self._earlier
        self.progress = Progress(self._earlier + left * config.iters, unit="request", description="infer", done=self._earlier)

    def run(self, mask: bytearray, phases: Phases, signals: StopSignals) -> list[Pass]:
        """``--iters`` passes over what is not masked; only the first is recorded."""
        from lorabatch.infer.metrics import Latencies
        from lorabatch.infer.session import Session

        loaded, config, left = self._loaded, self._config, len(mask) - sum(mask)
        feed = self.feed(mask, record=True)
        lasting = self._kept.lasting
        session = (self._kept.session if lasting else None) or Session(
            loaded.model,
            loaded.tokenizer,
            loaded.eos_ids,
            config,
            num_requests=config.batch_size if lasting else left,  # the next range may have more
            capacity=feed.likely_capacity(),
            bank=loaded.bank,
            bank_bytes=loaded.bank_bytes,
        )
        if lasting:
            self._kept.session = session
        phases.end("tokenise")
        session.prepare()
        phases.end("pack")
        if config.iters > 1:
            session.warm_up(feed)
            phases.end("warm_up")
        earlier = f", {self._earlier} finished earlier" if self._earlier else ""
        print(f"{left} requests, {session.num_slots} at once{earlier}")
        passes: list[Pass] = []
        while len(passes) < config.iters and not signals:
            latencies = Latencies()
            on_finish = self.on_finish(session, feed, latencies, record=not passes)
            passes.append((session.complete(feed, on_finish, stop_requested=lambda: bool(signals)), latencies))
            if len(passes) < config.iters:
                feed = self.feed(mask, record=False)
        self.num_slots = max(self.num_slots, session.num_slots)
        return passes

    def feed(self, mask: bytearray, *, record: bool) -> Feed:
        """The work from its beginning; its error records are written if ``record``."""
        from lorabatch.infer.feed import Feed

        def on_error(request: Request) -> None:
            if record:
                self._write(request)
            self.progress.update()

        loaded, config = self._loaded, self._config
        fitting: dict[str, Any] = {"limit": loaded.limit, "long_prompt": config.long_prompt, "vocab_size": loaded.model.vocab_size}
        return Feed(self._prompts, loaded.tokenizer, **fitting, done=mask, on_error=on_error)

    def on_finish(self, session: Session, feed: Feed, latencies: Latencies, *, record: bool) -> Callable[[Request], None]:
        start = time.perf_counter()

        def on_finish(request: Request) -> None:
            if request.error is None:
                latencies.add(request)
            if record:
                self._write(request)
            running = min(feed.num_out, session.num_slots)
            self.progress.update(
                tokens_per_s=f"{latencies.output_tokens / (time.perf_counter() - start):.0f}",
                running=str(running),
                waiting=str(self.progress.left - 1 - running),
            )

        return on_finish

    def _write(self, request: Request) -> None:
        key = request.key(self._loaded.work_key)
        record = completion_record(request, self._loaded.tokenizer, key=key, adapter=self._loaded.adapter)
        self._file.write(record)
        self._tally.add(record)
