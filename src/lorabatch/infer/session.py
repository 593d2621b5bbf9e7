"""A loaded model that completes whole feeds, with as many and as long slots as memory allows."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from lorabatch.config import InferConfig
from lorabatch.errors import UnavailableError
from lorabatch.infer.engine import Engine, PassStats
from lorabatch.infer.feed import Feed
from lorabatch.infer.program import unsupported
from lorabatch.infer.requests import Request
from lorabatch.infer.runner import Runner, make_runner
from lorabatch.model.device import free_bytes, out_of_memory
from lorabatch.model.hf import HfModel
from lorabatch.model.linear import rows_are_independent
from lorabatch.model.load import Model
from lorabatch.model.lora import LoraWeights
from lorabatch.model.native import NativeModel

KV_SHARE = 0.7  # of the free memory; activations need the rest


class Session:
    """``num_slots``: requests at once; ``capacity``: tokens of each slot. Both change when memory or a request demands it."""

    def __init__(
        self,
        model: Model,
        tokenizer: Any,
        eos_ids: frozenset[int],
        config: InferConfig,
        *,
        num_requests: int,
        capacity: int,
        bank: Sequence[LoraWeights],
        bank_bytes: int,
    ) -> None:
        self._model, self._tokenizer, self._eos_ids, self._config = model, tokenizer, eos_ids, config
        self._bank, self._bank_bytes = bank, bank_bytes
        self.num_slots, self.capacity = max(1, min(config.batch_size, num_requests)), capacity
        self._keep_promise(config.deterministic)
        self._order = config.order if config.order != "auto" else "adapter" if bank else "arrival"
        self._engine: Engine | None = None

    def _keep_promise(self, deterministic: bool) -> None:
        """A request's tokens do not depend on its neighbours: always so in the CPU kernels; elsewhere where sums allow it, or one at a time."""
        decoder = self._model.decoder if isinstance(self._model, NativeModel) else None
        if decoder is not None and decoder.device.type != "cpu":
            decoder = None
        if decoder is not None and (
            unsupported(decoder.spec, decoder.dtype, decoder.device) is None or rows_are_independent(decoder.dtype)
        ):
            if deterministic:
                print("deterministic: on this CPU it always is, at no cost; a request's tokens are the same in any batch")
        elif deterministic:
            print("deterministic: one request at a time, because sums depend on the batch here (as fast as --batch_size 1)")
            self.num_slots = 1
        elif decoder is not None:
            print(
                "a request's tokens may depend on its batch: torch's sums in this type do here; --dtype fp32 or --deterministic avoids it"
            )

    def prepare(self) -> None:
        """Pack the weights and make the cache now, so that the first pass does not."""
        while not self._run((), lambda request: None, lambda: False, PassStats()):
            self._shrink()

    def warm_up(self, feed: Feed) -> None:
        """A short pass over the first requests that leaves no trace: allocator and caches are warm afterwards."""
        first = [replace(r, max_new_tokens=min(4, r.max_new_tokens)) for r in islice(feed.up_to(self.capacity), self.num_slots)]
        if not self._run(first, lambda request: None, lambda: False, PassStats()):
            self._shrink()
        feed.take_back()

    def complete(
        self, feed: Feed, on_finish: Callable[[Request], None], *, stop_requested: Callable[[], bool] = lambda: False
    ) -> PassStats:
        """Run the feed dry. Raises UnavailableError if one request alone does not fit in memory."""
        stats = PassStats(begin_s=time.perf_counter())

        def finished(request: Request) -> None:
            feed.finish(request)
            on_finish(request)

        while not stop_requested():
            if not self._run(feed.up_to(self.capacity), finished, stop_requested, stats):
                self._shrink()
                feed.take_back()
            elif feed.next_positions > self.capacity:
                self._engine, self.capacity = None, max(feed.next_positions, self.capacity * 5 // 4)
            else:
                break
        stats.duration_s = time.perf_counter() - stats.begin_s
        return stats

    def _run(
        self, requests: Iterable[Request], on_finish: Callable[[Request], None], stop_requested: Callable[[], bool], stats: PassStats
    ) -> bool:
        """False if memory ran out. The exception, and with it the tensors of its frames, is gone when this returns."""
        try:
            self._engine = self._engine or self._new_engine()
            self._engine.run(requests, on_finish, stop_requested=stop_requested, stats=stats)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            return False
        return True

    def _shrink(self) -> None:
        if self.num_slots == 1:
            raise UnavailableError("out of memory with one request at once", fix="give a smaller --max_len or --prefill_tokens")
        self.num_slots = (self.num_slots + 1) // 2
        print(f"out of memory: going on with {self.num_slots} requests at once", file=sys.stderr)
        self._engine = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _new_engine(self) -> Engine:
        model = self._model
        runner: Runner
        if isinstance(model, HfModel):
            runner = model.runner(num_slots=self.num_slots, capacity=self.capacity)
        else:
            slot_bytes = self.capacity * model.spec.kv_elements_per_token * model.decoder.embedding.element_size()
            free = free_bytes(model.decoder.device)
            fitting = int(KV_SHARE * (free - self._bank_bytes)) // slot_bytes
            if fitting < 1 and self._bank:
                what = f"{len(self._bank)} adapters take {self._bank_bytes / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
                raise UnavailableError(what, where="--adapters", fix="give fewer, or one at a time with --adapter_dir")
            if fitting < self.num_slots:
                self.num_slots = max(1, fitting)
                print(f"the KV cache of that many requests does not fit in memory: {self.num_slots} at once", file=sys.stderr)
            runner = make_runner(
                model,
                num_slots=self.num_slots,
                capacity=self.capacity,
                max_tokens=self._config.prefill_tokens + self.num_slots,
                quantize=self._config.quantize,
                adapters=self._bank,
            )
        return Engine(
            runner,
            self._tokenizer,
            self._eos_ids,
            max_running=self.num_slots,
            prefill_tokens=self._config.prefill_tokens,
            order=self._order,
            speculate=self._config.speculate,
        )
