"""What the steps of one pass over the requests cost."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from lorabatch.infer.scheduler import Batch
from lorabatch.model.attention import Segment


@dataclass
class PassStats:
    """Seconds and counts; ``gaps_s``: every gap between two tokens of a request.

    A step that reads any prompt counts as prefill, with the tokens that decode along in it; decode
    figures are of the others.
    """

    begin_s: float = 0.0  # on the clock of ``perf_counter``
    duration_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    prefill_steps: int = 0
    decode_steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    decode_kv_tokens: int = 0  # cached tokens read by all decode steps together
    decode_adapters: int = 0  # unmerged adapters read by all decode steps together
    waiting_steps: int = 0  # while requests waited for a slot
    waiting_slots: float = 0.0  # share of the slots in use, summed over these steps
    # that or the share of the step's prompt budget in use, whichever is larger
    waiting_fill: float = 0.0
    shared_tokens: int = 0  # prompt tokens that were taken over from another request's slot
    guessed_tokens: int = 0  # read ahead by speculation
    accepted_tokens: int = 0  # of these, right
    gaps_s: array[float] = field(default_factory=lambda: array("d"))

    def count_step(
        self,
        batch: Batch,
        segments: Sequence[Segment],
        tokens: Sequence[Sequence[int]],
        seconds: float,
    ) -> None:
        """tokens: that the step yielded, by segment."""
        self.shared_tokens += sum(copy.length for copy in batch.copies)
        if batch.prompt_tokens:
            self.prefill_s += seconds
            self.prefill_steps += 1
            self.prefill_tokens += batch.prompt_tokens
        else:
            steps, read = self._steps(segments, tokens)
            self.decode_s += seconds
            self.decode_steps += steps
            self.decode_tokens += sum(map(len, tokens))
            self.decode_kv_tokens += read
            self.decode_adapters += steps * len({segment.adapter for segment in segments} - {-1})

    @staticmethod
    def _steps(segments: Sequence[Segment], tokens: Sequence[Sequence[int]]) -> tuple[int, int]:
        """(steps of the model, cached tokens that they read): tokens beyond those that a segment
        asked for are steps of their own."""
        if max(map(len, tokens), default=0) <= 1:
            return 1, sum(segment.start for segment in segments)
        more = [max(0, len(t) - s.num_logits) for s, t in zip(segments, tokens, strict=True)]
        read = (s.start * (1 + n) + n * (n + 1) // 2 for s, n in zip(segments, more, strict=True))
        return 1 + max(more), sum(read)

    def count_waiting(
        self, batch: Batch, *, running: int, max_running: int, prefill_tokens: int
    ) -> None:
        """How full a step is while requests wait: what is left free then is lost."""
        slots = running / max_running
        self.waiting_steps += 1
        self.waiting_slots += slots
        self.waiting_fill += max(slots, min(batch.prompt_tokens / prefill_tokens, 1.0))
