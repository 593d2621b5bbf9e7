"""From one dataclass to flags, TOML and help: the machinery behind ``lorabatch.config``.

Precedence: flags over the TOML file over defaults. Anything unknown is an error that names the
nearest known thing. Nothing here imports torch, so ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import operator
import os
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

from lorabatch.errors import DataError, UsageError, nearest

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
ConfigType = TypeVar("ConfigType", bound="Settings")


def setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: tuple[str, ...] = (),
    free: bool = False,
) -> Any:
    """A dataclass field that knows its help, its legal values, and whether a resumed run is free to change it."""
    metadata = {"free": free, "help": help, "minimum": minimum, "maximum": maximum, "above": above, "below": below, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of all configurations: values are checked when the object is made. A class statement names the command that it is for:
    ``class TrainConfig(Settings, command="train")``."""

    command: ClassVar[str] = ""
    commands: ClassVar[list[str]] = []  # of all configurations
    TOP_LEVEL_KEYS: ClassVar[bool] = True  # a TOML file's keys outside of tables are meant for this command too

    def __init_subclass__(cls, command: str = "") -> None:
        super().__init_subclass__()
        cls.command = command
        if command:
            Settings.commands.append(command)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name))

    @classmethod
    def check(cls, values: Mapping[str, Any]) -> None:
        """Some fields' values against their bounds. Raises UsageError."""
        for field in dataclasses.fields(cls):
            if field.name in values:
                _check(field, values[field.name])

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def fixed(self) -> dict[str, Any]:
        """The settings that the result depends on, without those whose content is compared instead (base, data, type)."""
        values = self.to_dict()
        return {field.name: values[field.name] for field in dataclasses.fields(self) if not field.metadata["free"]}

    def to_toml(self) -> str:
        """The configuration as a TOML file that ``--config`` reads back to the same object."""
        lines = []
        for field, value in zip(dataclasses.fields(self), self.to_dict().values(), strict=True):
            if value is None and field.default is not None:
                value = "none"  # said, because silence would mean the default
            lines.append(f"# {field.name} is not set" if value is None else f"{field.name} = {json.dumps(value, ensure_ascii=False)}")
        return "\n".join(lines) + "\n"


def _check(field: dataclasses.Field[Any], value: Any) -> None:
    rule = field.metadata
    if isinstance(value, tuple):
        for item in value:
            _check(field, item)
        return
    if value is None or isinstance(value, bool):
        return
    where = f"--{field.name} {value}"
    if rule["choices"] and value not in rule["choices"]:
        raise UsageError("not a known choice", where=where, fix=nearest(str(value), rule["choices"]))
    if isinstance(value, str) and not _encodable(value):
        raise UsageError("holds a character that no path and no text may", where=where, fix="leave NUL and half surrogate pairs out")
    if isinstance(value, int) and abs(value) >= LARGEST_INT:
        raise UsageError("out of range", where=f"--{field.name}", fix="give a value of less than 2**63")
    if isinstance(value, (int, float)):
        if value != value or value in (float("inf"), float("-inf")):
            raise UsageError("must be a finite number", where=where, fix="give a number")
        if abs(value) > LARGEST:
            raise UsageError("out of range", where=where, fix=f"give a value of at most {LARGEST:g}")
        for name, text, holds in BOUNDS:
            if rule[name] is not None and not holds(value, rule[name]):
                raise UsageError("out of range", where=where, fix=f"give a value of {text} {rule[name]}")


