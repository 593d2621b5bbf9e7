"""Names for parts of a run's time. They cost next to nothing until ``lorabatch profile``
listens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import ParamSpec, Protocol, TypeVar

Params = ParamSpec("Params")
Result = TypeVar("Result")


class Recorder(Protocol):
    def span(self, name: str) -> AbstractContextManager[None]:
        """A phase of the run; phases nest."""

    def operation(self, name: str) -> AbstractContextManager[None]:
        """A call of a kernel inside a phase."""

    def add(self, operation: str, seconds: float) -> None:
        """Seconds that a kernel measured itself."""


_NOTHING = nullcontext()
_recorder: Recorder | None = None


def span(name: str) -> AbstractContextManager[None]:
    return _NOTHING if _recorder is None else _recorder.span(name)


def spanned(name: str) -> Callable[[Callable[Params, Result]], Callable[Params, Result]]:
    """Every call of the decorated function is a span of that name."""

    def decorate(function: Callable[Params, Result]) -> Callable[Params, Result]:
        @functools.wraps(function)
        def run(*values: Params.args, **named: Params.kwargs) -> Result:
            with span(name):
                return function(*values, **named)

        return run

    return decorate


def operation(name: str) -> AbstractContextManager[None]:
    return _NOTHING if _recorder is None else _recorder.operation(name)


def recorder() -> Recorder | None:
    """Who listens; None in every command but ``lorabatch profile``."""
    return _recorder


@contextmanager
def recording(listener: Recorder) -> Iterator[None]:
    """Spans reach ``listener`` meanwhile."""
    global _recorder
    _recorder = listener
    try:
        yield
    finally:
        _recorder = None
