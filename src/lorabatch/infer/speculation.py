"""Guesses at the next tokens from the sequence itself: what followed its last two tokens the time
before.

Source: prompt lookup decoding (Saxena, 2023), after "Inference with reference" (arXiv 2304.04487).
The model reads the guess in one step and keeps what it would have said anyway, so results are the
same.
"""

from __future__ import annotations

from collections.abc import Sequence


class Lookup:
    """Where each pair of neighbouring tokens of one growing sequence occurred last."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, int], int] = {}  # pair -> place behind it
        self._seen = 1  # pairs that end before this place are entered

    def guess(self, prompt: Sequence[int], output: Sequence[int], count: int) -> list[int]:
        """At most ``count`` tokens that may follow; empty if the newest pair is new. The work is
        that of the new tokens only."""
        total, split = len(prompt) + len(output), len(prompt)

        def at(place: int) -> int:
            return prompt[place] if place < split else output[place - split]

        for place in range(self._seen, total - 1):
            self._after[at(place - 1), at(place)] = place + 1
        self._seen = max(self._seen, total - 1)
        found = self._after.get((at(total - 2), at(total - 1)), total) if total > 1 else total
        return [at(place) for place in range(found, min(found + count, total))]
