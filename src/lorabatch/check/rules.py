"""What is looked for, once: from which share on it warns or fails, and how it is said.

Where the thresholds come from: docs/check.md. A share of 0 means: any at all; None: never.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lorabatch.errors import UsageError, nearest
from lorabatch.findings import Finding
from lorabatch.schema import Record

EXAMPLES = 3  # places that a line names


@dataclass(frozen=True)
class Rule:
    warn: float | None
    fail: float | None
    what: str  # after "3 of 100 "
    fix: str
    in_training: bool = True  # linear in the data and without a model: ``train`` looks too
    stops: bool = False  # a training run, whose own result would be false


@dataclass(frozen=True)
class Hit:
    """One line of findings.jsonl. Never a text, and of an identifier its masked form only."""

    check: str
    where: str  # file:line
    partner: str | None = None  # the other document's
    figure: float | None = None
    kind: str | None = None
    masked: str | None = None
    run: int | None = None  # words in a row

    @property
    def place(self) -> str:
        """Short, for a line on the screen."""
        partner = f" = {_short(self.partner)}" if self.partner else ""
        return _short(self.where) + partner


@dataclass(frozen=True)
class Seen:
    """What a check saw. share: of what the rule's thresholds are about, unless it is hits over
    total."""

    check: str
    total: int
    hits: Sequence[Hit] = ()
    share: float | None = None
    text: str | None = None  # all of the sentence
    what: str | None = None  # in place of the rule's words
    note: str = ""
    places: int = 0  # documents with a hit, where one may have several

    @property
    def count(self) -> int:
        return self.places or len(self.hits)

    @property
    def measured(self) -> float:
        return self.count / max(self.total, 1) if self.share is None else self.share


RULES: dict[str, Rule] = {
    "leak.group": Rule(
        0,
        0,
        "validation documents belong to a group that is in training too",
        "split by group: lorabatch split --group_field",
        stops=True,
    ),
    "leak.exact": Rule(
        0,
        0.01,
        "validation texts are in the training file too",
        "remove them from one of the files",
        stops=True,
    ),
    "leak.near": Rule(
        0,
        0.05,
        "validation texts share much with one training text",
        "remove them from one of the files",
    ),
    "leak.eval": Rule(
        0,
        0.01,
        "items of the test files stand in training texts",
        "remove these training documents",
        in_training=False,
    ),
    "dup.exact": Rule(
        0.01,
        None,
        "training documents repeat an earlier one",
        "they are learned as often as they occur: remove the repeats",
    ),
    "dup.near": Rule(
        0.05,
        None,
        "training texts are near-equal to others",
        "they are learned as often as they occur; keep them on one side of a split",
        in_training=False,
    ),
    "dup.conflict": Rule(
        0.01,
        None,
        "training documents answer a prompt that another one answers differently",
        "keep one answer, unless several are right",
    ),
    "pii.number": Rule(
        0,
        0,
        "documents hold numbers that name a person",
        "remove or replace them before training",
    ),
    "pii.contact": Rule(
        0,
        None,
        "documents hold contacts",
        "remove those of persons",
    ),
    "pii.record": Rule(
        0,
        None,
        "documents hold record numbers, dates of birth or ages over 89",
        "remove or replace them before training",
    ),
    "text.broken": Rule(
        0.005,
        None,
        "documents hold damaged characters, or are digits and signs for more than 30 %",
        "look at how the text was extracted",
    ),
    "text.mojibake": Rule(
        0.005,
        None,
        "documents hold UTF-8 that was read as another encoding",
        "read the source as UTF-8 again",
    ),
    "text.language": Rule(
        0.02,
        None,
        "documents are in another language than most",
        "train on one language, or mean it",
        in_training=False,
    ),
    "text.repeat": Rule(
        0.01,
        None,
        "documents repeat one passage for more than 30 % of their length",
        "remove the repeats",
    ),
    "fmt.special": Rule(
        0,
        0.05,
        "documents hold the marks of a chat template in their text",
        "give the bare text: the template is applied by lorabatch",
        in_training=False,
    ),
    "fmt.eos": Rule(
        0.05,
        0.5,
        "answers are cut before their end, so that the model does not learn to stop",
        "raise --max_len or shorten them",
        in_training=False,
    ),
    "fmt.seam": Rule(
        0.01,
        None,
        "prompts end in a space, which belongs to the answer's first token",
        "move it to the beginning of the completion",
    ),
    "len.cut": Rule(
        0.05,
        0.5,
        "supervised tokens are cut",
        "raise --max_len",
        in_training=False,
    ),
    "len.none": Rule(
        0,
        0.05,
        "documents have no token left to learn from",
        "raise --max_len or shorten the prompts",
        in_training=False,
    ),
    "len.outlier": Rule(
        None,
        None,
        "documents are longer than ten times the median, or shorter than three words",
        "",
        in_training=False,
    ),
    "size": Rule(
        0,
        None,
        "",
        "more documents of the same mix give a surer figure",
    ),
}
LEVELS = ("FAIL", "warn", "ok")


def rules_with(warn_at: Iterable[str], fail_at: Iterable[str]) -> dict[str, Rule]:
    """The rules with some thresholds changed: ``dup.near=0.1``, ``pii.number=none``. UsageError for
    what is no check or no share."""
    rules = dict(RULES)
    for text in warn_at:
        name, share = _threshold("warn_at", text)
        rules[name] = replace(rules[name], warn=share)
    for text in fail_at:
        name, share = _threshold("fail_at", text)
        rules[name] = replace(rules[name], fail=share)
    return rules


def _threshold(flag: str, text: str) -> tuple[str, float | None]:
    name, _, value = text.partition("=")
    where = f"--{flag} {text}"
    if name not in RULES:
        raise UsageError("no such check", where=where, fix=nearest(name, RULES))
    try:
        share = None if value == "none" else float(value)
    except ValueError:
        share = -1.0
    if share is not None and not 0 <= share <= 1:
        raise UsageError(
            "not a share", where=where, fix="write NAME=SHARE, from 0 (any) to 1, or NAME=none"
        )
    return name, share


def level(seen: Seen, rule: Rule) -> str:
    if seen.measured > 0:
        if rule.fail is not None and seen.measured >= rule.fail:
            return "FAIL"
        if rule.warn is not None and seen.measured >= rule.warn:
            return "warn"
    return "ok"


def finding(seen: Seen, rules: Mapping[str, Rule]) -> Finding:
    rule = rules[seen.check]
    text = seen.text
    if text is None:
        text = f"{seen.count:,} of {seen.total:,} {seen.what or rule.what}"
        text += f" ({100 * seen.measured:.1f} %)" if seen.count else ""
    text += seen.note
    if seen.hits:
        places = list(dict.fromkeys(hit.place for hit in seen.hits))
        more = ", …" if len(places) > EXAMPLES else ""
        text += f": {', '.join(places[:EXAMPLES])}{more}"
    found = level(seen, rule)
    return Finding(seen.check, found, text, "" if found == "ok" else rule.fix)


def record(seen: Seen, rules: Mapping[str, Rule]) -> Record:
    """What check.json and run.json keep of a check."""
    rule = rules[seen.check]
    return {
        "check": seen.check,
        "level": level(seen, rule),
        "count": seen.count,
        "total": seen.total,
        "share": seen.measured,
        "warn": rule.warn,
        "fail": rule.fail,
    }


def hit_record(hit: Hit) -> Record:
    return asdict(hit)


def _short(where: str) -> str:
    return Path(where).name
