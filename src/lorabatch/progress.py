"""Progress for people: a tqdm bar on a terminal, a plain line now and then in a log; and where the
time of a start went."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

LOG_EVERY_S = 10.0
USUAL_COLUMNS = 80
_shown: list[tqdm] = []  # on the terminal now


class Progress:
    """Counts ``total`` things called ``unit``; ``update`` may bring figures that are shown beside
    the count. A bar begins with the first of them, below what was printed before."""

    def __init__(self, total: int, *, unit: str, description: str, done: int = 0) -> None:
        self._total, self._unit, self._description, self._done = total, unit, description, done
        self._first = done
        self._start = self._last_line = time.perf_counter()
        self._bar: tqdm | None = None
        self._on_terminal = sys.stderr.isatty()

    @property
    def left(self) -> int:
        return self._total - self._done

    def update(self, count: int = 1, **figures: str) -> None:
        if self._bar is None and self._on_terminal:
            self._bar = self._begin()
        self._done += count
        if self._bar is not None:
            self._bar.set_postfix(figures, refresh=False)
            self._bar.update(count)
        elif time.perf_counter() - self._last_line >= LOG_EVERY_S:
            self._line(figures)

    def _begin(self) -> tqdm:
        from tqdm import tqdm

        # some terminals do not know their width (0), where a bar would have no room
        known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
        bar = tqdm(
            total=self._total,
            unit=self._unit,
            desc=self._description,
            initial=self._done,
            ncols=None if known else USUAL_COLUMNS,
            dynamic_ncols=known,
        )
        earlier_s = time.perf_counter() - self._start  # the work began before the bar
        bar.start_t, bar.last_print_t = bar.start_t - earlier_s, bar.last_print_t - earlier_s
        _shown.append(bar)
        return bar

    def _line(self, figures: Mapping[str, str]) -> None:
        self._last_line = time.perf_counter()
        done_here = self._done - self._first
        left_s = (self._last_line - self._start) / max(1, done_here) * self.left
        shown = "".join(f"  {name} {value}" for name, value in figures.items())
        print(
            f"{self._description}: {self._done}/{self._total} {self._unit}s{shown}  left "
            f"{clock(left_s)}",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            _shown.remove(self._bar)
            self._bar = None
            self._on_terminal = False


def note(text: str, file: TextIO | None = None) -> None:
    """A line on standard error, or in ``file``, that breaks no bar."""
    to = sys.stderr if file is None else file
    if _shown:
        _shown[-1].write(text, file=to)
    else:
        print(text, file=to, flush=True)


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


def counted(number: int, noun: str) -> str:
    """``1 adapter``, ``2 adapters``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def rounded(rate: float) -> str:
    """Whole from 10 on; two digits below, so that no small rate is shown as 0."""
    return f"{rate:.2g}" if 0 < rate < 10 else f"{rate:.0f}"


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
