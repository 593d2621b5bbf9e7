"""Personal data that rules can find: numbers, contacts, record numbers. Never names of persons.

What is found leaves this file as its kind and a masked form only.
"""

from __future__ import annotations

import ipaddress
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lorabatch.check import numbers
from lorabatch.check.characters import Signs, characters_of, signs_of

NEAR = 30  # characters between a keyword and the number that it announces
REACH = 40  # characters before and after a run of digits that are looked at with it
AREA_CODES = {
    *(str(n) for n in range(11, 20)),
    *("21", "22", "24", "27", "28", "31", "32", "33", "34", "35", "37", "38"),
    *(str(n) for n in range(41, 50)),
    *("51", "53", "54", "55", *(str(n) for n in range(61, 70))),
    *("71", "73", "74", "75", "77", "79", *(str(n) for n in range(81, 90))),
    *(str(n) for n in range(91, 100)),
}
RESERVED = re.compile(r"(?:^|[./@])example\.(?:com|org|net)\b|\.(?:example|invalid|test)\b", re.I)
DATE = (
    r"\d{1,2}[/.-]\d{1,2}[/.-]\d{2,4}|\d{4}-\d{2}-\d{2}"
    r"|\d{1,2} (?:de )?[^\W\d_]{3,9} (?:de )?\d{4}|[^\W\d_]{3,9} \d{1,2}, ?\d{4}"
)
# What counts the parts of a text in the form of an address.
SECTION = re.compile(
    r"\b(?:section|se[çc][ãa]o|chapter|cap[íi]tulo|item|table|tabela|version|vers[ãa]o|v)\W*$", re.I
)


@dataclass(frozen=True)
class Identifier:
    row: str  # "pii.number", "pii.contact" or "pii.record"
    kind: str
    masked: str


@dataclass(frozen=True)
class Pattern:
    """``valid`` gets letters and digits only. With ``keyword`` a match without its punctuation
    counts if that stands near it; without ``punctuated`` every match needs it."""

    row: str
    kind: str
    pattern: re.Pattern[str]
    valid: Callable[[str], bool] = lambda characters: True
    punctuated: re.Pattern[str] | None = None
    keyword: re.Pattern[str] | None = None
    shown: int = 0  # characters at the end that stay readable

    def find(self, text: str, start: int = 0, end: int = sys.maxsize) -> Iterator[Identifier]:
        for found in self.pattern.finditer(text, start, end):
            characters = re.sub(r"[\W_]", "", found.group())
            if self._counts(found, text) and self.valid(characters):
                yield Identifier(self.row, self.kind, _masked(found.group(), self.shown))

    def _counts(self, found: re.Match[str], text: str) -> bool:
        if self.punctuated is None and self.keyword is None:
            return True
        if self.punctuated and self.punctuated.fullmatch(found.group()):
            return True
        around = text[max(0, found.start() - NEAR) : found.end() + NEAR]
        return self.keyword is not None and self.keyword.search(around) is not None


def _masked(text: str, shown: int) -> str:
    hidden = len(text) - shown
    return re.sub(r"[^\W_]", "*", text[:hidden]) + text[hidden:]


def _telephone(digits: str) -> bool:
    """Of Brazil, and no two years after a number of two digits."""
    local = digits.removeprefix("55") if len(digits) > 11 else digits
    years = len(local) == 10 and local[2:4] in ("19", "20") and local[6:8] in ("19", "20")
    return local[:2] in AREA_CODES and not years


