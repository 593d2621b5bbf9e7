"""What ``lorabatch sweep`` found: a leaderboard, and the runs of its first row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorabatch.errors import DataError
from lorabatch.records import read_json
from lorabatch.report.blocks import Block, Cell, Mono, Paragraph, Section, Table
from lorabatch.report.load import clean
from lorabatch.report.words import Words
from lorabatch.schema import Fields, Record

BOARD = "leaderboard.json"
MAX_ROWS = 30


@dataclass(frozen=True)
class Board:
    label: str
    record: Record

    @property
    def rows(self) -> list[Record]:
        return list(self.record["rows"])


def load_boards(paths: Sequence[Path]) -> tuple[list[Board], list[Path]]:
    """(the leaderboards among the paths, the other paths with the runs of each first row). Raises
    DataError for a sweep that has not ended, and for what is no leaderboard."""
    boards: list[Board] = []
    others: list[Path] = []
    for path in paths:
        file = _board_file(path)
        if file is None:
            others.append(path)
            continue
        record = read_json(file, BOARD, fix="run the same lorabatch sweep again")
        best = record["rows"][0]["folders"] if record["rows"] else []
        others += [folder for name in best if (folder := file.parent / name).is_dir()]
        boards.append(Board(clean(file.resolve().parent.name), clean(record)))
    return boards, others


def _board_file(path: Path) -> Path | None:
    """Of a path that is one, or the folder of a sweep."""
    if path.name == BOARD:
        return path
    if (path / BOARD).is_file():
        return path / BOARD
    if (path / "sweep.json").is_file():
        raise DataError(
            f"a sweep that has not ended (no {BOARD} in it)",
            where=path,
            fix="run the same lorabatch sweep again, or give folders of its runs",
        )
    return None


def board_sections(words: Words, boards: Sequence[Board]) -> list[Section]:
    blocks: list[Block] = []
    for board in boards:
        count, shown = len(board.rows), board.rows[:MAX_ROWS]
        numbers = {"shown": words.number(len(shown)), "count": words.number(count)}
        metric = _metric(words, board)
        blocks.append(Paragraph(words("board_note", run=board.label, metric=metric, **numbers)))
        blocks.append(_table(words, board, shown))
    return [Section("boards", words("boards"), blocks)] if boards else []


def _metric(words: Words, board: Board) -> str:
    name = str(board.record["metric"])
    return words.texts.get(name, name)


def _table(words: Words, board: Board, rows: Sequence[Fields]) -> Table:
    names = list(rows[0]["point"]) if rows else []
    heads = [words(key) for key in ("board_behind", "board_seeds", "board_remark")]
    head = [words("board_rank"), *names, _metric(words, board), "±", *heads]
    cells = [[words.number(i), *_cells(words, row, names)] for i, row in enumerate(rows, start=1)]
    return Table(head, cells)


def _cells(words: Words, row: Fields, names: Sequence[str]) -> list[Cell]:
    behind, reach = row.get("behind"), row.get("behind_half_width")
    distance = words("not_applicable") if behind is None else words.number(behind, 4)
    distance += "" if reach is None else f" ± {words.number(reach, 4)}"
    return [
        *(Mono(str(row["point"].get(name))) for name in names),
        words("board_failed") if row.get("mean") is None else words.number(row["mean"], 4),
        words.number(row.get("half_width"), 4),
        distance,
        words.number(row["runs"]),
        _remark(words, row),
    ]


def _remark(words: Words, row: Fields) -> str:
    behind, reach = row.get("behind"), row.get("behind_half_width")
    if row["errors"]:
        return str(row["errors"][0])
    tied = behind is not None and reach is not None and behind <= reach
    return words("board_tied") if tied else ""
