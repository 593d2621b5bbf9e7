"""Settings as flags: parsing, help, and one-line errors."""

from __future__ import annotations

import argparse
import dataclasses
import re
import typing
from pathlib import Path
from typing import NoReturn, TypeVar

from lorabatch.errors import UsageError
from lorabatch.schema import Fields, Record
from lorabatch.settings import REQUIRED, Field, Settings, flags, instead, read_toml, value_type

METAVARS = {int: "N", float: "X", str: "TEXT"}  # what stands for a value in help

COMMON: dict[str, Record] = {  # switches of every command, which are no settings
    "config": {"metavar": "FILE", "help": "TOML file with these settings; flags win over it"},
    "print_config": {
        "action": "store_true",
        "help": "print the resulting settings as TOML and stop",
    },
    "debug": {"action": "store_true", "help": "show the traceback of an error"},
}

ConfigType = TypeVar("ConfigType", bound="Settings")


class _Parser(argparse.ArgumentParser):
    """argparse that raises our one-line errors instead of printing a usage text."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, fix=f"see {self.prog} --help")


def _converted(name: str, given: str | list[str], annotation: object) -> object:
    """A value of the command line. UsageError for one that is not of the field's type."""
    kind, optional, many = value_type(annotation)
    if many:
        return tuple(_convert(name, text, kind) for text in given)
    text = str(given)
    return None if optional and text.lower() in ("none", "") else _convert(name, text, kind)


def _convert(name: str, text: str, kind: type) -> object:
    if kind is bool:
        if text.lower() in ("true", "1", "yes"):
            return True
        if text.lower() in ("false", "0", "no"):
            return False
        raise UsageError(
            f"'{text}' is neither true nor false", where=f"--{name}", fix="give true or false"
        )
    try:
        return kind(text)
    except ValueError:
        article = "a whole number" if kind is int else "a number"
        raise UsageError(
            f"'{text}' is not {article}", where=f"--{name}", fix=f"give {article}"
        ) from None


def add_arguments(
    parser: argparse.ArgumentParser, config_class: type[Settings], hints: Fields
) -> None:
    """Every setting of a command, and the switches that all commands have."""
    for field in dataclasses.fields(config_class):
        if field.name not in COMMON:
            _add_argument(parser, field, hints[field.name])
    for name, options in COMMON.items():
        parser.add_argument(f"--{name}", **options)


def _add_argument(parser: argparse.ArgumentParser, field: Field, annotation: object) -> None:
    kind, _, many = value_type(annotation)
    if field.metadata["positional"]:
        if field.default is REQUIRED:
            count = "+" if many else None
            parser.add_argument(field.name, help=field.metadata["help"], nargs=count)
        else:
            count = "*" if many else "?"
            default = field.default if many else argparse.SUPPRESS
            parser.add_argument(field.name, help=_help(field), nargs=count, default=default)
        return
    options: Record = {
        "help": _help(field).replace("%", "%%"),
        "default": argparse.SUPPRESS,
        "dest": field.name,
    }
    if kind is bool:
        options |= {"nargs": "?", "const": "true", "metavar": "true|false"}
    elif many:
        options |= {"nargs": "+", "metavar": "N" if kind is int else "NAME"}
    else:
        choices = ",".join(field.metadata["choices"])
        options |= {"metavar": f"{{{choices}}}" if choices else METAVARS[kind]}
    parser.add_argument(f"--{field.name}", **options)


def _help(field: Field) -> str:
    """The text and the default; a switch is off, and what has no default says what happens."""
    text, default = str(field.metadata["help"]), field.default
    if default in (None, ()) or isinstance(default, bool):
        return text
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return f"{text} [{shown}]"


def _underscored(argv: list[str]) -> list[str]:
    """``--lora-r=4`` -> ``--lora_r=4``: hyphen and underscore are the same; values stay as they
    are."""
    return [
        re.sub("^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), text) for text in argv
    ]


def parse(config_class: type[ConfigType], argv: list[str], *, prog: str) -> ConfigType:
    """Command line -> configuration.

    Raises UsageError for anything unknown or out of range; SystemExit(0) after ``--help`` and
    ``--print_config``.
    """
    hints = typing.get_type_hints(config_class)
    given = vars(_known_arguments(config_class, argv, hints, prog))
    common = {name: given.pop(name) for name in COMMON}
    if "config" in hints:  # the file is also a setting of its own
        given |= {"config": common["config"]} if common["config"] else {}
    values = {name: _converted(name, text, hints[name]) for name, text in given.items()}
    from_file = read_toml(config_class, Path(common["config"])) if common["config"] else {}
    config = config_class(**(from_file | values))
    if common["print_config"]:
        print(config.to_toml(), end="")
        raise SystemExit(0)
    return config


def _known_arguments(
    config_class: type[Settings], argv: list[str], hints: Fields, prog: str
) -> argparse.Namespace:
    """What the command line gives, as text. UsageError for a flag or an argument too many."""
    parser = _Parser(prog=prog, description=config_class.__doc__, allow_abbrev=False)
    add_arguments(parser, config_class, hints)
    known, unknown = parser.parse_known_args(_underscored(argv))
    if unknown:
        raise _unexpected(unknown[0], config_class, prog)
    return known


def _unexpected(argument: str, config_class: type[Settings], prog: str) -> UsageError:
    if not argument.startswith("-"):
        return UsageError(f"unexpected argument '{argument}'", fix=f"see {prog} --help")
    flag = argument.lstrip("-").partition("=")[0]
    names = [*(f.name for f in flags(config_class)), *COMMON, "help"]
    return UsageError(f"unknown flag --{flag}", fix=instead(flag, names))
