"""The C++ kernels for CPUs: compiled on the machine that runs them, loaded through ctypes, or done without.

A source file beside this one becomes a shared library with a plain C interface, so it depends on no
version of torch. OpenMP is deliberately not linked: its symbols resolve to the copy that torch has
loaded, and both share one pool of threads (two pools on the same cores would fight each other).

One source, several variants, one for each kind of processor; the best that this machine can run serves. Bits differ between variants.
``LORABATCH_KERNELS`` names one (to get equal bits on unequal nodes, and for tests), or ``off``: everything then runs on torch's own
operators, which stay tested.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lorabatch import processor
from lorabatch.errors import UnavailableError, UsageError, nearest

SWITCH = "LORABATCH_KERNELS"
SOURCES = Path(__file__).parent
AVX512 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"})  # what every kernel is written for
# No "native": what one node built serves all nodes of its variant.
FLAGS = (
    "-O3",
    "-std=c++17",
    "-fopenmp",
    "-fPIC",
    "-fno-math-errno",
    "-w",
    "-march=haswell",
    "-mtune=generic",
    *sorted(f"-m{f}" for f in AVX512),
)
COMPILE_TIMEOUT_S = 300
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
SYMBOLS = {"step": ("lb_run", "lb_pack", "lb_max_queries"), "train": ("lb_attend_float32", "lb_attend_bfloat16", "lb_product_bfloat16")}


@dataclass(frozen=True)
class Variant:
    name: str
    needs: frozenset[str]  # of the flags in /proc/cpuinfo
    flags: tuple[str, ...]  # of the compiler
    vendor: str | None = None  # the only one where it is the best; None: everywhere
    tiles: bool = False  # products run in matrix tiles
    for_tests: bool = False  # never chosen, only named


VNNI = frozenset({"avx512_vnni"})
BF16 = frozenset({"avx512_bf16"})
VARIANTS = (  # the best first
    Variant("amx", VNNI | BF16 | {"amx_tile", "amx_bf16", "amx_int8"}, ("-mavx512vnni", "-mavx512bf16", "-DTILES"), tiles=True),
    Variant("zen4", VNNI | BF16, ("-mavx512vnni", "-mavx512bf16", "-DFAST_BF16_DOT"), vendor="AuthenticAMD"),
    Variant("vnni", VNNI, ("-mavx512vnni",)),
    Variant("avx512", frozenset(), ()),
    Variant("emulated-amx", VNNI | BF16, ("-mavx512vnni", "-mavx512bf16", "-DTILES", "-DEMULATE_TILES"), tiles=True, for_tests=True),
)


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled ``name``.cpp in the best variant that this machine runs; None where there is none (said once, unless it was turned off or
    cannot be expected here).

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
    return {"amx_tile", "amx_bf16"} <= processor.flags() and _tiles_refused() is None


def why_not() -> dict[str, str]:
    """Variants that would be better than the one that serves -> what each lacks; "kernels" -> why none serves at all."""
    reasons: dict[str, str] = {}
    if os.environ.get(SWITCH, "on") == "off":
        return {"kernels": f"turned off ({SWITCH}=off)"}
    serves = variant()
    for candidate in VARIANTS:
        if candidate.name == serves or candidate.for_tests:
            break
        reasons[candidate.name] = _lacks(candidate) or _failed.get(("step", candidate.name)) or f"not asked for ({SWITCH}={serves})"
    return reasons


def check() -> None:
    """Raises for a value of LORABATCH_KERNELS that cannot serve: UsageError if it is unknown, UnavailableError if this processor lacks it."""
    _candidates()


_failed: dict[tuple[str, str], str] = {}  # (library, variant) -> why it could not be built or loaded


@functools.cache
def _load(name: str) -> tuple[Variant, ctypes.CDLL] | None:
    candidates, named = _candidates(), os.environ.get(SWITCH, "on") != "on"
    for candidate in candidates:
        try:
            loaded = _loaded(name, candidate)
        except (OSError, subprocess.SubprocessError) as error:
            lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
            _failed[name, candidate.name] = lines[0] if lines else type(error).__name__
            continue
        _say_what_is_missed(name, candidate)
        return candidate, loaded
    if candidates:
        reason = next(reason for (library, _), reason in _failed.items() if library == name)
        if named:
            raise UnavailableError(
                f"this variant of the kernels could not be built ({reason})", where=f"{SWITCH}={candidates[0].name}", fix="unset it"
            )
        print(f"CPU kernels: {name} not built ({reason}): torch's own operators serve", file=sys.stderr)
    return None


def _say_what_is_missed(name: str, serves: Variant) -> None:
    """One line where the processor has a better variant than the one that serves, and nobody chose so."""
    if os.environ.get(SWITCH, "on") != "on" or name != "step":
        return
    for better in VARIANTS[: VARIANTS.index(serves)]:
        reason = _failed.get((name, better.name)) or (_tiles_refused() if better.tiles and better.needs <= processor.flags() else None)
        if reason:
            print(f"CPU kernels: {better.name} does not serve ({reason}): {serves.name} does", file=sys.stderr)


def _candidates() -> list[Variant]:
    """The variants to try in turn."""
    wanted = os.environ.get(SWITCH, "on")
    if wanted == "off":
        return []
    if wanted == "on":
        return [v for v in VARIANTS if not v.for_tests and _lacks(v) is None]
    by_name = {v.name: v for v in VARIANTS}
    if wanted not in by_name:
        raise UsageError(f"unknown variant of the kernels: '{wanted}'", where=SWITCH, fix=nearest(wanted, ["on", "off", *by_name]))
    lacks = _lacks(by_name[wanted], named=True)
    if lacks is not None:
        here = ", ".join(v.name for v in VARIANTS if _lacks(v, named=True) is None) or "none"
        raise UnavailableError(f"this machine cannot run it ({lacks})", where=f"{SWITCH}={wanted}", fix=f"it can run: {here}, off")
    return [by_name[wanted]]


def _lacks(candidate: Variant, *, named: bool = False) -> str | None:
    """What this machine lacks for a variant. The vendor counts only where nobody named the variant: the instructions are the same."""
    missing = sorted((AVX512 | candidate.needs) - processor.flags())
    if missing:
        return f"the processor has no {', '.join(missing)}"
    if candidate.vendor not in (None, processor.vendor()) and not named:
        return f"not faster on a processor of {processor.vendor() or 'an unknown vendor'}"
    return _tiles_refused() if candidate.tiles and not candidate.for_tests else None


@functools.cache
def _tiles_refused() -> str | None:
    """Why the operating system does not let this process use tiles; asks for the permission, which then holds for all of its threads.

    Without it the first tile instruction ends the process. Source: Linux, Documentation/arch/x86/xstate.rst.
    """
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        refused = libc.syscall(ctypes.c_long(arch_prctl), ctypes.c_long(request_permission), ctypes.c_long(tile_data))
    except (OSError, AttributeError) as error:
        return f"no way to ask for tiles: {error}"
    return f"the operating system does not permit tiles: {os.strerror(ctypes.get_errno())}" if refused else None


def _loaded(name: str, candidate: Variant) -> ctypes.CDLL:
    """The library, from the cache if it is there; a file there that is not ours to trust or not whole is built anew."""
    path = _cached_path(name, candidate)
    if path.exists():
        try:
            return _open(path, name)
        except OSError:
            path.unlink(missing_ok=True)
    _compile(name, candidate, path)
    return _open(path, name)


def _open(path: Path, name: str) -> ctypes.CDLL:
    if not _private(path):
        raise OSError(f"{path} belongs to another user or others may write it")
    loaded = ctypes.CDLL(str(path))
    missing = [symbol for symbol in SYMBOLS[name] if not hasattr(loaded, symbol)]
    if missing:
        raise OSError(f"{path} has no {missing[0]}")
    return loaded


def _cached_path(name: str, candidate: Variant) -> Path:
    """Where the library for this source, compiler and variant is or will be."""
    key = hashlib.sha256("\0".join([*FLAGS, *candidate.flags, _compiler()]).encode())
    for source in sorted((*SOURCES.glob("*.h"), SOURCES / f"{name}.cpp")):
        key.update(source.read_bytes())
    return _cache_folder() / f"{name}-{candidate.name}-{key.hexdigest()[:16]}.so"


def _compiler() -> str:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise OSError("no C++ compiler on the PATH")
    return compiler


def _compile(name: str, candidate: Variant, target: Path) -> None:
    compiler = shlex.split(_compiler())
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        build = Path(work)
        _run([*compiler, *FLAGS, *candidate.flags, "-c", str(SOURCES / f"{name}.cpp"), "-o", str(build / "kernels.o")])
        _run([*compiler, "-shared", str(build / "kernels.o"), "-o", str(build / "kernels.so")])
        (build / "kernels.so").chmod(0o700)
        (build / "kernels.so").replace(target)  # at once: a concurrent process sees all of it or nothing


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)


@functools.cache
def _cache_folder() -> Path:
    """``~/.cache/lorabatch/kernels``; where that is not ours alone to write, a folder for this process.

    A library is code that runs with the user's rights: nobody else may be able to put one there.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lorabatch" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for own in (folder.parent, folder):
            if own.lstat().st_uid == os.geteuid() and not own.is_symlink():
                own.chmod(own.stat().st_mode & ~OTHERS_WRITE)  # a umask of 002 made it
        if os.access(folder, os.W_OK) and all(map(_private, (folder, folder.parent))):
            return folder
        reason = "is not this user's alone to write"
    except OSError as error:
        reason = f"cannot be made ({error.strerror})"
    print(f"CPU kernels: {folder} {reason}: compiled for this process alone; set XDG_CACHE_HOME to a folder of your own", file=sys.stderr)
    return Path(tempfile.mkdtemp(prefix="lorabatch-kernels-"))


def _private(path: Path) -> bool:
    """Whether the path itself (not what a link points to) is this user's and only this user may write it."""
    status = path.lstat()
    return status.st_uid == os.geteuid() and not status.st_mode & OTHERS_WRITE and not stat.S_ISLNK(status.st_mode)
