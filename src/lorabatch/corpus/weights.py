"""Several training files, each with its weight in an epoch: ``PATH`` or ``PATH:WEIGHT``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lorabatch.errors import UsageError

MOST_WEIGHT = 1000


def weighted_paths(entries: Sequence[str]) -> list[tuple[str, float]]:
    """``PATH`` or ``PATH:WEIGHT`` each. UsageError for weights that are none, or are all 0."""
    found = [_weighted(entry) for entry in entries]
    if not any(weight for _, weight in found):
        raise UsageError(
            "all weights are 0", where="--train_path", fix="give one file a weight above 0"
        )
    return found


def _weighted(entry: str) -> tuple[str, float]:
    path, colon, text = entry.rpartition(":")
    if not colon or Path(entry).exists() or "/" in text:
        return entry, 1.0
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0 <= weight <= MOST_WEIGHT:
        raise UsageError(
            f"the weight '{text}' is not a number from 0 to {MOST_WEIGHT}",
            where=f"--train_path {entry}",
            fix=f"write {path}:0.5",
        )
    return path, weight
