"""Progress for people: a tqdm bar on a terminal, a plain line now and then in a log; and where the time of a start went."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

LOG_EVERY_S = 10.0


class Progress:
    """Counts ``total`` things called ``unit``; ``update`` may bring figures that are shown beside the count."""

    def __init__(self, total: int, *, unit: str, description: str, done: int = 0) -> None:
        self._total, self._unit, self._description, self._done = total, unit, description, done
        self._first = done
        self._start = self._last_line = time.perf_counter()
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit=unit, desc=description, initial=done, dynamic_ncols=True)

    @property
    def left(self) -> int:
        return self._total - self._done

    def update(self, count: int = 1, **figures: str) -> None:
        self._done += count
        if self._bar is not None:
            self._bar.set_postfix(figures, refresh=False)
            self._bar.update(count)
        elif time.perf_counter() - self._last_line >= LOG_EVERY_S:
            self._line(figures)

    def _line(self, figures: Mapping[str, str]) -> None:
        self._last_line = time.perf_counter()
        done_here = self._done - self._first
        left_s = (self._last_line - self._start) / max(1, done_here) * self.left
        shown = "".join(f"  {name} {value}" for name, value in figures.items())
        print(f"{self._description}: {self._done}/{self._total} {self._unit}s{shown}  left {clock(left_s)}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """A line that does not break the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class Phases:
    """Seconds of each phase; a phase is what passed since the last one ended."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def begin(self) -> None:
        """What passed since the last phase belongs to none."""
        self._last = time.perf_counter()

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = self.seconds.get(name, 0.0) + now - self._last, now


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
