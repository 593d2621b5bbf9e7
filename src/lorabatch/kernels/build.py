"""Compiles the kernels, and keeps what was compiled: for all variants of this kind of processor
beforehand (``python -m lorabatch.kernels.prebuild``, which scripts/build.sh runs; a wheel carries
what is there), else at first use on the machine that runs them.

A source file beside this one becomes a shared library with a plain C interface (``api.h``), so it
depends on no version of torch. OpenMP is deliberately not linked: its symbols resolve to the copy
that torch has loaded, and both share one pool of threads (two pools on the same cores would fight
each other).
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

from lorabatch.kernels.api import CData, open_library
from lorabatch.kernels.variants import Variant

SOURCES = Path(__file__).parent
PREBUILT = SOURCES / "prebuilt"
# No "native": what one node built serves all nodes of its variant.
FLAGS = (
    "-O3",
    "-std=c++17",
    "-fopenmp",
    "-fPIC",
    "-fno-math-errno",
    "-ffp-contract=off",  # sums are fused where the source says so: bits of our own choice
    "-w",
)
COMPILE_TIMEOUT_S = 300
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


# Held until the process ends: cffi closes a library that nobody holds, even where a function of it
# is still in somebody's hands.
@functools.cache
def load(name: str, candidate: Variant) -> CData:
    """The library ``name`` (step or train): as it was prebuilt from this very source, else from the
    cache, else compiled now. Raises OSError or subprocess.SubprocessError."""
    path = prebuilt_path(name, candidate)
    if path.exists():
        try:  # who may write there may write this file too, so its owner is not asked
            return open_library(path, name)
        except OSError as error:  # of a newer C library, or damaged
            print(f"CPU kernels: {error}: compiling them here", file=sys.stderr)
    return _compiled_here(name, candidate)


def _compiled_here(name: str, candidate: Variant) -> CData:
    """A file in the cache that is not ours to trust or not whole is built anew."""
    path = _cached_path(name, candidate)
    if path.exists():
        try:
            return _open(path, name)
        except OSError:
            path.unlink(missing_ok=True)
    compile_to(path, name, candidate, mode=0o700)
    return _open(path, name)


def _open(path: Path, name: str) -> CData:
    if not _private(path):
        raise OSError(f"{path} belongs to another user or others may write it")
    return open_library(path, name)


def prebuilt_path(name: str, candidate: Variant) -> Path:
    return PREBUILT / _file_name(name, candidate, "")


def _cached_path(name: str, candidate: Variant) -> Path:
    return cache_folder() / _file_name(name, candidate, compiler())


def _file_name(name: str, candidate: Variant, made_by: str) -> str:
    """Of the library for this source, these flags and this compiler: a change of any is another
    file."""
    key = hashlib.sha256("\0".join([*FLAGS, *candidate.flags, made_by]).encode())
    for source in sorted((*SOURCES.glob("*.h"), SOURCES / f"{name}.cpp")):
        key.update(source.read_bytes())
    return f"{name}-{candidate.name}-{key.hexdigest()[:16]}.so"


def compiler() -> str:
    found = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if found is None:
        raise OSError("no C++ compiler on the PATH")
    return found


def compile_to(target: Path, name: str, candidate: Variant, *, mode: int) -> None:
    """Raises OSError or subprocess.SubprocessError. mode: permissions of the library."""
    command = shlex.split(compiler())
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        build = Path(work)
        _run(
            [
                *command,
                *FLAGS,
                *candidate.flags,
                "-c",
                str(SOURCES / f"{name}.cpp"),
                "-o",
                str(build / "kernels.o"),
            ]
        )
        _run([*command, "-shared", str(build / "kernels.o"), "-o", str(build / "kernels.so")])
        (build / "kernels.so").chmod(mode)
        # at once: a concurrent process sees all of it or nothing
        (build / "kernels.so").replace(target)


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)


@functools.cache
def cache_folder() -> Path:
    """``~/.cache/lorabatch/kernels``; where that is not ours alone to write, a folder for this
    process.

    A library is code that runs with the user's rights: nobody else may be able to put one there.
    """
    folder = (
        Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lorabatch" / "kernels"
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for own in (folder.parent, folder):
            if own.lstat().st_uid == os.geteuid() and not own.is_symlink():
                _close(own, folder)
        if os.access(folder, os.W_OK) and all(map(_private, (folder, folder.parent))):
            return folder
        reason = "is not this user's alone to write"
    except OSError as error:
        reason = f"cannot be made ({error.strerror})"
    print(
        f"CPU kernels: {folder} {reason}: compiled for this process alone; set XDG_CACHE_HOME "
        "to a folder of your own",
        file=sys.stderr,
    )
    return Path(tempfile.mkdtemp(prefix="lorabatch-kernels-"))


def _close(own: Path, folder: Path) -> None:
    """Takes from others the right to write where this user's libraries are; what already is in the
    folder goes, since any of it may be theirs."""
    mode = own.stat().st_mode
    if not mode & OTHERS_WRITE:
        return
    own.chmod(mode & ~OTHERS_WRITE)  # a umask of 002 made it
    libraries = [*folder.glob("*.so")]
    for library in libraries:
        library.unlink(missing_ok=True)
    if libraries:
        print(f"CPU kernels: others could write {own}: built anew", file=sys.stderr)


def _private(path: Path) -> bool:
    """Whether the path itself (not what a link points to) is this user's and only this user may
    write it."""
    status = path.lstat()
    return (
        status.st_uid == os.geteuid()
        and not status.st_mode & OTHERS_WRITE
        and not stat.S_ISLNK(status.st_mode)
    )
