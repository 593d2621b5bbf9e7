"""What an evaluation leaves in its folder, read back."""

from __future__ import annotations

from pathlib import Path

from lorabatch.errors import DataError
from lorabatch.records import read_json, read_jsonl
from lorabatch.schema import Fields, Record

ITEMS, RESULT = "items.jsonl", "eval.json"


def read_items(folder: Path) -> dict[str, dict[str, dict[str, Fields]]]:
    """Task -> model -> id -> line of items.jsonl, in its order."""
    found: dict[str, dict[str, dict[str, Fields]]] = {}
    for line in read_jsonl(folder / ITEMS):
        models = found.setdefault(line["task"], {})
        models.setdefault(line["model"], {})[line["id"]] = line
    return found


def read_result(folder: Path) -> Record:
    """eval.json. DataError where the evaluation has not ended."""
    if not (folder / RESULT).exists():
        raise DataError(
            "this evaluation has not ended", where=folder, fix="run it again with --resume"
        )
    return read_json(folder / RESULT)
