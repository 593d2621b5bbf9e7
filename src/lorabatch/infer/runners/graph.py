"""The eager runner with recorded steps: where slots read a single token, one replay of a CUDA
graph takes the place of a thousand launches, and several follow one another before the host looks.
All other steps are the eager runner's, over the same cache: prompts, guesses, constraints.

Recorded once for each kind of step and number of rows in BUCKETS that is needed; the first tokens
of each graph are compared with the eager runner's. Never run on a GPU so far: the tests replay
recorded operators on the CPU, where Python is as frozen as in a graph.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from lorabatch.infer.requests import Request
from lorabatch.infer.runners.eager import NativeRunner
from lorabatch.infer.runners.graph_rows import fill, is_recordable, kind_of, read, tokens_left
from lorabatch.infer.runners.graph_step import MOST_STEPS, Kind, Rows, decode_step
from lorabatch.machine.device import out_of_memory
from lorabatch.model.attention import Segment
from lorabatch.model.functional import likeliest_ids
from lorabatch.model.lora import LoraWeights
from lorabatch.model.native import NativeModel
from lorabatch.progress import counted
from lorabatch.spans import span

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
FEW_STEPS = 4  # at least so many follow one another, although a row ends before (not measured)
NEAR = 0.02  # of the largest logit: in half precision, nearer tokens change places with a shape
WARM_UP = 2  # runs before a step is recorded: libraries load, workspaces are made


class StepGraph(Protocol):
    """A recorded step."""

    def replay(self) -> None:
        """Do again what was recorded, on the same memory."""


class CudaGraph:
    """What cannot run without a GPU. The graphs of a process share their memory."""

    pool: Any = None

    def __init__(self, step: Callable[[], None]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                step()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        # a call of another thread, such as the sampler's, must not break the recording
        with torch.cuda.graph(self._graph, pool=CudaGraph.pool, capture_error_mode="thread_local"):
            step()
        CudaGraph.pool = CudaGraph.pool or self._graph.pool()

    def replay(self) -> None:
        self._graph.replay()


class GraphRunner(NativeRunner):
    apart = True

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
        self._rows: dict[Kind, Rows] = {}  # memory for all slots
        self._graphs: dict[tuple[int, Kind], StepGraph] = {}
        self._proven: set[StepGraph] = set()  # whose first tokens were the eager runner's
        self._vocab_size, self._possible = model.spec.vocab_size, True
        self._most = bucket(num_slots, num_slots)  # rows that one recorded step takes

    def step(self, segments: Sequence[Segment], requests: Sequence[Request]) -> list[list[int]]:
        """As ``Runner.step``; where nobody reads a prompt, several tokens of those whose steps are
        recorded."""
        reading = any(map(reads_prompt, segments, requests))
        recordable = list(map(is_recordable, segments, requests))
        if not self._possible or reading or not any(recordable):
            return super().step(segments, requests)
        return self._apart(segments, requests, recordable)

    def _apart(
        self, segments: Sequence[Segment], requests: Sequence[Request], recordable: Sequence[bool]
    ) -> list[list[int]]:
        """All segments want tokens."""
        chosen: dict[int, list[int]] = {}
        for way, run in ((True, self._burst), (False, super().step)):
            places = [i for i, can in enumerate(recordable) if can == way]
            if places:
                some = run([segments[i] for i in places], [requests[i] for i in places])
                chosen |= zip(places, some, strict=True)
        return [chosen[i] for i in range(len(segments))]

    def _burst(self, segments: Sequence[Segment], requests: Sequence[Request]) -> list[list[int]]:
        """In parts, where memory does not suffice for all rows at once. Nothing is lost: what a
        step wrote into the cache the next one writes again."""
        chosen: list[list[int]] = []
        while len(chosen) < len(segments):
            part = slice(len(chosen), len(chosen) + self._most)
            tokens = self._try(segments[part], requests[part])
            if tokens is None:
                self._shrink()
            else:
                chosen += tokens
        return chosen

    def _try(
        self, segments: Sequence[Segment], requests: Sequence[Request]
    ) -> list[list[int]] | None:
        """None if memory ran out. The exception, and with it the tensors of its frames, is gone
        when this returns."""
        try:
            return self._visit(segments, requests)
        except RuntimeError as error:
            if not self._possible or not out_of_memory(error):
                raise
        for request in requests:
            del request.logprobs[len(request.output_ids) :]
        return None

    def _shrink(self) -> None:
        """All memory of recorded steps is given back."""
        self._graphs, self._rows, self._proven, CudaGraph.pool = {}, {}, set(), None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._most = max((size for size in BUCKETS if size < self._most), default=0)
        if self._most:
            rows = counted(self._most, "row")
            print(f"out of memory: recorded steps take at most {rows} at once", file=sys.stderr)
        else:
            self._most = 1
            self._refuse("no memory for a recorded step of one row")

    @torch.inference_mode()
    def _visit(self, segments: Sequence[Segment], requests: Sequence[Request]) -> list[list[int]]:
        """The tokens of several recorded steps; of one of the eager runner where they could not be
        recorded."""
        graph = None
        if self._possible:
            rows = self._memory(kind_of(requests)).first(self._count(len(segments)))
            graph = self._graph(rows)
        if graph is None:
            return super().step(segments, requests)
        fill(rows, segments, requests, self.cache.capacity, self._nobody)
        guesses = any(request.lookup for request in requests)  # again after each token
        steps = 1 if guesses else steps_of_a_visit([tokens_left(request) for request in requests])
        with span("decode"):
            for _ in range(steps):
                graph.replay()
            chosen = read(rows, requests, steps)
        if graph in self._proven or self._compared(segments, requests, chosen):
            self._proven.add(graph)
            return chosen
        self._refuse("recorded steps chose other tokens than the same steps run as before")
        for request in requests:
            del request.logprobs[len(request.output_ids) :]
        return super().step(segments, requests)

    def _count(self, asked: int) -> int:
        """Rows of the step that takes so many."""
        return bucket(asked, self._most)

    def _compared(
        self, segments: Sequence[Segment], requests: Sequence[Request], chosen: list[list[int]]
    ) -> bool:
        """Whether the eager runner chooses the same tokens, step by step, or others that are as
        likely: nobody has seen these graphs on every GPU. Tokens that are drawn are not compared:
        the last bit of a sum may decide."""
        for at in range(max(map(len, chosen))):
            places = [i for i, r in enumerate(requests) if r.likeliest and at < len(chosen[i])]
            step = [
                replace(s, start=s.start + at, token_ids=chosen[i][at - 1 : at] or s.token_ids)
                for i, s in ((i, segments[i]) for i in places)
            ]
            if step and not self._agrees(step, [chosen[i][at] for i in places]):
                return False
        return True

    def _agrees(self, step: Sequence[Segment], tokens: Sequence[int]) -> bool:
        logits = self.logits(self.forward(step)).float()
        expected, ours = likeliest_ids(logits), torch.tensor(tokens, device=logits.device)
        most = logits.amax(dim=-1, keepdim=True)
        lost = most - logits.gather(1, ours.clamp(0, logits.shape[1] - 1)[:, None])
        near = (lost <= NEAR * most.abs()).squeeze(1) & (ours >= 0)
        return bool(((expected == ours) | near).all())

    def _refuse(self, why: str) -> None:
        self._possible = False
        print(f"steps are not recorded here, and are slower ({why})", file=sys.stderr)

    def _memory(self, kind: Kind) -> Rows:
        if kind not in self._rows:
            self._rows[kind] = Rows.on(
                self._decoder.device,
                kind,
                count=self._most,
                vocabulary=self._vocab_size,
                seen=self.cache.capacity,
            )
        return self._rows[kind]

    def _graph(self, rows: Rows) -> StepGraph | None:
        """Recorded on rows that are nobody's. None, and one line, if torch refuses; want of memory
        is raised."""
        key = (len(rows.numbers), rows.kind)
        if key not in self._graphs:
            fill(rows, (), (), self.cache.capacity, self._nobody)
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


def bucket(count: int, most: int) -> int:
    """How many rows are recorded for a step of ``count``; ``most``: slots there are."""
    return next((size for size in BUCKETS if size >= count), most)


def steps_of_a_visit(left: Sequence[int]) -> int:
    """How many follow one another where the requests may get so many more tokens: until the first
    has all, but not too few."""
    return min(max(min(left), FEW_STEPS), MOST_STEPS, max(left))


def reads_prompt(segment: Segment, request: Request) -> bool:
    return segment.start < len(request.token_ids)
