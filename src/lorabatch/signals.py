"""SIGTERM, SIGUSR1 and SIGINT as a flag that loops look at between steps."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class StopSignals:
    """While entered, a first signal asks the work to stop after its step; a second SIGINT stops it at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._earlier: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.received is not None

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            self._earlier[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
