"""How a figure stands in a record: what a field of ``metrics.schema`` says of itself.

A field has the name that it has in ``metrics.json``, and so has its label among the report's words.
What was not measured is None, and null in the record.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from lorabatch.metrics.statistics import Summary
from lorabatch.rules import is_number
from lorabatch.schema import Fields, Record

M = TypeVar("M", bound="Metrics")


@dataclass(frozen=True)
class Form:
    """``read(name, record)`` gives a field's value, ``write(name, value)`` its part of a record."""

    read: Callable[[str, Fields], object]
    write: Callable[[str, Any], Record] = lambda name, value: {name: value}


@dataclass(frozen=True)
class Metric:
    """One figure that a report can show: ``name`` is its key in the record and of its label."""

    name: str
    unit: str
    field: str
    part: str | None = None  # of a summary

    def of(self, metrics: Metrics) -> float | None:
        value = getattr(metrics, self.field)
        found: float | None = value if self.part is None else getattr(value, self.part)
        return found


@dataclass(frozen=True)
class Metrics:
    """Base of the records below. ``scope``: which of the fields with an ``of`` it writes."""

    sparse: ClassVar[bool] = False  # what is None is left out, not null

    @property
    def scope(self) -> str:
        return ""

    def to_dict(self) -> Record:
        record: Record = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.metadata["of"] in ("", self.scope) and not (self.sparse and value is None):
                record |= field.metadata["form"].write(field.name, value)
        return record

    @classmethod
    def from_dict(cls: type[M], record: Fields) -> M:
        """Of any version: keys that are not known here are left alone, and None stands for those
        that are missing or no number where one belongs."""
        return cls(
            **{f.name: f.metadata["form"].read(f.name, record) for f in dataclasses.fields(cls)}
        )

    @classmethod
    def table(cls, name: str) -> list[Metric]:
        """What the report's table of this name shows, in its order."""
        return [
            Metric(f"{part}_{field.name}" if part else field.name, about["unit"], field.name, part)
            for field in dataclasses.fields(cls)
            if (about := field.metadata)["table"] == name
            for part in about["parts"]
        ]


def _field(
    form: Form,
    default: object = None,
    *,
    unit: str = "",
    table: str = "",
    of: str = "",
    parts: tuple[str | None, ...] = (None,),
) -> Any:
    about = {"form": form, "unit": unit, "table": table, "of": of, "parts": parts}
    return dataclasses.field(default=default, metadata=about)


def metric(unit: str = "", *, table: str = "", of: str = "") -> Any:
    """A number. ``table``: of the report, that shows it; ``of``: the scope that measures it, where
    not all do."""

    def read(name: str, record: Fields) -> object:
        value = record.get(name)
        return value if is_number(value) else None

    return _field(Form(read), unit=unit, table=table, of=of)


def summary_of(unit: str, *parts: str, table: str = "", of: str = "") -> Any:
    """A ``Summary``, each part under a key of its own. ``parts``: those that ``table`` shows."""
    names = [field.name for field in dataclasses.fields(Summary)]

    def read(name: str, record: Fields) -> object:
        values = [record.get(f"{part}_{name}") for part in names]
        return Summary(*(value if is_number(value) else None for value in values))

    def write(name: str, value: Summary) -> Record:
        return {f"{part}_{name}": getattr(value, part) for part in names}

    return _field(Form(read, write), Summary(), unit=unit, table=table, of=of, parts=parts)


def fact(kind: type, *, of: str = "") -> Any:
    """What is no number: a text, a list, a mapping."""

    def read(name: str, record: Fields) -> object:
        value = record.get(name)
        return value if isinstance(value, kind) else None

    return _field(Form(read), of=of)


def group(kind: type[Metrics], default: Metrics | None = None, *, of: str = "") -> Any:
    """Figures whose keys stand among those of the whole record. None: none of the keys is there."""

    def read(name: str, record: Fields) -> object:
        known = any(field.name in record for field in dataclasses.fields(kind))
        return kind.from_dict(record) if known else default

    return _field(
        Form(read, lambda name, value: {} if value is None else value.to_dict()), default, of=of
    )


def nested(kind: type[Metrics]) -> Any:
    """Figures in an object of their own."""
    return _field(
        Form(
            lambda name, record: kind.from_dict(record.get(name) or {}),
            lambda name, value: {name: value.to_dict()},
        ),
        kind(),
    )
