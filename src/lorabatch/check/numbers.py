"""Check digits and ranges of the numbers that name one person: whether a number can be a real
one."""

from __future__ import annotations

from collections.abc import Sequence

# Published as examples or in advertisements, and used as fakes since.
FAKE_SSN = {"078051120", "219099999", "457555462"}


def is_cpf(digits: str) -> bool:
    """Brazil's taxpayer number. Eleven equal digits pass the arithmetic and are nobody's."""
    return len(set(digits)) > 1 and all(
        _mod11(digits[:length], range(length + 1, 1, -1)) == int(digits[length])
        for length in (9, 10)
    )


def is_cnpj(characters: str) -> bool:
    """Brazil's number of a company, with letters since July 2026: a character counts as its
    distance from "0"."""
    weights = (6, 5, 4, 3, 2, 9, 8, 7, 6, 5, 4, 3, 2)
    return len(set(characters)) > 1 and all(
        _mod11(characters[:length], weights[-length:]) == int(characters[length])
        for length in (12, 13)
    )


def _mod11(characters: str, weights: Sequence[int]) -> int:
    rest = sum(w * (ord(c) - ord("0")) for c, w in zip(characters, weights, strict=True)) % 11
    return 0 if rest < 2 else 11 - rest


def is_cns(digits: str) -> bool:
    """Card of Brazil's health system (SUS); 1 and 2 begin numbers that were made from another
    one."""
    weighted = sum(weight * int(d) for weight, d in zip(range(15, 0, -1), digits, strict=True))
    made = digits[0] not in "12" or digits[11:14] in ("000", "001")
    return digits[0] in "12789" and weighted % 11 == 0 and made


def is_ssn(digits: str) -> bool:
    """The United States' social security number: it has ranges and no check digit."""
    area, group, serial = digits[:3], digits[3:5], digits[5:]
    given = area not in ("000", "666") and area[0] != "9" and group != "00" and serial != "0000"
    return given and digits not in FAKE_SSN


def is_card(digits: str) -> bool:
    """Luhn's test of payment cards."""
    doubled = (int(d) * (1 + i % 2) for i, d in enumerate(reversed(digits)))
    return len(set(digits)) > 1 and sum(n - 9 * (n > 9) for n in doubled) % 10 == 0


def is_iban(text: str) -> bool:
    """An account's number, without spaces."""
    moved = "".join(str(int(c, 36)) for c in text[4:] + text[:4])
    return 15 <= len(text) <= 34 and int(moved) % 97 == 1
