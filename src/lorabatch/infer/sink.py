"""``completions.jsonl``: what earlier runs finished, whether it is still as we left it, and the
order of what this one wrote.

Ids, keys and places are held as 64-bit numbers, never as records, so that 100,000 completions take
a few megabytes.
"""

from __future__ import annotations

import json
import os
import re
import sys
import zlib
from array import array
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from itertools import compress, groupby, islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from lorabatch.errors import DataError, LorabatchError, UsageError
from lorabatch.infer import openai_batch
from lorabatch.infer.prompts import PromptFile, id_digest
from lorabatch.infer.requests import NOT_FINITE
from lorabatch.records import JsonlWriter, read_jsonl, replacing
from lorabatch.schema import Fields, Record, dumps, sealed

# what a record says: the second without any text, the last for want of numbers
MOST_REASONS = 1000  # that are told apart; their numbers are left out
COMPLETED, EMPTY, FAILED, NOT_FINITE_FAILED = range(4)


def outcome(record: Fields) -> int:
    if record["error"] is None:
        return COMPLETED if record["text"].strip() else EMPTY
    return NOT_FINITE_FAILED if record["error"].startswith(NOT_FINITE) else FAILED


@dataclass
class Tally:
    """What the file holds. ``done``: 1 at the position of each finished request; ``numbers``: of
    records, by outcome."""

    done: bytearray
    numbers: list[int] = field(default_factory=lambda: [0] * 4)
    reasons: Counter[str] = field(default_factory=Counter)  # why, of FAILED in this process

    def add(self, record: Fields) -> None:
        self.numbers[outcome(record)] += 1
        if outcome(record) == FAILED and len(self.reasons) < MOST_REASONS:
            self.reasons[re.sub(r"\d+", "N", record["error"])] += 1

    @property
    def completed(self) -> int:
        return self.numbers[COMPLETED] + self.empty

    @property
    def empty(self) -> int:
        return self.numbers[EMPTY]

    @property
    def failed(self) -> int:
        return self.numbers[FAILED] + self.not_finite

    @property
    def not_finite(self) -> int:
        return self.numbers[NOT_FINITE_FAILED]

    def counts(self) -> dict[str, int]:
        """Of what deserves a look."""
        return {"failed": self.failed, "not_finite": self.not_finite, "empty": self.empty}

    def warn(self) -> None:
        """What failed, and a model that says nothing or nothing that is a number, is not passed
        over in silence."""
        for reason, count in self.reasons.most_common(1):
            failed = self.numbers[FAILED]
            text = f"{failed} requests failed; most often ({count} times): {reason}"
            print(f"warning: {text}", file=sys.stderr)
        if self.not_finite:
            print(
                f"warning: {self.not_finite} of {len(self.done)} requests failed: {NOT_FINITE} "
                "(NaN or infinity)",
                file=sys.stderr,
            )
        if self.empty and self.empty == self.completed:
            print(
                f"warning: all {self.empty} completions are empty texts; check the model, the "
                "adapter and --stop",
                file=sys.stderr,
            )

    def refuse_failures(self, path: Path) -> None:
        """For --fail_on_error. path: of the completions."""
        if self.failed:
            raise DataError(
                f"{self.failed} requests failed, {self.completed} completed (--fail_on_error)",
                where=path,
                fix="see the 'error' of their lines; --retry_failed tries them again",
            )


def finished_earlier(
    path: Path, prompts: PromptFile, work_key: str, *, retry_failed: bool = False
) -> Tally:
    """What is finished; of completions that are there twice one stays, of failed ones none if they
    are to be tried again.

    UsageError if ``path`` holds other work's completions, DataError if it holds what is none.
    """
    tally = Tally(bytearray(len(prompts)))
    positions, outcomes = _read(path, prompts, work_key)
    if not len(positions):
        return tally
    kept = _best(positions, outcomes)
    if twice := len(kept) - int(kept.sum()):
        print(f"{path}: {twice} completions were there twice: one of each is kept", file=sys.stderr)
    if retry_failed:
        kept &= outcomes < FAILED
    np.frombuffer(tally.done, dtype=np.uint8)[positions[kept]] = 1
    tally.numbers = np.bincount(outcomes[kept], minlength=4).tolist()
    if not kept.all():
        _keep_only(path, kept)
    return tally


