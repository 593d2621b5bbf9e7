"""What a value of a record may be, and what is wrong with one that is something else.

A rule is a leaf (a text, and a test of the value), ``Maybe`` (null or missing is fine), ``[rule]``
(a list of them) or a mapping of fields, where ``"*"`` stands for all other names; without it other
names are not looked at, so that a record may say more than its readers know.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

# more than anything counted or measured here (a loss that diverges in fp32 too), and products of a
# few stay finite
LARGEST = 1e60
SHOWN = 60  # characters of a value that is wrong


@dataclass(frozen=True)
class Leaf:
    text: str
    test: Callable[[object], bool]


@dataclass(frozen=True)
class Maybe:
    of: object
    missing: bool = True  # is as good as null


@dataclass(frozen=True)
class Variants:
    """A mapping whose other fields depend on one of its own; a value that is not listed asks for
    nothing more."""

    by: str
    fields: Mapping[str, Mapping[str, object]]


def whole(least: float, most: float = 2.0**63) -> Leaf:
    text = f"a whole number from {least:.0f}" if math.isfinite(least) else "of type int"
    return Leaf(text, lambda v: type(v) is int and max(least, -LARGEST) <= v < min(most, LARGEST))


def _is_moment(value: object) -> bool:
    try:
        return isinstance(value, str) and datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False


def is_number(value: Any) -> bool:
    """Finite, and small enough to compute with."""
    # no comparison holds for what is not a number
    return type(value) in (int, float) and abs(value) <= LARGEST


def one_of(*names: str) -> Leaf:
    return Leaf(f"one of {', '.join(names)}", lambda v: isinstance(v, str) and v in names)


ANY = Leaf("anything", lambda v: True)
TEXT = Leaf("of type str", lambda v: isinstance(v, str))
FLAG = Leaf("of type bool", lambda v: isinstance(v, bool))
INT, COUNT, POSITIVE = whole(-math.inf, LARGEST), whole(0), whole(1)
NUMBER = Leaf("of type float", is_number)
PROCESS = whole(1, 2.0**31)
DIGITS = Leaf(
    "16 hexadecimal digits",
    lambda v: isinstance(v, str) and re.fullmatch("[0-9a-f]{16}", v) is not None,
)
MOMENT = Leaf("a time with its zone", _is_moment)


def wrong(value: object, rule: object, name: str) -> Iterable[str]:
    """What does not fit, in words; ``name``: of the value."""
    if isinstance(rule, Maybe):
        return () if value is None else wrong(value, rule.of, name)
    if isinstance(rule, Leaf):
        return () if rule.test(value) else (f"'{name}' is {_shown(value)}, not {rule.text}",)
    if isinstance(rule, list):
        if not isinstance(value, list):
            return (f"'{name}' is {_shown(value)}, not of type list",)
        return (
            what for i, item in enumerate(value) for what in wrong(item, rule[0], f"{name}[{i}]")
        )
    if not isinstance(value, dict):
        return (f"'{name}' is {_shown(value)}, not of type dict",)
    if isinstance(rule, Variants):
        variant = value.get(rule.by)
        rule = {rule.by: TEXT, **(rule.fields.get(variant, {}) if isinstance(variant, str) else {})}
    return _wrong_fields(value, cast("Mapping[str, object]", rule), f"{name}." if name else "")


def _wrong_fields(
    value: Mapping[str, object], rules: Mapping[str, object], prefix: str
) -> Iterable[str]:
    for name, rule in rules.items():
        if name == "*":
            for other in value:
                if other not in rules:
                    yield from wrong(value[other], rule, f"{prefix}{other}")
        elif name in value or (isinstance(rule, Maybe) and rule.missing):
            yield from wrong(value.get(name), rule, f"{prefix}{name}")
        else:
            yield f"'{prefix}{name}' is missing"


def _shown(value: object) -> str:
    text = repr(value) if not isinstance(value, (dict, list)) else f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