NUMBER = "pii.number"
CONTACT = "pii.contact"
RECORD = "pii.record"
# Around runs of seven digits and more.
DIGIT_RUN = re.compile(r"\d(?:[ ./()-]{0,2}\d){6}")
LONG: tuple[Pattern, ...] = (
    Pattern(
        NUMBER,
        "CPF",
        re.compile(r"(?<![\w.,/-])\d{3}\.?\d{3}\.?\d{3}-?\d{2}(?![\w/-])"),
        numbers.is_cpf,
        punctuated=re.compile(r"\d{3}\.\d{3}\.\d{3}-\d{2}"),
        keyword=re.compile(r"\bCPF\b", re.I),
        shown=2,
    ),
    Pattern(
        NUMBER,
        "CNS",
        re.compile(r"(?<![\w.,/-])[12789]\d{2}[ .]?\d{4}[ .]?\d{4}[ .]?\d{4}(?![\w/-])"),
        numbers.is_cns,
        keyword=re.compile(r"\bCNS\b|nacional de sa[úu]de|cart[ãa]o (?:do |d[ae] )?SUS", re.I),
        shown=2,
    ),
    Pattern(
        NUMBER,
        "SSN",
        re.compile(r"(?<![\w.,/-])\d{3}-\d{2}-\d{4}(?![\w/-])"),
        numbers.is_ssn,
    ),
    Pattern(
        NUMBER,
        "card",
        re.compile(r"(?<![\w.,/-])(?:\d[ -]?){12,18}\d(?![\w/-])"),
        numbers.is_card,
        keyword=re.compile(r"\b(?:credit|debit|visa|mastercard|cr[ée]dito|d[ée]bito)\b", re.I),
        shown=2,
    ),
    Pattern(
        NUMBER,
        "IBAN",
        re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)"),
        numbers.is_iban,
        shown=2,
    ),
    Pattern(
        CONTACT,
        "telephone",
        re.compile(r"(?<![\w.,/-])(?:\+55 ?)?\(?\d{2}\)? ?9?\d{4}-\d{4}(?![\w/-])"),
        _telephone,
    ),
    Pattern(
        CONTACT,
        "telephone",
        re.compile(
            r"(?<![\w.,/-])(?:\+?1[ .-])?\(?[2-9]\d{2}\)?[ .-][2-9]\d{2}[.-]\d{4}(?![\w/-])"
        ),
    ),
    Pattern(
        CONTACT,
        "telephone",
        re.compile(r"(?<![\w.,/-])\(?\d{2}\)? ?9?\d{4} ?\d{4}(?![\w/-])"),
        _telephone,
        keyword=re.compile(r"\b(?:tel|fone|telefone|cel|celular|whatsapp|phone)\b", re.I),
    ),
    Pattern(CONTACT, "CEP", re.compile(r"(?<![\w.,/-])\d{5}-\d{3}(?![\w/-])")),
)
CNPJ = Pattern(
    CONTACT,
    "CNPJ",
    re.compile(
        r"(?<![\w.,/-])[0-9A-Z]{2}\.?[0-9A-Z]{3}\.?[0-9A-Z]{3}/?[0-9A-Z]{4}-?\d{2}(?![\w/-])"
    ),
    numbers.is_cnpj,
    punctuated=re.compile(r"[0-9A-Z]{2}(?:\.[0-9A-Z]{3}){2}/[0-9A-Z]{4}-\d{2}"),
    keyword=re.compile(r"\bCNPJ\b"),
    shown=2,
)
EMAIL = Pattern(CONTACT, "e-mail", re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"))
URL = Pattern(CONTACT, "URL", re.compile(r"(?:https?://|\bwww\.)[^\s/<>()]+/[^\s<>()]+"))
CRM = Pattern(CONTACT, "CRM", re.compile(r"\bCRM[ /-]?(?:[A-Z]{2})?[ /-]?\d{4,6}\b"))
ADDRESS = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.])")
RECORD_WORDS = ("mrn", "medical record", "prontu", "registro", "matr", "atendimento")
RECORD_NUMBER = re.compile(
    r"\b(?:MRN|medical record|prontu[áa]rio|registro|matr[íi]cula|atendimento)\W{0,8}"
    r"(?:(?:number|n[úu]mero|num|no|n[ºo°])(?!\w)[.:]*)?\W{0,8}"
    r"(?:(?!(?:19|20)\d\d\b)\d{4,12}|\d{1,3}(?:\.\d{3})+)\b",
    re.I,
)
BIRTH_WORDS = ("born", "dob", "date of birth", "nascid", "nascimento", "dn")
BIRTH = re.compile(
    rf"\b(?:born(?: on)?|DOB|date of birth|nascid[oa](?: em)?|(?:data de )?nascimento|DN)"
    rf"\W{{0,12}}(?:{DATE})",
    re.I,
)
AGE = re.compile(
    r"(?<![\w.,/-])(?:9\d|1[0-2]\d)"
    r"(?:[ -]years?[ -](?:old\b|of age\b)| anos de idade\b| a\.(?= ))"
    r"|(?<=paciente, )(?:9\d|1[0-2]\d) anos\b|(?<=paciente de )(?:9\d|1[0-2]\d) anos\b",
    re.I,
)


def identifiers(text: str, signs: Signs | None = None, number: int = 0) -> Iterator[Identifier]:
    """Everything found, in no order. signs: of several texts, of which this is one."""
    has = signs or signs_of(characters_of([text]))
    if has.number[number]:
        yield from _numbers(text)
    if has.company[number] or has.number[number]:
        yield from CNPJ.find(text)
    if has.at[number]:
        yield from _contacts(text, EMAIL)
    if has.slash[number] and ("://" in text or "www." in text):
        yield from _contacts(text, URL)
    if has.digits[number]:
        yield from CRM.find(text)
        yield from _records(text)
    if has.address[number]:
        yield from _addresses(text)
    if has.age[number]:
        for found in AGE.finditer(text):
            yield Identifier(RECORD, "age over 89", _masked(found.group(), 0))


def _numbers(text: str) -> Iterator[Identifier]:
    end = 0
    for run in DIGIT_RUN.finditer(text):
        if run.start() >= end:  # else it was looked at with an earlier one
            start, end = max(end, run.start() - REACH), run.end() + REACH
            for pattern in LONG:
                yield from pattern.find(text, start, end)


def _contacts(text: str, pattern: Pattern) -> Iterator[Identifier]:
    """But for those that no one can have."""
    for found in pattern.pattern.finditer(text):
        if not RESERVED.search(found.group()):
            yield Identifier(pattern.row, pattern.kind, _masked(found.group(), 0))


def _addresses(text: str) -> Iterator[Identifier]:
    for found in ADDRESS.finditer(text):
        parts = found.group().split(".")
        known = all(int(part) < 256 and str(int(part)) == part for part in parts)
        known = known and not SECTION.search(text[max(0, found.start() - 10) : found.start()])
        if known and ipaddress.ip_address(found.group()).is_global:
            yield Identifier(CONTACT, "IP address", _masked(found.group(), 0))


def _records(text: str) -> Iterator[Identifier]:
    lower = text.lower()
    for words, kind, pattern in (
        (RECORD_WORDS, "record number", RECORD_NUMBER),
        (BIRTH_WORDS, "date of birth", BIRTH),
    ):
        if any(word in lower for word in words):
            for found in pattern.finditer(text):
                yield Identifier(RECORD, kind, _masked(found.group(), 0))
