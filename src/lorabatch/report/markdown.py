"""A report as Markdown (GitHub's kind). Texts of runs cannot become markup: every special character
is escaped."""

from __future__ import annotations

import re

from lorabatch.report.blocks import (
    Block,
    Bullets,
    Cell,
    Code,
    Document,
    Examples,
    KeyFigures,
    Mono,
    Paragraph,
    Plot,
    Table,
)


def markdown(document: Document) -> str:
    """Plots are referred to as ``fig/NAME.svg``."""
    parts = [f"# {escaped(document.title)}"]
    for section in document.sections:
        parts.append(f"{'#' * section.level} {escaped(section.title)}")
        parts += [_block(block) for block in section.blocks]
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """One line of plain text; line ends become ``<br>``, so that it fits into a table cell."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)
    return re.sub(r"\s*\n\s*", "<br>", text.strip()).replace("\t", " ")


def code_span(text: str) -> str:
    """The fence is longer than any run of backticks inside; a pipe is escaped for tables, as GitHub
    reads it."""
    fence = "`" * (_longest_backticks(text) + 1)
    room = " " if "`" in text else ""
    return f"{fence}{room}{' '.join(text.split()) or ' '}{room}{fence}".replace("|", r"\|")


def _longest_backticks(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _cell(cell: Cell) -> str:
    if isinstance(cell, Mono):
        return f"**{code_span(cell.text)}**" if cell.strong else code_span(cell.text)
    return escaped(cell)


def _block(block: Block) -> str:
    if isinstance(block, Paragraph):
        return escaped(block.text)
    if isinstance(block, Bullets):
        return "\n".join(f"- {escaped(item)}" for item in block.items)
    if isinstance(block, Code):
        fence = "`" * max(3, _longest_backticks(block.text) + 1)
        return f"{fence}bash\n{block.text}\n{fence}"
    if isinstance(block, Plot):
        return f"![{escaped(block.alt)}](fig/{block.name}.svg)\n\n*{escaped(block.caption)}*"
    if isinstance(block, KeyFigures):
        return "\n".join(
            f"- {escaped(f.name)}: **{escaped(f.value)}**"
            + (f"; {escaped(f.note)}" if f.note else "")
            for f in block.figures
        )
    if isinstance(block, Examples):
        heads = ["id", block.prompt_head, *(head for head, _ in block.items[0].answers)]
        return _table(
            Table(
                heads,
                [[Mono(e.name), e.prompt, *(text for _, text in e.answers)] for e in block.items],
                numeric=False,
            )
        )
    return _table(block)


def _table(table: Table) -> str:
    rule = [" --- "] + [" ---: " if table.numeric else " --- "] * (len(table.head) - 1)
    lines = [
        [f" {escaped(head)} " for head in table.head],
        rule,
        *([f" {_cell(cell)} " for cell in row] for row in table.rows),
    ]
    return "\n".join("|" + "|".join(line) + "|" for line in lines)
