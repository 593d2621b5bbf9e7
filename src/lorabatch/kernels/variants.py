"""One source, several variants of the kernels, one for each kind of processor: which of them this
machine can run.

Bits differ between variants. ``LORABATCH_KERNELS`` names one (to get equal bits on unequal nodes,
and for tests), or ``off``: everything then runs on torch's own operators, which stay tested; on
GPUs on its public ones, one by one.
"""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass

from lorabatch import processor
from lorabatch.errors import UnavailableError, UsageError, nearest

SWITCH = "LORABATCH_KERNELS"
# by their names in /proc/cpuinfo; what AVX2_FLAGS let the compiler use
AVX2 = frozenset({"avx2", "fma", "f16c", "bmi1", "bmi2", "movbe", "abm"})
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"}


@dataclass(frozen=True)
class Variant:
    name: str
    needs: frozenset[str]  # of the flags in /proc/cpuinfo
    flags: tuple[str, ...]  # of the compiler
    vendor: str | None = None  # the only one where it is the best; None: everywhere
    tiles: bool = False  # products run in matrix tiles
    for_tests: bool = False  # never chosen, only named


ARM = frozenset({"asimd"})
ARM_DOT = ARM | {"asimddp"}
VNNI = AVX512 | {"avx512_vnni"}
BF16 = VNNI | {"avx512_bf16"}
AVX2_FLAGS = ("-march=haswell", "-mtune=generic")
AVX512_FLAGS = (*AVX2_FLAGS, *sorted(f"-m{name}" for name in AVX512 - AVX2))
VNNI_FLAGS = (*AVX512_FLAGS, "-mavx512vnni")
BF16_FLAGS = (*VNNI_FLAGS, "-mavx512bf16")
VARIANTS = (  # the best first
    Variant(
        "amx", BF16 | {"amx_tile", "amx_bf16", "amx_int8"}, (*BF16_FLAGS, "-DTILES"), tiles=True
    ),
    Variant("zen4", BF16, (*BF16_FLAGS, "-DFAST_BF16_DOT"), vendor="AuthenticAMD"),
    Variant("vnni", VNNI, VNNI_FLAGS),
    Variant("avx512", AVX512, AVX512_FLAGS),
    Variant("avxvnni", AVX2 | {"avx_vnni"}, (*AVX2_FLAGS, "-mavxvnni")),
    Variant("avx2", AVX2, AVX2_FLAGS),
    Variant("arm-bf16", ARM_DOT | {"bf16", "i8mm"}, ("-march=armv8.2-a+dotprod+bf16+i8mm",)),
    Variant("arm-dot", ARM_DOT, ("-march=armv8.2-a+dotprod",)),
    Variant("arm", ARM, ("-march=armv8-a",)),
    Variant(
        "emulated-amx",
        BF16,
        (*BF16_FLAGS, "-DTILES", "-DEMULATE_TILES"),
        tiles=True,
        for_tests=True,
    ),
)


def related() -> list[Variant]:
    """The variants for this kind of processor, x86 or ARM, whether it runs them or not."""
    arm = processor.flags() >= ARM
    return [v for v in VARIANTS if (v.needs >= ARM) == arm]


def wanted() -> str:
    """A variant, "off", or "on": the best one."""
    return os.environ.get(SWITCH, "on")


def candidates() -> list[Variant]:
    """The variants to try in turn. Raises for a value of LORABATCH_KERNELS that cannot serve:
    UsageError if it is unknown, UnavailableError if this processor lacks it."""
    name = wanted()
    if name == "off":
        return []
    if name == "on":
        return [v for v in VARIANTS if not v.for_tests and lacks(v) is None]
    by_name = {v.name: v for v in VARIANTS}
    if name not in by_name:
        raise UsageError(
            f"unknown variant of the kernels: '{name}'",
            where=SWITCH,
            fix=nearest(name, ["on", "off", *by_name]),
        )
    missing = lacks(by_name[name], named=True)
    if missing is not None:
        here = ", ".join(v.name for v in VARIANTS if lacks(v, named=True) is None) or "none"
        raise UnavailableError(
            f"this machine cannot run it ({missing})",
            where=f"{SWITCH}={name}",
            fix=f"it can run: {here}, off",
        )
    return [by_name[name]]


def lacks(candidate: Variant, *, named: bool = False) -> str | None:
    """What this machine lacks for a variant. The vendor counts only where nobody named the variant:
    the instructions are the same."""
    missing = sorted(candidate.needs - processor.flags())
    if missing:
        return f"the processor has no {', '.join(missing)}"
    if candidate.vendor not in (None, processor.vendor()) and not named:
        return f"not faster on a processor of {processor.vendor() or 'an unknown vendor'}"
    return tiles_refused() if candidate.tiles and not candidate.for_tests else None


@functools.cache
def tiles_refused() -> str | None:
    """Why the operating system does not let this process use tiles; asks for the permission, which
    then holds for all of its threads.

    Without it the first tile instruction ends the process. Source: Linux,
    Documentation/arch/x86/xstate.rst.
    """
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        refused = libc.syscall(
            ctypes.c_long(arch_prctl), ctypes.c_long(request_permission), ctypes.c_long(tile_data)
        )
    except (OSError, AttributeError) as error:
        return f"no way to ask for tiles: {error}"
    return (
        f"the operating system does not permit tiles: {os.strerror(ctypes.get_errno())}"
        if refused
        else None
    )
