"""The eager runner with recorded steps: where every slot reads a single token, one replay of a CUDA
graph takes the place of a thousand launches. All other steps are the eager runner's, over the same
cache: prompts, guesses, penalties, log-probabilities.

Recorded once for each number of rows in BUCKETS that a step needs; the first tokens of each graph
are compared with the eager runner's. Never run on a GPU so far: the tests replay recorded operators
on the CPU, where Python is as frozen as in a graph.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from lorabatch.infer.requests import Request
from lorabatch.infer.runners.eager import NativeRunner
from lorabatch.infer.runners.graph_step import CANDIDATES, Rows, decode_step
from lorabatch.infer.sampling import sample, uniform
from lorabatch.machine.device import out_of_memory
from lorabatch.model.attention import Segment
from lorabatch.model.lora import LoraWeights
from lorabatch.model.native import NativeModel
from lorabatch.model.varlen import host_tensor
from lorabatch.spans import span

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
WARM_UP = 2  # runs before a step is recorded: libraries load, workspaces are made


class StepGraph(Protocol):
    """A recorded step."""

    def replay(self) -> None:
        """Do again what was recorded, on the same memory."""


class CudaGraph:
    """What cannot run without a GPU. The graphs of a process share their memory."""

    _pool: Any = None

    def __init__(self, step: Callable[[], None]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                step()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # a call of another thread, such as the sampler's, must not break the recording
        with torch.cuda.graph(self._graph, pool=CudaGraph._pool, capture_error_mode="thread_local"):
            step()
        CudaGraph._pool = CudaGraph._pool or self._graph.pool()

    def replay(self) -> None:
        self._graph.replay()


class GraphRunner(NativeRunner):
    def __init__(
        self,
        model: NativeModel,
        *,
        num_slots: int,
        capacity: int,
        adapters: Sequence[LoraWeights] = (),
        record: Callable[[Callable[[], None]], StepGraph] = CudaGraph,
    ) -> None:
        """One slot more than asked for: rows that fill up a bucket write there."""
        super().__init__(
            model, num_slots=num_slots + 1, capacity=capacity, adapters=adapters, one_call=True
        )
        self._nobody, self._record = num_slots, record
        self._rows: dict[bool, Rows] = {}  # whether rows are sampled -> memory for all slots
        self._graphs: dict[tuple[int, bool], StepGraph] = {}
        self._proven: list[StepGraph] = []  # whose first tokens were the eager runner's
        self._vocab_size, self._possible = model.spec.vocab_size, True

    def step(self, segments: Sequence[Segment], requests: Sequence[Request]) -> list[list[int]]:
        """As ``Runner.step``."""
        if self._possible and all(map(_is_recordable, segments, requests)):
            with span("decode"):
                chosen = self._replayed(segments, requests)
            if chosen is not None:
                return [[token] for token in chosen]
        return super().step(segments, requests)

    @torch.inference_mode()
    def _replayed(
        self, segments: Sequence[Segment], requests: Sequence[Request]
    ) -> list[int] | None:
        """The tokens of a recorded step; None where it could not be recorded."""
        sampled = not all(request.likeliest for request in requests)
        count = _bucket(len(segments), self._nobody)
        rows = self._memory(sampled).first(count, sampled=sampled)
        self._fill(rows, segments, requests if sampled else ())
        graph = self._graph(rows, sampled)
        if graph is None:
            return None
        graph.replay()
        chosen = _read(rows, requests)
        return (
            chosen if graph in self._proven else self._compared(graph, chosen, segments, requests)
        )

    def _compared(
        self,
        graph: StepGraph,
        chosen: list[int],
        segments: Sequence[Segment],
        requests: Sequence[Request],
    ) -> list[int]:
        """The first tokens of a new graph, or those of the same step run as before, and one line,
        where they differ: nobody has seen these graphs on every GPU. Tokens that are drawn are not
        compared: the last bit of a sum may decide."""
        self._proven.append(graph)
        expected = [token for (token,) in super().step(segments, requests)]
        rows = zip(chosen, expected, requests, strict=True)
        if all(ours == theirs for ours, theirs, request in rows if request.likeliest):
            return chosen
        self._refuse("a recorded step chose other tokens than the same step run as before")
        return expected

    def _refuse(self, why: str) -> None:
        self._possible = False
        print(f"steps are not recorded here, and are slower ({why})", file=sys.stderr)

    def _memory(self, sampled: bool) -> Rows:
        if sampled not in self._rows:
            most, vocabulary = _bucket(self._nobody, self._nobody), self._vocab_size
            self._rows[sampled] = Rows.on(
                self._decoder.device, count=most, vocabulary=vocabulary if sampled else 0
            )
        return self._rows[sampled]

    def _fill(self, rows: Rows, segments: Sequence[Segment], sampled: Sequence[Request]) -> None:
        """Two copies from the host, or one; nobody waits for them."""
        empty, device = len(rows.numbers) - len(segments), self._decoder.device
        nobody = Segment(self._nobody, 0, [0])
        numbers = host_tensor(self._numbers([*segments, *[nobody] * empty]), device, torch.long)
        rows.numbers.view(-1).copy_(numbers, non_blocking=True)
        if sampled:
            values = [n for r in sampled for n in _settings(r)] + [0.0] * (5 * empty)
            settings = host_tensor(values, device, torch.float64)
            rows.settings.view(-1).copy_(settings, non_blocking=True)

    def _numbers(self, segments: Sequence[Segment]) -> list[int]:
        """``Rows.numbers`` of single tokens, one row after the other."""
        capacity = self.cache.capacity
        rows = ((s.token_ids[0], s.start, s.slot * capacity + s.start, s.adapter) for s in segments)
        return [number for row in rows for number in row]

    def _graph(self, rows: Rows, sampled: bool) -> StepGraph | None:
        """None, and one line, if torch refuses; want of memory is raised."""
        key = (len(rows.numbers), sampled)
        if key not in self._graphs:
            try:
                self._graphs[key] = self._record(
                    lambda: decode_step(self._decoder, self.cache, rows, self._groups)
                )
            except RuntimeError as error:
                if out_of_memory(error):
                    raise
                self._refuse(str(error).splitlines()[0][:160])
                return None
        return self._graphs[key]


def _read(rows: Rows, requests: Sequence[Request]) -> list[int]:
    """The chosen tokens; those that are not settled are chosen here."""
    chosen, settled = rows.chosen[: len(requests)].t().tolist()  # the step's only wait
    if rows.logits is not None:
        for i in (i for i, good in enumerate(settled) if not good):
            chosen[i : i + 1] = sample(rows.logits[i : i + 1], requests[i : i + 1])
    return list(chosen)


def _bucket(count: int, most: int) -> int:
    """How many rows are recorded for a step of ``count``; ``most``: slots there are."""
    return next((size for size in BUCKETS if size >= count), most)


def _is_recordable(segment: Segment, request: Request) -> bool:
    """A single token, whose next one is the likeliest or drawn without a look at other tokens."""
    if len(segment.token_ids) != 1 or segment.num_logits != 1:
        return False
    params = request.params
    special = params.greedy or params.penalised or params.logprobs is not None
    return request.likeliest or not (special or request.must_continue or params.top_k > CANDIDATES)


def _settings(request: Request) -> tuple[float, ...]:
    """A row of ``Rows.settings``."""
    params = request.params
    draw = uniform(params.seed, len(request.output_ids), request.sample)
    temperature = 0.0 if request.likeliest else params.temperature
    return temperature, params.top_k, params.top_p, params.min_p, draw
