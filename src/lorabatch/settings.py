"""From one dataclass to settings: declaration, checks and TOML; the machinery behind
``lorabatch.config`` and ``lorabatch.command_line``.

Precedence: flags over the TOML file over defaults. Anything unknown is an error that names the
nearest known thing. Nothing here imports torch, so ``--help`` answers at once.
"""

from __future__ import annotations

import dataclasses
import json
import operator
import os
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

from lorabatch.errors import DataError, UsageError, nearest
from lorabatch.schema import Fields, Record

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BOUNDS = (
    ("minimum", "at least", operator.ge),
    ("maximum", "at most", operator.le),
    ("above", "more than", operator.gt),
    ("below", "less than", operator.lt),
)
LARGEST_INT = 2**63
LARGEST = 1e30  # of a number: more than anybody means, and far from where fp32 ends
REQUIRED: Any = dataclasses.MISSING  # in place of a default
T = TypeVar("T")
Field = dataclasses.Field[object]


def setting(
    default: T,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    free: bool = False,
    positional: bool = False,
) -> T:
    """A dataclass field that knows its help, its legal values, whether a resumed run is free to
    change it, and whether the command line takes it without a flag (and a file not at all)."""
    metadata = {
        "free": free,
        "positional": positional,
        "help": help,
        "minimum": minimum,
        "maximum": maximum,
        "above": above,
        "below": below,
        "choices": choices,
    }
    return dataclasses.field(default=default, metadata=metadata)


def like(config_class: type[Settings], name: str) -> Any:
    """The same setting as another command's."""
    original = config_class.__dataclass_fields__[name]
    return dataclasses.field(default=original.default, metadata=original.metadata)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of all configurations: values are checked when the object is made. A class statement
    names the command that it is for: ``class TrainConfig(Settings, command="train")``."""

    command: ClassVar[str] = ""
    commands: ClassVar[dict[str, type[Settings]]] = {}  # all configurations
    # a TOML file's keys outside of tables are meant for this command too
    TOP_LEVEL_KEYS: ClassVar[bool] = True
    # another command whose keys are read too, as far as they are known here
    SHARES: ClassVar[type[Settings] | None] = None

    def __init_subclass__(cls, command: str = "") -> None:
        super().__init_subclass__()
        cls.command = command
        if command:
            Settings.commands[command] = cls

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name))

    @classmethod
    def check(cls, values: Fields) -> None:
        """Some fields' values against their bounds. Raises UsageError."""
        for field in dataclasses.fields(cls):
            if field.name in values:
                _check(field, values[field.name])

    def to_dict(self) -> Record:
        return {
            k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()
        }

    def fixed(self) -> Record:
        """The settings that the result depends on, without those whose content is compared instead
        (base, data, type)."""
        values = self.to_dict()
        return {
            field.name: values[field.name]
            for field in dataclasses.fields(self)
            if not field.metadata["free"]
        }

    def to_toml(self) -> str:
        """The configuration as a TOML file that ``--config`` reads back to the same object."""
        lines, values = [], self.to_dict()
        for field in flags(type(self)):
            value = values[field.name]
            if value is None and field.default is not None:
                value = "none"  # said, because silence would mean the default
            lines.append(
                f"# {field.name} is not set"
                if value is None
                else f"{field.name} = {json.dumps(value, ensure_ascii=False)}"
            )
        return "\n".join(lines) + "\n"


def flags(config_class: type[Settings]) -> list[Field]:
    """The fields that are flags and keys of a file."""
    return [f for f in dataclasses.fields(config_class) if not f.metadata["positional"]]


def _check(field: Field, value: object) -> None:
    """Raises UsageError for a value that the field must not have."""
    if isinstance(value, tuple):
        for item in value:
            _check(field, item)
        return
    if value is None or isinstance(value, bool):
        return
    where, choices = f"--{field.name} {value}", field.metadata["choices"]
    if choices and value not in choices:
        raise UsageError("not a known choice", where=where, fix=nearest(str(value), choices))
    if isinstance(value, str) and not _encodable(value):
        raise UsageError(
            "contains a character that no path and no text may contain",
            where=where,
            fix="remove NUL and half surrogate pairs",
        )
    if isinstance(value, (int, float)):
        _check_number(field, value, where)


def _check_number(field: Field, value: float, where: str) -> None:
    if isinstance(value, int) and abs(value) >= LARGEST_INT:
        raise UsageError(
            "out of range", where=f"--{field.name}", fix="give a value of less than 2**63"
        )
    if value != value or value in (float("inf"), float("-inf")):
        raise UsageError("must be a finite number", where=where, fix="give a number")
    if abs(value) > LARGEST:
        raise UsageError("out of range", where=where, fix=f"give a value of at most {LARGEST:g}")
    for name, text, holds in BOUNDS:
        bound = field.metadata[name]
        if bound is not None and not holds(value, bound):
            raise UsageError("out of range", where=where, fix=f"give a value of {text} {bound}")


