"""``lorabatch split``: a random choice of whole groups, so that no leak is made in the first
place."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from lorabatch.check.duplicates import Groups, Sketches
from lorabatch.check.words import all_words
from lorabatch.config_trust import SplitConfig
from lorabatch.corpus.readers import (
    Document,
    csv_rows,
    has_blocks,
    kind_of_file,
    numbered_lines,
    read_documents,
    read_text,
    text_lines,
)
from lorabatch.errors import DataError, UsageError
from lorabatch.records import replacing, writing
from lorabatch.schema import Record

Write = Callable[[Sequence[int]], bytes]  # some documents, by their numbers, as a file


def run_split(config: SplitConfig, command: list[str]) -> int:
    """Write both files. UsageError if one is there already, DataError if no split is possible."""
    path, folder = Path(config.file), Path(config.output_dir)
    targets = [folder / f"{name}{kind_of_file(path)}" for name in ("train", "val")]
    for target in targets:
        if target.exists():
            raise UsageError("is there already", where=target, fix="choose another --output_dir")
    documents = read_documents(
        path,
        txt_format=config.txt_format,
        text_field=config.text_field,
        group_field=config.group_field,
    )
    groups = whole_groups(documents, config.near_jaccard).members()
    sides = divided(groups, config.val_fraction, config.seed)
    if not all(sides):
        raise _undivided(path, groups, config.val_fraction)
    write = writer_of(path, documents, config.txt_format)
    _write(targets, [write(side) for side in sides])
    for target, side in zip(targets, sides, strict=True):
        print(f"{target}: {len(side):,} documents ({100 * len(side) / len(documents):.1f} %)")
    print(f"{len(groups):,} groups were kept whole, the largest of {max(map(len, groups)):,}")
    return 0


def _undivided(path: Path, groups: Sequence[list[int]], fraction: float) -> DataError:
    total, largest = sum(map(len, groups)), max(map(len, groups))
    return DataError(
        f"{total} documents in {len(groups)} groups, the largest of {largest}: no split leaves "
        f"{100 * fraction:g} % for validation",
        where=path,
        fix="choose another --val_fraction",
    )


def _write(targets: Sequence[Path], contents: Sequence[bytes]) -> None:
    with writing(targets[0].parent, fix="choose another --output_dir"):
        targets[0].parent.mkdir(parents=True, exist_ok=True)
    for target, content in zip(targets, contents, strict=True):
        with replacing(target) as file:
            file.write(content)


def whole_groups(documents: Sequence[Document], near_jaccard: float) -> Groups:
    """What has to stay on one side: documents of one group, and near-equal texts."""
    sketches = Sketches()
    for words in all_words(document.learned for document in documents):
        sketches.add(words)
    groups = sketches.groups(near_jaccard)
    groups.join_equal(document.group for document in documents)
    return groups


def divided(groups: Sequence[list[int]], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """(training, validation) numbers, in order: whole groups at random, as long as they fit into
    the fraction."""
    total = sum(map(len, groups))
    room = max(1, round(fraction * total))
    val: list[int] = []
    for group in random.Random(seed).sample(groups, len(groups)):
        if len(group) <= room:
            val += group
            room -= len(group)
    chosen = set(val)
    return [n for n in range(total) if n not in chosen], sorted(val)


def writer_of(path: Path, documents: Sequence[Document], txt_format: str) -> Write:
    """Rows and lines as they stand in the file."""
    kind = kind_of_file(path)
    if kind == ".jsonl":
        lines = [line for _, line in numbered_lines(path) if line.strip()]
        return lambda side: "".join(f"{lines[n]}\n" for n in side).encode()
    if kind == ".csv":
        rows = [row for _, row in csv_rows(path)]
        return lambda side: _as_csv([rows[n] for n in side])
    if kind == ".parquet":
        return lambda side: _as_parquet(path, side)
    in_lines = txt_format == "line"
    if txt_format == "auto":
        in_lines = not has_blocks(text_lines(read_text(path)))
    return lambda side: _as_text([documents[n].text for n in side], in_lines=in_lines)


def _as_text(texts: Sequence[str], *, in_lines: bool) -> bytes:
    if not in_lines and len(texts) == 1 and "\n" in texts[0]:
        # Without a blank line its lines would be read as documents.
        raise DataError(
            "one of the sides would be a single document", fix="choose another --val_fraction"
        )
    return (("\n" if in_lines else "\n\n").join(texts) + "\n").encode()


def _as_csv(rows: Sequence[Record]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [*rows[0]])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _as_parquet(path: Path, side: Sequence[int]) -> bytes:
    import pyarrow.parquet  # reading it needed it already

    buffer = io.BytesIO()
    table = pyarrow.parquet.read_table(path, partitioning=None)
    pyarrow.parquet.write_table(table.take(list(side)), buffer)
    return buffer.getvalue()
