"""What shells and editors complete: ``lorabatch completion`` and ``lorabatch schema``, from the
table of commands."""

from __future__ import annotations

import argparse
import json
import typing

from lorabatch.cli import COMMANDS, GROUPS
from lorabatch.command_line import COMMON, add_arguments
from lorabatch.config import CompletionConfig, SchemaConfig
from lorabatch.errors import UnavailableError
from lorabatch.schema import Record
from lorabatch.settings import Field, Settings, flags, value_type

TYPES = {bool: "boolean", int: "integer", float: "number", str: "string"}
BOUNDS = {
    "minimum": "minimum",
    "maximum": "maximum",
    "above": "exclusiveMinimum",
    "below": "exclusiveMaximum",
}


def run_completion(config: CompletionConfig, command: list[str]) -> int:
    try:
        import shtab
    except ModuleNotFoundError:
        raise UnavailableError(
            "completion needs the package shtab", fix="run: pip install shtab"
        ) from None
    parser = _whole_parser()
    for action in _actions(parser):
        if action.choices is None and action.nargs != 0:
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # shtab reads it
    print(shtab.complete(parser, shell=config.shell))
    return 0


def run_schema(config: SchemaConfig, command: list[str]) -> int:
    print(json.dumps(toml_schema(), indent=1, ensure_ascii=False))
    return 0


def _whole_parser() -> argparse.ArgumentParser:
    """One parser of all commands; nothing is ever parsed with it."""
    parser = argparse.ArgumentParser(prog="lorabatch")
    places = {"": parser.add_subparsers()}
    for group in sorted(GROUPS):
        inner = places[""].add_parser(group, help=f"commands that begin with {group}")
        places[group] = inner.add_subparsers()
    for name, (config_class, _) in COMMANDS.items():
        group, _, last = name.rpartition(" ")
        summary = (config_class.__doc__ or "").splitlines()[0]
        inner = places[group].add_parser(last, help=summary)
        add_arguments(inner, config_class, typing.get_type_hints(config_class))
        choices = {f.name: f.metadata["choices"] for f in flags(config_class)}
        for action in inner._actions:
            action.choices = action.choices or choices.get(action.dest) or None
    return parser


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [a for inner in action.choices.values() for a in _actions(inner)]
        else:
            found.append(action)
    return found


def toml_schema() -> Record:
    """JSON schema (draft 2020-12) of a file for ``--config``: each command's table, and the keys
    outside of tables, which all commands share."""
    tables: Record = {}
    shared: Record = {}
    for name, (config_class, _) in COMMANDS.items():
        keys = {f.name: _value(config_class, f) for f in flags(config_class)}
        keys = {key: value for key, value in keys.items() if key not in COMMON}
        *group, last = name.split()
        place = tables
        for word in group:
            place = place.setdefault(word, _object({}))["properties"]
        place[last] = _object(keys, config_class.__doc__)
        if config_class.TOP_LEVEL_KEYS:
            shared = keys | shared
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lorabatch: a file for --config",
    } | _object(shared | tables)


def _object(properties: Record, text: str | None = None) -> Record:
    described = {"description": " ".join(text.split())} if text else {}
    return described | {
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }


def _value(config_class: type[Settings], field: Field) -> Record:
    kind, optional, many = value_type(typing.get_type_hints(config_class)[field.name])
    rule = field.metadata
    one: Record = {"type": TYPES[kind]}
    one |= {"enum": list(rule["choices"])} if rule["choices"] else {}
    one |= {word: rule[name] for name, word in BOUNDS.items() if rule[name] is not None}
    ways = [one]
    if many:
        ways.append({"type": "array", "items": one})
    if optional:
        ways.append({"const": "none"})
    described = {"description": rule["help"]}
    return described | (one if len(ways) == 1 else {"anyOf": ways})
