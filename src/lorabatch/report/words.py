"""One language of a report: its words, and how it writes numbers and units.

The texts of ``words/LANGUAGE.toml`` by key, with {names} to fill in; under ``reasons`` why a figure
is null: the English of the records and its translation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lorabatch.rules import is_number
from lorabatch.settings import read_table

LANGUAGES = ("en", "pt")
DECIMALS = {"nats/token": 4, "bits/byte": 4, "%": 1}
DECIMAL_COMMA = str.maketrans(",.", ".,")


@cache
def read_words(language: str) -> dict[str, dict[str, str]]:
    """The tables ``text`` and ``reasons``."""
    return read_table(Path(__file__).with_name("words") / f"{language}.toml")


@dataclass(frozen=True)
class Words:
    language: str

    @property
    def texts(self) -> dict[str, str]:
        return read_words(self.language)["text"]

    def __call__(self, key: str, **values: object) -> str:
        return self.texts[key].format(**values)

    def number(self, value: float | None, decimals: int | None = None) -> str:
        """Three significant digits, whole numbers whole, unless ``decimals`` says otherwise."""
        if value is None or not is_number(value):
            return self("not_measured")
        if decimals is None:
            magnitude = math.floor(math.log10(abs(value))) if value else 2
            decimals = 0 if isinstance(value, int) else min(max(0, 2 - magnitude), 6)
        text = f"{value:,.{decimals}f}".replace("-", "−")
        return text.translate(DECIMAL_COMMA) if self.language == "pt" else text

    def quantity(self, value: float | None, unit: str) -> str:
        """A number with its unit; bytes become KiB, MiB or GiB, shares per cent, rates of bytes and
        flop SI units."""
        if value is None or not is_number(value):
            return self("not_measured")
        if unit == "share":
            value, unit = 100 * value, "%"
        elif unit == "bytes":
            value, unit = _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))
        elif unit in ("bytes/s", "flop/s"):
            value, unit = _scaled(
                value,
                1000,
                tuple(
                    f"{p}{'B/s' if unit == 'bytes/s' else unit}" for p in ("", "k", "M", "G", "T")
                ),
            )
        unit = self.texts.get(f"unit {unit}", unit)
        return f"{self.number(value, DECIMALS.get(unit))}{'' if unit == '%' else ' '}{unit}".strip()

    def reason(self, text: str) -> str:
        """Why a figure is null: the records say it in English, as the sampler or the system said
        it."""
        for recorded, translated in read_words(self.language).get("reasons", {}).items():
            text = text.replace(recorded, translated)
        return text


def _scaled(value: float, base: int, units: tuple[str, ...]) -> tuple[float, str]:
    power = sum(value >= base**p for p in range(1, len(units)))
    return value / base**power, units[power]
