"""The two helpers of the course's original project: a timer and ``batchify``. The package does not
need them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


@contextmanager
def timer(label: str) -> Iterator[None]:
    """Print how many seconds the block took: ``with timer("load"): ...``."""
    start = time.perf_counter()
    try:
        yield
    finally:
        print(f"{label}: {time.perf_counter() - start:.3f} s")


def batchify(items: Sequence[Item], batch_size: int) -> Iterator[Sequence[Item]]:
    """Consecutive slices of ``batch_size`` items; the last one may be shorter. ValueError below
    1."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    for start in range(0, len(items), batch_size):
        yield items[start : start + batch_size]