def _encodable(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


# Settings that are gone, and what serves in their place.
REMOVED = {
    "adapter_mode": "leave it out: adapters stay unmerged in mixed batches; "
    "--adapter_dir merges one",
    "processes": "use --shards N and run the command once for each process, "
    "under srun -n N or taskset",
}


def instead(name: str, known: Sequence[str]) -> str:
    """What to do about a setting that does not exist."""
    return REMOVED.get(name) or nearest(name, known)


def value_type(annotation: object) -> tuple[type, bool, bool]:
    """``int | None`` -> (int, optional, not many); ``tuple[str, ...]`` -> (str, False, many)."""
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0], False, True
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        inner = [a for a in typing.get_args(annotation) if a is not type(None)]
        return inner[0], True, False
    return cast(type, annotation), False, False


def read_table(path: Path) -> Record:
    """A TOML file as it is. UsageError if it is missing, DataError if it is not readable."""
    try:
        return dict(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UsageError("no such file", where=path, fix="check the path") from None
    except (ValueError, RecursionError, OSError) as error:
        # also of numbers with thousands of digits, and nested a thousand deep
        raise DataError(
            f"not a readable TOML file ({error})", where=path, fix="fix the line that it names"
        ) from None


def read_toml(config_class: type[Settings], path: Path) -> Record:
    """Settings from a TOML file: top-level keys, and those of the table of the class's command:
    ``[train]``, ``[bench.machine]``.

    Tables of other commands are left alone, so that one file can describe a whole experiment.
    """
    table = read_table(path)
    commands = {name.split()[0] for name in Settings.commands}
    for name in table:
        if isinstance(table[name], dict) and name not in commands:
            raise UsageError(f"unknown table [{name}]", where=path, fix=nearest(name, commands))
    values: Record = {}
    for place, keys in _sections(config_class, table, path).items():
        values |= known_keys(config_class, keys, path, place)
    return typed_values(config_class, values, path)


def _sections(config_class: type[Settings], table: Fields, path: Path) -> dict[str, Record]:
    """The keys that are meant for the command, by where in the file they stand."""
    places = {"outside of tables": table} if config_class.TOP_LEVEL_KEYS else {}
    if other := config_class.SHARES:
        alone = {f.name for f in flags(other)} - {f.name for f in flags(config_class)}
        places |= _tables(table, other.command, path)
        places = {
            place: {k: v for k, v in keys.items() if k not in alone}
            for place, keys in places.items()
        }
    places |= _tables(table, config_class.command, path)
    return {
        place: {k: v for k, v in keys.items() if not isinstance(v, dict)}
        for place, keys in places.items()
    }


def _tables(table: Fields, command: str, path: Path) -> dict[str, Fields]:
    """``in [bench]`` and ``in [bench.machine]`` for the command ``bench machine``, and their keys;
    none for what the file does not have."""
    found: dict[str, Fields] = {}
    words = command.split()
    for depth, name in enumerate(words, 1):
        inner = table.get(name, {})
        if not isinstance(inner, dict):
            raise UsageError(
                f"'{name}' is {inner!r}, not a table",
                where=path,
                fix=f"write [{command.replace(' ', '.')}]",
            )
        table = found[f"in [{'.'.join(words[:depth])}]"] = inner
    return found


def known_keys(config_class: type[Settings], keys: Fields, path: Path, place: str) -> Record:
    """Keys of one table of a file, with underscores where they have hyphens. UsageError for one
    that is unknown or there twice. ``place``: ``in [train]``."""
    known, found = [field.name for field in flags(config_class)], {}
    for key, value in keys.items():
        name = key.replace("-", "_")
        if name not in known:
            raise UsageError(f"unknown key '{key}' {place}", where=path, fix=_home(name, known))
        if name in found:
            raise UsageError(f"'{name}' is set twice {place}", where=path, fix="leave one out")
        found[name] = value
    return found


def _home(name: str, known: Sequence[str]) -> str:
    """The commands that have such a setting; where none has, what is nearest to it here."""
    homes = [c for c in Settings.commands if name in Settings.commands[c].__dataclass_fields__]
    tables = " and ".join(f"[{command.replace(' ', '.')}]" for command in homes[:2])
    return f"it is a setting of {tables}" if homes else instead(name, known)


def typed_values(config_class: type[Settings], values: Fields, path: Path | str) -> Record:
    """Settings from a file. UsageError for an unknown key or a value of another type."""
    hints = typing.get_type_hints(config_class)
    known = [field.name for field in flags(config_class)]
    for key in values:
        if key not in known:
            raise UsageError(f"unknown key '{key}'", where=path, fix=instead(key, known))
    return {key: _typed(key, value, hints[key], path) for key, value in values.items()}


def _typed(key: str, value: object, annotation: object, path: Path | str) -> object:
    kind, optional, many = value_type(annotation)
    if optional and value in (None, "none"):  # JSON's null, and what TOML has in its place
        return None
    if many:
        items = value if isinstance(value, list) else [value]
        if all(isinstance(item, kind) for item in items):
            return tuple(items)
    elif kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value) if abs(value) < LARGEST_INT else value  # refused as out of range
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise UsageError(
        f"'{key}' must be of type {kind.__name__}, not {value!r}", where=path, fix="fix the value"
    )