def _keep_only(path: Path, kept: NDArray[np.bool_]) -> None:
    with replacing(path) as file:
        file.writelines(sealed(record) + b"\n" for record in compress(read_jsonl(path), kept))


def _read(
    path: Path, prompts: PromptFile, work_key: str
) -> tuple[NDArray[np.int64], NDArray[np.int8]]:
    """(position of its request, outcome) of every record. UsageError for one of other work."""
    ids, keys, outcomes = array("Q"), array("Q"), array("b")
    for record in read_jsonl(path):
        ids.append(id_digest(record["id"], record["sample"]))
        keys.append(int(record["key"], 16))
        outcomes.append(outcome(record))
    if not ids:
        return np.empty(0, np.int64), np.empty(0, np.int8)
    digests = prompts.id_digests
    expected = np.fromiter((int(r.key(work_key), 16) for r in prompts), np.uint64, len(prompts))
    order = np.argsort(digests)
    positions = order[np.searchsorted(digests[order], np.asarray(ids)).clip(max=len(digests) - 1)]
    wrong = np.flatnonzero((digests[positions] != ids) | (expected[positions] != keys))
    if len(wrong):
        record = next(islice(read_jsonl(path), int(wrong[0]), None))
        raise UsageError(
            f"completion '{record['id']}' was made with another prompt, parameters, model or "
            "adapter",
            where=path,
            fix="choose another --output_dir, or --overwrite",
        )
    return positions, np.asarray(outcomes)


def _best(positions: NDArray[np.int64], outcomes: NDArray[np.int8]) -> NDArray[np.bool_]:
    """Of each request the first record without an error, or else the first."""
    by_worth = np.lexsort((outcomes >= FAILED, positions))
    best = np.zeros(len(positions), dtype=np.bool_)
    best[by_worth[np.diff(positions[by_worth], prepend=-1) != 0]] = True
    return best


class Completions:
    """The file while it is written. Before each line, and at the end, it must be what was written
    before.

    LorabatchError (70) if another program changed, replaced or removed it: what that one left is
    not a result.
    """

    def __init__(self, writer: JsonlWriter) -> None:
        self._writer, self._path = writer, writer.path
        with self._path.open("rb") as file:
            self._checksum, known = _checksum(file), os.fstat(file.fileno())
        self._state = (known.st_dev, known.st_ino, known.st_size)

    def write(self, record: Fields) -> None:
        self._check(self._seen() == self._state)
        line = self._writer.write(record)
        self._checksum = zlib.crc32(line, self._checksum)
        self._state = (*self._state[:2], self._state[2] + len(line))

    def __enter__(self) -> Completions:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Read the whole file once more: a change may leave its size as it was."""
        if kind is None:
            self._check(self._seen() == self._state)
            with self._path.open("rb") as file:
                self._check(_checksum(file) == self._checksum)

    def _seen(self) -> tuple[int, int, int] | None:
        try:
            now = self._path.stat()
        except OSError:
            return None
        return now.st_dev, now.st_ino, now.st_size

    def _check(self, same: bool) -> None:
        if not same:
            fix = (
                "keep other programs away from it and restart with --overwrite, or restore it "
                "and continue with --resume"
            )
            raise LorabatchError(
                "changed, replaced or removed during the run", where=self._path, fix=fix
            )


def _checksum(file: BinaryIO) -> int:
    checksum = 0
    while block := file.read(1 << 20):
        checksum = zlib.crc32(block, checksum)
    return checksum


def lines_in_input_order(path: Path) -> Iterator[bytes]:
    """The lines sorted by their place in the input; 16 bytes a line are held, the texts stay on
    disk."""
    places, starts = array("q"), array("q", [0])
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                record = json.loads(line)
                places.append(record["index"] << 20 | record["sample"])
                starts.append(starts[-1] + len(line))
        for number in np.argsort(places, kind="stable").tolist():
            file.seek(starts[number])
            yield file.readline()


def write_openai_file(
    path: Path, completions: Path, *, model: str, created: int, adapters: Container[str] = ()
) -> None:
    """One line of OpenAI's batch output per prompt, in input order."""
    records: Iterator[Record] = map(json.loads, lines_in_input_order(completions))
    with replacing(path) as file:
        for _, samples in groupby(records, key=lambda r: r["index"]):
            file.write(
                dumps(
                    openai_batch.output_line(
                        list(samples), model=model, created=created, adapters=adapters
                    )
                ).encode()
                + b"\n"
            )
