"""What a report is made of, before it is HTML or Markdown. Texts are plain: each renderer escapes
them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Mono:
    """A cell in a fixed-width font: names, values of settings, paths."""

    text: str
    strong: bool = False


Cell = str | Mono


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: list[str]


@dataclass(frozen=True)
class Code:
    text: str


@dataclass(frozen=True)
class Table:
    """The first column names the row; ``numeric`` aligns the others to the right."""

    head: list[str]
    rows: list[list[Cell]]
    numeric: bool = True


@dataclass(frozen=True)
class KeyFigure:
    name: str
    value: str
    note: str


@dataclass(frozen=True)
class KeyFigures:
    figures: list[KeyFigure]


@dataclass(frozen=True)
class Plot:
    """``svg`` has stand-in colours (``figures.themed`` puts real ones in); ``name`` is its file
    name."""

    name: str
    svg: str
    caption: str
    alt: str


@dataclass(frozen=True)
class Example:
    """A prompt and its (heading, completion) pairs, to be read side by side."""

    name: str
    prompt: str
    answers: list[tuple[str, str]]


@dataclass(frozen=True)
class Examples:
    prompt_head: str
    items: list[Example]


Block = Paragraph | Bullets | Code | Table | KeyFigures | Plot | Examples


@dataclass(frozen=True)
class Section:
    """``key`` is the anchor; ``level`` is 2 or, within the section before, 3."""

    key: str
    title: str
    blocks: list[Block] = field(default_factory=list)
    level: int = 2


@dataclass(frozen=True)
class Document:
    language: str
    title: str
    contents_head: str
    sections: list[Section]

    @property
    def plots(self) -> list[Plot]:
        return [
            block
            for section in self.sections
            for block in section.blocks
            if isinstance(block, Plot)
        ]
