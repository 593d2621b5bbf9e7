"""The C++ kernels for CPUs: compiled on the machine that runs them, loaded through ctypes, or done without.

A source file beside this one becomes a shared library with a plain C interface, so it depends on no
version of torch. OpenMP is deliberately not linked: its symbols resolve to the copy that torch has
loaded, and both share one pool of threads (two pools on the same cores would fight each other).

``LORABATCH_KERNELS=off`` turns them off; everything then runs on torch's own operators, which stay tested.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC", "-fno-math-errno", "-w")
NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512dq")  # what every kernel is written for
COMPILE_TIMEOUT_S = 300


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled ``name``.cpp, or None (said once, in one line, unless it was turned off or cannot be expected here)."""
    if os.environ.get("LORABATCH_KERNELS", "on") == "off" or not set(NEEDED) <= cpu_flags():
        return None
    try:
        return ctypes.CDLL(str(_compiled(name)))
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        print(f"CPU kernels: {name} not built ({reason[0] if reason else error}): slower, torch's own operators serve", file=sys.stderr)
        return None


@functools.cache
def cpu_flags() -> frozenset[str]:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return frozenset(next((line.split(":", 1)[1] for line in file if line.startswith("flags")), "").split())
    except OSError:
        return frozenset()


def _compiled(name: str) -> Path:
    """Path of the library, built now unless this source was built for this kind of processor before."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise OSError("no C++ compiler on the PATH")
    key = hashlib.sha256("\0".join([*FLAGS, compiler, *sorted(cpu_flags())]).encode())
    for source in sorted((*SOURCES.glob("*.h"), SOURCES / f"{name}.cpp")):
        key.update(source.read_bytes())
    folder = _cache_folder()
    target = folder / f"{name}-{key.hexdigest()[:16]}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as work:
            build = Path(work)
            _run([*shlex.split(compiler), *FLAGS, "-c", str(SOURCES / f"{name}.cpp"), "-o", str(build / "kernels.o")])
            _run([*shlex.split(compiler), "-shared", str(build / "kernels.o"), "-o", str(build / "kernels.so")])
            (build / "kernels.so").replace(target)  # at once: a concurrent process sees all of it or nothing
    return target


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)


def _cache_folder() -> Path:
    """``~/.cache/lorabatch/kernels``; where the home cannot be written, a folder for this process alone."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lorabatch" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="lorabatch-kernels-"))
