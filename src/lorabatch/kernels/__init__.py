"""The C++ kernels for CPUs: compiled beforehand or at first use (``build``), loaded through cffi
(``api``), or done without.

The best variant that this machine can run serves (``variants``).
"""

from __future__ import annotations

import functools
import subprocess
import sys

from lorabatch import processor
from lorabatch.errors import UnavailableError
from lorabatch.kernels import build, variants
from lorabatch.kernels.api import CData
from lorabatch.kernels.variants import SWITCH, VARIANTS, Variant, wanted


@functools.cache
def library(name: str) -> CData | None:
    """The compiled ``name``.cpp in the best variant that this machine runs; None where there is
    none (said once, unless it was turned off or cannot be expected here).

    Raises UnavailableError or UsageError for a variant that was named and cannot serve.
    """
    loaded = _load(name)
    return loaded[1] if loaded else None


def variant() -> str | None:
    """Name of the variant that serves; None: torch's own operators do."""
    loaded = _load("step")
    return loaded[0].name if loaded else None


def has_tiles() -> bool:
    """Whether training's products run in matrix tiles (AMX)."""
    loaded = _load("train")
    return loaded is not None and loaded[0].tiles


def torch_has_tiles() -> bool:
    """Whether torch's own bf16 products may run in tiles here, whatever variant of ours serves."""
    return {"amx_tile", "amx_bf16"} <= processor.flags() and variants.tiles_refused() is None


def why_not() -> dict[str, str]:
    """Variants that would be better than the one that serves -> what each lacks; "kernels" -> why
    none serves at all."""
    reasons: dict[str, str] = {}
    if wanted() == "off":
        return {"kernels": f"turned off ({SWITCH}=off)"}
    serves = variant()
    for candidate in variants.related():
        if candidate.name == serves or candidate.for_tests:
            break
        reasons[candidate.name] = (
            variants.lacks(candidate)
            or _failed.get(("step", candidate.name))
            or f"not asked for ({SWITCH}={serves})"
        )
    return reasons


def check() -> None:
    """Raises for a value of LORABATCH_KERNELS that cannot serve: UsageError if it is unknown,
    UnavailableError if this processor lacks it."""
    variants.candidates()


# (library, variant) -> why it could not be built or loaded
_failed: dict[tuple[str, str], str] = {}
_without: list[str] = []  # libraries of which no variant could be built


@functools.cache
def _load(name: str) -> tuple[Variant, CData] | None:
    candidates = variants.candidates()
    for candidate in candidates:
        try:
            loaded = build.load(name, candidate)
        except (OSError, subprocess.SubprocessError) as error:
            _failed[name, candidate.name] = reason_of(error)
            continue
        _say_what_is_missed(name, candidate)
        return candidate, loaded
    if candidates:
        reason = next(reason for (library, _), reason in _failed.items() if library == name)
        if wanted() != "on":
            raise UnavailableError(
                f"this variant of the kernels could not be built ({reason})",
                where=f"{SWITCH}={candidates[0].name}",
                fix="unset it",
            )
        if not _without:  # one line for all
            print(
                f"CPU kernels: {name} not built ({reason}): torch's own operators serve",
                file=sys.stderr,
            )
        _without.append(name)
    return None


def reason_of(error: OSError | subprocess.SubprocessError) -> str:
    """The first line that the compiler or the system said."""
    if isinstance(error, subprocess.CalledProcessError):
        said = str(error.stderr or "").strip() or f"{error.cmd[0]} ended with {error.returncode}"
    else:
        said = str(error).strip() or type(error).__name__
    return said.splitlines()[0]


def _say_what_is_missed(name: str, serves: Variant) -> None:
    """One line where the processor has a better variant than the one that serves, and nobody chose
    so."""
    if wanted() != "on" or name != "step":
        return
    for better in VARIANTS[: VARIANTS.index(serves)]:
        could = better.tiles and better.needs <= processor.flags()
        reason = _failed.get((name, better.name)) or (variants.tiles_refused() if could else None)
        if reason:
            print(
                f"CPU kernels: {better.name} does not serve ({reason}): {serves.name} does",
                file=sys.stderr,
            )
