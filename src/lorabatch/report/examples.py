"""Completions to read: of the base model and of an adapter side by side, or of one run alone."""

from __future__ import annotations

from collections.abc import Sequence

from lorabatch.report.blocks import Block, Example, Examples, Paragraph, Section
from lorabatch.report.load import InferRun
from lorabatch.report.pairing import Pairing, pairings, spread
from lorabatch.report.words import Words

MAX_EXAMPLES = 12
MAX_CHARACTERS = 800  # of a prompt or completion that is shown


def example_sections(words: Words, inferred: Sequence[InferRun]) -> list[Section]:
    found = pairings(inferred)
    if found:
        blocks = [block for pairing in found for block in _pair_blocks(words, pairing)]
        return [Section("examples", words("examples"), blocks)]
    answered = [(run, [c for c in run.completions if c.error is None]) for run in inferred]
    run, completions = next((pair for pair in answered if pair[1]), (None, []))
    if run is None:
        return []
    shown = spread(completions, MAX_EXAMPLES)
    items = [
        Example(c.id, _clipped(words, c.prompt), [(run.label, _clipped(words, c.text))])
        for c in shown
    ]
    note = words("no_pairs", shown=len(shown), count=words.number(len(completions)), run=run.label)
    blocks = [Paragraph(note), Examples(words("prompt"), items)]
    return [Section("examples", words("examples_single"), blocks)]


def _pair_blocks(words: Words, pairing: Pairing) -> list[Block]:
    shown = spread(pairing.pairs, MAX_EXAMPLES)
    heads = words("before", run=pairing.base.label), words("after", run=pairing.tuned.label)
    note = words(
        "pairs",
        shown=len(shown),
        count=words.number(len(pairing.pairs)),
        same=words.number(sum(before.text == after.text for before, after in pairing.pairs)),
        base=pairing.base.label,
        tuned=f"{pairing.tuned.label} ({pairing.tuned.adapter})",
    )
    items = [
        Example(
            b.id,
            _clipped(words, b.prompt),
            [(heads[0], _clipped(words, b.text)), (heads[1], _clipped(words, a.text))],
        )
        for b, a in shown
    ]
    return [Paragraph(note), Examples(words("prompt"), items)]


def _clipped(words: Words, text: str) -> str:
    text = text.strip()
    if len(text) > MAX_CHARACTERS:
        more = words("more_characters", n=words.number(len(text) - MAX_CHARACTERS))
        return f"{text[:MAX_CHARACTERS]} {more}"
    return text or words("no_text")
