"""Passes over the prompts with a loaded model: as many requests at once and as long ones as memory
allows."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import islice

import torch

from lorabatch.config import InferConfig
from lorabatch.errors import UnavailableError
from lorabatch.infer.engine import Engine
from lorabatch.infer.feed import Feed
from lorabatch.infer.load import Loaded
from lorabatch.infer.metrics import Pass, add_request, run_metrics
from lorabatch.infer.prompts import PromptFile
from lorabatch.infer.requests import Request
from lorabatch.infer.results import Results
from lorabatch.infer.runners import make_runner, records_steps
from lorabatch.infer.runners.base import HiddenRunner
from lorabatch.infer.runners.fixed import FixedRunner
from lorabatch.infer.runners.program import unsupported
from lorabatch.infer.stats import PassStats
from lorabatch.kernels.onednn import rows_are_independent
from lorabatch.machine.device import free_bytes, out_of_memory
from lorabatch.metrics.inference import Latencies
from lorabatch.metrics.schema import InferMetrics
from lorabatch.model.native import NativeModel
from lorabatch.progress import Phases, counted, note
from lorabatch.signals import StopSignals

KV_SHARE = 0.7  # of the free memory; activations need the rest


class Passes:
    """Of one loaded model, over one prompt file or range of it after another.

    ``num_slots``: requests at once; ``capacity``: tokens of each slot. Both change when memory or a
    request demands it. ``lasting``: more ranges follow, so slots are not cut to the requests of the
    first.
    """

    def __init__(self, loaded: Loaded, config: InferConfig, *, lasting: bool = False) -> None:
        self.loaded, self.config, self._lasting = loaded, config, lasting
        self.num_slots = self.capacity = 0  # chosen by the first requests
        self._order = (
            config.order if config.order != "auto" else "adapter" if loaded.adapters else "arrival"
        )
        self._fixed = False  # whether a GPU's steps all have the same shapes
        self._engine: Engine | None = None
        self._runner: HiddenRunner | None = None  # of the engine

    def run(
        self,
        prompts: PromptFile,
        done: bytearray,
        results: Results,
        phases: Phases,
        signals: StopSignals,
    ) -> list[Pass]:
        """``--iters`` passes over the requests that are not ``done`` [a byte per position]; only
        the first is recorded."""
        left = len(done) - sum(done)
        if not left:
            return []
        feed = Feed(
            prompts,
            self.loaded,
            long_prompt=self.config.long_prompt,
            done=done,
            on_error=results.refused,
            again=self.config.iters > 1,
        )
        self._choose_slots(feed, self.config.batch_size if self._lasting else left)
        phases.end("tokenise")
        self._prepare()
        phases.end("pack")
        # a GPU's first step also makes its context and loads its libraries
        if self.config.iters > 1 or self.loaded.device.type == "cuda":
            self._warm_up(feed)
            phases.end("warm_up")
        earlier = f", {sum(done)} finished earlier" if any(done) else ""
        note(f"{counted(left, 'request')}, {self.num_slots} at once{earlier}", sys.stdout)
        passes: list[Pass] = []
        while len(passes) < self.config.iters and not signals:
            if passes:
                feed.rewind()
            passes.append(self._pass(feed, results, signals, record=not passes))
        return passes

    def metrics(
        self, passes: list[Pass], startup_s: Mapping[str, float], counts: Mapping[str, int]
    ) -> InferMetrics:
        """``metrics.json`` of these passes. counts: of ``sink.Tally``."""
        loaded, config = self.loaded, self.config
        return run_metrics(
            passes,
            loaded.model,
            startup_s,
            counts=counts,
            num_slots=max(1, self.num_slots),
            iterations=config.iters,
            quantize=config.quantize,
            adapter_bytes=loaded.adapter_bytes / max(1, len(loaded.adapters)),
        )

    def _choose_slots(self, feed: Feed, num_requests: int) -> None:
        if self.num_slots:
            return
        self.num_slots, self.capacity = (
            max(1, min(self.config.batch_size, num_requests)),
            feed.likely_capacity(),
        )
        self._keep_promise(deterministic=self.config.deterministic)

    def _keep_promise(self, *, deterministic: bool) -> None:
        """A request's tokens do not depend on its neighbours: always so in the CPU kernels;
        elsewhere where sums allow it, or one at a time."""
        model = self.loaded.model
        decoder = (
            model.decoder
            if isinstance(model, NativeModel) and model.decoder.device.type == "cpu"
            else None
        )
        if decoder is not None and (
            unsupported(decoder.spec, decoder.dtype, decoder.device) is None
            or rows_are_independent(decoder.dtype)
        ):
            if deterministic:
                print(
                    "deterministic: on this CPU it always is, at no cost; a request's tokens are "
                    "the same in any batch"
                )
        elif deterministic and records_steps(model):
            print(
                "deterministic: every step has the shapes of a full one, so that sums do not "
                "depend on the batch; no --speculate"
            )
            self._fixed = True
        elif deterministic:
            print(
                "deterministic: one request at a time, because sums depend on the batch here (as "
                "fast as --batch_size 1)"
            )
            self.num_slots = 1
        elif decoder is not None:
            print(
                "a request's tokens may depend on its batch: torch's sums in this type do here; "
                "--dtype fp32 or --deterministic avoids it"
            )

    def _prepare(self) -> None:
        """Pack the weights and make the cache now, so that the first pass does not."""
        while not self._try((), lambda request: None, lambda: False, PassStats()):
            self._shrink()

    def _warm_up(self, feed: Feed) -> None:
        """A short pass over the first requests that leaves no trace: allocator and caches are warm
        afterwards."""
        first = [
            replace(r, max_new_tokens=min(4, r.max_new_tokens))
            for r in islice(feed.up_to(self.capacity), self.num_slots)
        ]
        if not self._try(first, lambda request: None, lambda: False, PassStats()):
            self._shrink()
        feed.take_back()

    def _pass(self, feed: Feed, results: Results, signals: StopSignals, *, record: bool) -> Pass:
        """Run the feed dry. Raises UnavailableError if one request alone does not fit in memory."""
        stats, latencies = PassStats(begin_s=time.perf_counter()), Latencies()

        def on_finish(request: Request) -> None:
            feed.finish(request)
            if request.error is None:
                add_request(latencies, request)
            results.finished(
                request,
                begin_s=stats.begin_s,
                output_tokens=latencies.output_tokens,
                running=min(feed.num_out, self.num_slots),
                record=record,
            )

        self.complete(feed, on_finish, lambda: bool(signals), stats)
        stats.duration_s = time.perf_counter() - stats.begin_s
        return stats, latencies

    def complete(
        self,
        feed: Feed,
        on_finish: Callable[[Request], None],
        stop_requested: Callable[[], bool],
        stats: PassStats,
        on_tokens: Callable[[Request], None] | None = None,
    ) -> None:
        """Run the feed dry, with fewer requests at once where memory is short, in longer slots
        where a request needs them."""
        while not stop_requested():
            todo = feed.up_to(self.capacity)
            if not self._try(todo, on_finish, stop_requested, stats, on_tokens):
                self._shrink()
                feed.take_back()
            elif feed.next_positions > self.capacity:
                self._grow(feed.next_positions)
            else:
                break

    def reserve(self, num_requests: int, positions: int) -> HiddenRunner:
        """Slots for so many requests, or for as many as memory allows, each of so many positions at
        least; the runner that has them."""
        if not self.num_slots:
            self.num_slots, self.capacity = max(1, num_requests), positions
            self._keep_promise(deterministic=self.config.deterministic)
        if positions > self.capacity:
            self._grow(positions)
        self._prepare()
        assert self._runner is not None
        return self._runner

    def _grow(self, positions: int) -> None:
        self._engine = self._runner = None
        self.capacity = min(self.loaded.limit, max(positions, self.capacity * 5 // 4))

    def _try(
        self,
        requests: Iterable[Request],
        on_finish: Callable[[Request], None],
        stop_requested: Callable[[], bool],
        stats: PassStats,
        on_tokens: Callable[[Request], None] | None = None,
    ) -> bool:
        """False if memory ran out. The exception, and with it the tensors of its frames, is gone
        when this returns."""
        try:
            self._engine = self._engine or self._new_engine()
            self._engine.run(
                requests,
                on_finish,
                stop_requested=stop_requested,
                stats=stats,
                on_tokens=on_tokens,
            )
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            return False
        return True

    def _shrink(self) -> None:
        if self.num_slots == 1:
            raise UnavailableError(
                "out of memory with one request at once",
                fix="give a smaller --max_len or --prefill_tokens",
            )
        self.num_slots = (self.num_slots + 1) // 2
        note(f"out of memory: continuing with {counted(self.num_slots, 'request')} at once")
        self._engine = self._runner = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _new_engine(self) -> Engine:
        loaded, config = self.loaded, self.config
        self._fit_cache()
        self._runner = make_runner(
            loaded.model,
            num_slots=self.num_slots,
            capacity=self.capacity,
            max_tokens=config.prefill_tokens + self.num_slots,
            quantize=config.quantize,
            adapters=loaded.adapters,
            fixed=self._fixed,
        )
        if isinstance(self._runner, FixedRunner) and not self._runner.rows_are_alike():
            note(
                "deterministic: equal rows differ on this GPU: continuing with one request at once"
            )
            self._fixed, self.num_slots = False, 1
            return self._new_engine()
        return Engine(
            self._runner,
            loaded.tokenizer,
            loaded.eos_ids,
            max_running=self.num_slots,
            prefill_tokens=config.prefill_tokens,
            order=self._order,
            speculate=0 if self._fixed else config.speculate,
        )

    def _fit_cache(self) -> None:
        """No more slots than the free memory holds keys and values for. UnavailableError where the
        adapters leave no room for one."""
        model, adapter_bytes = self.loaded.model, self.loaded.adapter_bytes
        if not isinstance(model, NativeModel):
            return
        slot_bytes = (
            self.capacity
            * model.spec.kv_elements_per_token
            * model.decoder.embedding.element_size()
        )
        free = free_bytes(model.decoder.device)
        fitting = int(KV_SHARE * (free - adapter_bytes)) // slot_bytes
        if fitting < 1 and self.loaded.adapters:
            what = (
                f"{counted(len(self.loaded.adapters), 'adapter')} take "
                f"{adapter_bytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
            )
            raise UnavailableError(
                what, where="--adapters", fix="give fewer, or one at a time with --adapter_dir"
            )
        if fitting < self.num_slots:
            self.num_slots = max(1, fitting)
            print(
                f"the KV cache of that many requests does not fit in memory: {self.num_slots} "
                "at once",
                file=sys.stderr,
            )