def _encodable(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


# Settings that are gone, and what serves in their place.
REMOVED = {
    "adapter_mode": "leave it out: adapters stay unmerged in mixed batches; --adapter_dir merges one",
    "processes": "use --shards N and run the command once for each process, under srun -n N or taskset",
}


def _instead(name: str, known: Sequence[str]) -> str:
    """What to do about a setting that there is not."""
    return REMOVED.get(name) or nearest(name, known)


class _Parser(argparse.ArgumentParser):
    """argparse that raises our one-line errors instead of printing a usage text."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, fix=f"see {self.prog} --help")


def _value_type(annotation: Any) -> tuple[type, bool, bool]:
    """``int | None`` -> (int, optional, not many); ``tuple[str, ...]`` -> (str, False, many)."""
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0], False, True
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        inner = [a for a in typing.get_args(annotation) if a is not type(None)]
        return inner[0], True, False
    return annotation, False, False


def _convert(name: str, text: str, kind: type, optional: bool) -> Any:
    if optional and text.lower() in ("none", ""):
        return None
    if kind is bool:
        if text.lower() in ("true", "1", "yes"):
            return True
        if text.lower() in ("false", "0", "no"):
            return False
        raise UsageError(f"'{text}' is neither true nor false", where=f"--{name}", fix="give true or false")
    try:
        return kind(text)
    except ValueError:
        article = "a whole number" if kind is int else "a number"
        raise UsageError(f"'{text}' is not {article}", where=f"--{name}", fix=f"give {article}") from None


def _add_flag(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], annotation: Any) -> None:
    kind, _, many = _value_type(annotation)
    words = [field.metadata["help"]]
    if field.metadata["choices"]:
        words.append("{" + ", ".join(field.metadata["choices"]) + "}")
    default: Any = field.default
    if default not in (None, (), False):
        words.append(f"[{' '.join(map(str, default)) if many else default}]")
    options: dict[str, Any] = {"help": " ".join(words).replace("%", "%%"), "default": argparse.SUPPRESS, "dest": field.name}
    if kind is bool:
        options |= {"nargs": "?", "const": "true", "metavar": "true|false"}
    elif many:
        options |= {"nargs": "+", "metavar": "N" if kind is int else "NAME"}
    else:
        options |= {"metavar": {int: "N", float: "X", str: "TEXT"}[kind]}
    parser.add_argument(f"--{field.name}", **options)


def _underscored(argv: list[str]) -> list[str]:
    """``--lora-r=4`` -> ``--lora_r=4``: hyphen and underscore are the same; values stay as they are."""
    return [re.sub("^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in argv]


def parse(
    config_class: type[ConfigType], argv: list[str], *, prog: str, positionals: dict[str, str] | None = None
) -> tuple[ConfigType, dict[str, Any]]:
    """Command line -> (configuration, positional values and the common switches).

    Raises UsageError for anything unknown or out of range; SystemExit(0) after ``--help`` and
    ``--print_config``.
    """
    parser = _Parser(prog=prog, description=config_class.__doc__, allow_abbrev=False)
    for name, help_text in (positionals or {}).items():
        parser.add_argument(name, help=help_text, nargs="+" if name.endswith("s") else None)
    hints = typing.get_type_hints(config_class)
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    for field in fields.values():
        _add_flag(parser, field, hints[field.name])
    parser.add_argument("--config", metavar="FILE", help="TOML file with these settings; flags win over it")
    parser.add_argument("--print_config", action="store_true", help="print the resulting settings as TOML and stop")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")

    known, unknown = parser.parse_known_args(_underscored(argv))
    for word in unknown:
        if word.startswith("-"):
            flag = word.lstrip("-").partition("=")[0]
            raise UsageError(f"unknown flag --{flag}", fix=_instead(flag, [*fields, "config", "print_config", "debug", "help"]))
        raise UsageError(f"unexpected argument '{word}'", fix=f"see {prog} --help")
    values = vars(known)
    extras = {k: values.pop(k) for k in ("config", "print_config", "debug", *(positionals or {}))}
    given: dict[str, Any] = {}
    for name, text in values.items():
        kind, optional, many = _value_type(hints[name])
        given[name] = tuple(_convert(name, t, kind, False) for t in text) if many else _convert(name, text, kind, optional)
    from_file = read_toml(config_class, Path(extras["config"])) if extras["config"] else {}
    config = config_class(**(from_file | given))
    if extras["print_config"]:
        print(config.to_toml(), end="")
        raise SystemExit(0)
    return config, extras


def read_table(path: Path) -> dict[str, Any]:
    """A TOML file as it is. UsageError if it is missing, DataError if it is not readable."""
    try:
        return dict(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UsageError("no such file", where=path, fix="check the path") from None
    except (ValueError, RecursionError, OSError) as error:  # also of numbers with thousands of digits, and nested a thousand deep
        raise DataError(f"not a readable TOML file ({error})", where=path, fix="mend the line it names") from None


def read_toml(config_class: type[Settings], path: Path) -> dict[str, Any]:
    """Settings from a TOML file: top-level keys, and those of the table of the class's command: ``[train]``, ``[bench.machine]``.

    Tables of other commands are left alone, so that one file can describe a whole experiment.
    """
    table = read_table(path)
    command, commands = config_class.command, {name.split()[0] for name in Settings.commands}
    for name in table:
        if isinstance(table[name], dict) and name not in commands:
            raise UsageError(f"unknown table [{name}]", where=path, fix=nearest(name, commands))
    sections = [table] if config_class.TOP_LEVEL_KEYS else [{k: v for k, v in table.items() if isinstance(v, dict)}]
    for word in command.split():
        sections.append(sections[-1].get(word, {}))
        if not isinstance(sections[-1], dict):
            raise UsageError(f"'{word}' is {sections[-1]!r}, not a table", where=path, fix=f"write [{command.replace(' ', '.')}]")
    merged = {k: v for section in sections for k, v in section.items() if not isinstance(v, dict)}
    return typed_values(config_class, merged, path)


def typed_values(config_class: type[Settings], values: Mapping[str, Any], path: Path | str) -> dict[str, Any]:
    """Settings from a file. UsageError for an unknown key or a value of another type."""
    hints = typing.get_type_hints(config_class)
    for key in values:
        if key not in hints:
            raise UsageError(f"unknown key '{key}'", where=path, fix=_instead(key, [*hints]))
    return {key: _typed(key, value, hints[key], path) for key, value in values.items()}


def _typed(key: str, value: Any, annotation: Any, path: Path | str) -> Any:
    kind, optional, many = _value_type(annotation)
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
    raise UsageError(f"'{key}' must be of type {kind.__name__}, not {value!r}", where=path, fix="mend the value")
