#!/usr/bin/env python3
"""Writes the tables of flags into the guides of docs/: ``python scripts/flag_tables.py [--check]``.

A guide says where a table goes: between ``<!-- flags: COMMAND -->`` and ``<!-- end -->``. Nothing
else in it changes. ``--check`` writes nothing and exits with 1 where a guide differs.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import typing
from pathlib import Path
from typing import Any

from lorabatch.cli import COMMANDS
from lorabatch.settings import BOUNDS, Settings, value_type

ROOT = Path(__file__).parents[1]
MARKS = re.compile(r"(<!-- flags: ([a-z ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
COLUMNS = ("flag", "default", "meaning", "allowed")


def extended(config_class: type[Settings]) -> type[Settings] | None:
    """The other command whose flags this one has too: ``train`` of ``profile train``."""
    return next((c for c in config_class.__mro__[1:] if vars(c).get("command")), None)


def cell(text: str) -> str:
    """Text that Markdown shows as it is, in one cell."""
    return re.sub(r"([|<>*\\])", r"\\\1", text)


def shown(value: Any) -> str:
    if value is None or value == ():
        return "–"
    words = value if isinstance(value, tuple) else (value,)
    return f"`{' '.join(map(str, words))}`".replace("`False`", "off").replace("`True`", "on")


def allowed(field: dataclasses.Field[Any], annotation: Any) -> str:
    """Choices or bounds, and whether several values may follow the flag."""
    kind, _, many = value_type(annotation)
    rule = field.metadata
    words = [f"`{choice}`" for choice in rule["choices"]]
    words += [f"{text} {rule[name]}" for name, text, _ in BOUNDS if rule[name] is not None]
    if kind is bool:
        words.append("on or off")
    if many:
        words.append("one or more")
    return ", ".join(words)


def table(command: str) -> str:
    """The flags of a command; those that it shares with another are named by a line instead."""
    config_class, _ = COMMANDS[command]
    hints, base = typing.get_type_hints(config_class), extended(config_class)
    inherited = {f.name for f in dataclasses.fields(base)} if base else set()
    lines = [COLUMNS, ("---",) * len(COLUMNS)]
    lines += [
        (
            f"`{f.name.upper()}`" if f.metadata["positional"] else f"`--{f.name}`",
            "required" if f.default is dataclasses.MISSING else shown(f.default),
            cell(f.metadata["help"]),
            allowed(f, hints[f.name]),
        )
        for f in dataclasses.fields(config_class)
        if f.name not in inherited
    ]
    if len(lines) == 2:
        return "No flags of its own.\n"
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
    return text + (f"\nAll flags of `lorabatch {base.command}` too.\n" if base else "")


def with_tables(page: str) -> str:
    """The page with every marked table as the settings are now; KeyError for no known command."""
    return MARKS.sub(lambda m: f"{m[1]}\n{table(m[2])}\n{m[3]}", page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 on a difference"
    )
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the guides")
    args = parser.parse_args()
    stale = []
    for path in sorted(args.docs.glob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = with_tables(before)
        if after != before:
            stale.append(path.name)
            if not args.check:
                path.write_text(after, encoding="utf-8")
    if stale and args.check:
        print(f"stale: {', '.join(stale)}; run: python scripts/flag_tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
