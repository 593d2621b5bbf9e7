"""The user's mistakes and the machine's refusals, each with an exit code and a way out.

Exit codes follow BSD's sysexits where it has one, so that a job script can act on them:

    0  done
    64 usage        a flag, a key or a value is wrong
    65 bad data     an input file is wrong
    69 unavailable  a needed thing (model, package, device, folder) is not there
    70 failed       the work itself failed (a loss that is not a number, for example), or lorabatch
    has a fault
    75 try again    stopped early with everything saved; the same command resumes from there
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable

# Unicode's categories of controls, of writing direction and width, half pairs, line ends
STEERING = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def visible(text: str) -> str:
    """Text from elsewhere, to be read by people: characters that steer the display of others stand
    as escapes (``\\u202e``)."""
    if text.isprintable():
        return text
    return "".join(
        _escape(c) if c not in "\t\n" and unicodedata.category(c) in STEERING else c for c in text
    )


def _escape(character: str) -> str:
    number = ord(character)
    return (
        f"\\x{number:02x}"
        if number < 256
        else f"\\u{number:04x}"
        if number < 1 << 16
        else f"\\U{number:08x}"
    )


class LorabatchError(Exception):
    """A failure that the user can act on: what happened, where, and what to do, in one line."""

    exit_code = 70

    def __init__(self, what: str, *, where: object = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(self.one_line())

    def one_line(self) -> str:
        parts = [self.what if self.where is None else f"{self.where}: {self.what}"]
        if self.fix:
            parts.append(self.fix)
        return visible(" ".join("; ".join(parts).split()))


class UsageError(LorabatchError):
    exit_code = 64


class DataError(LorabatchError):
    exit_code = 65


class UnavailableError(LorabatchError):
    exit_code = 69


class TrainingError(LorabatchError):
    exit_code = 70


class InterruptedRun(LorabatchError):
    """Stopped by a signal with all finished work on disk."""

    exit_code = 75


def nearest(name: str, known: Iterable[str]) -> str:
    """``"did you mean 'lora_r'?"``, or the list of what is known when nothing is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"
