"""Kernels compiled beforehand: they serve where no compiler is, and give way where they cannot."""

import os
import subprocess
import sys

import pytest
from support.paths import SRC
from support.processes import python_alone

from lorabatch import kernels
from lorabatch.kernels import build, variants
from lorabatch.kernels.prebuild import LIBRARIES, main
from lorabatch.kernels.variants import Variant

pytestmark = pytest.mark.skipif(
    kernels.library("step") is None,
    reason="no CPU kernels on this machine (compiler or AVX2 missing)",
)
HERE = kernels.variant()
WITHOUT_COMPILER = """
from pathlib import Path
import torch
from lorabatch import kernels
from lorabatch.kernels import build
build.PREBUILT = Path({folder!r})
print(kernels.variant(), kernels.library("train") is not None)
"""


@pytest.fixture
def prebuilt(tmp_path, monkeypatch):
    """A folder with this machine's variant in it."""
    served = next(v for v in variants.VARIANTS if v.name == HERE)
    folder = tmp_path / "prebuilt"
    folder.mkdir()
    found = {name: next(p for p in _places(name, served) if p.exists()) for name in LIBRARIES}
    monkeypatch.setattr(build, "PREBUILT", folder)
    for name, path in found.items():
        build.prebuilt_path(name, served).write_bytes(path.read_bytes())
    return folder


def _places(name, served):
    return build.prebuilt_path(name, served), build._cached_path(name, served)


def without_compiler(folder, tmp_path):
    code = WITHOUT_COMPILER.format(folder=str(folder))
    return python_alone(code, CXX="no-such-compiler", XDG_CACHE_HOME=str(tmp_path / "cache"))


def test_they_serve_without_a_compiler_and_leave_no_cache(prebuilt, tmp_path):
    done = without_compiler(prebuilt, tmp_path)
    assert (done.stdout.split(), done.stderr) == ([HERE, "True"], "")
    assert not (tmp_path / "cache").exists()


def test_one_that_cannot_be_loaded_gives_way_in_one_line(prebuilt, tmp_path):
    for path in prebuilt.iterdir():
        path.write_bytes(b"of another C library")
    done = without_compiler(prebuilt, tmp_path)
    assert done.stdout.split() == ["None", "False"]
    lines = done.stderr.splitlines()
    assert any(HERE in line and line.endswith("compiling them here") for line in lines)
    assert sum("torch's own operators serve" in line for line in lines) == 1
    assert len(lines) == 1 + len(LIBRARIES) and "Traceback" not in done.stderr


def test_one_of_another_source_is_not_looked_at(prebuilt, tmp_path, monkeypatch):
    served = next(v for v in variants.VARIANTS if v.name == HERE)
    other = tmp_path / "sources"
    other.mkdir()
    for source in build.SOURCES.iterdir():
        if source.suffix in (".h", ".cpp"):
            (other / source.name).write_bytes(source.read_bytes() + b"// changed\n")
    assert build.prebuilt_path("step", served).exists()
    monkeypatch.setattr(build, "SOURCES", other)
    assert not build.prebuilt_path("step", served).exists()


def test_what_cannot_be_compiled_is_said_and_the_rest_is_made(tmp_path, monkeypatch, capsys):
    compiler = tmp_path / "c++"  # one that does not know the second processor
    compiler.write_text(
        """#!/bin/bash
for target; do [[ $target != -mnew ]] || { echo "unknown option -mnew" >&2; exit 1; }; done
echo made > "$target"
"""
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(build, "PREBUILT", tmp_path / "prebuilt")
    old = Variant("old", frozenset(), ("-mold",))
    new = Variant("new", frozenset(), ("-mnew",))
    monkeypatch.setattr("lorabatch.kernels.prebuild.related", lambda: [old, new])
    (tmp_path / "prebuilt").mkdir()
    stale = tmp_path / "prebuilt" / "step-old-of-yesterday.so"
    stale.touch()
    assert main() == 0
    assert capsys.readouterr().out == "CPU kernels not compiled: unknown option -mnew\n"
    made = {path.name.rsplit("-", 1)[0] for path in (tmp_path / "prebuilt").glob("*.so")}
    assert made == {"step-old", "train-old"} and not stale.exists()
    compiler.write_text("#!/bin/bash\nexit 1\n")  # what is there is not compiled again
    assert main() == 0 and {p.name.rsplit("-", 1)[0] for p in build.PREBUILT.glob("*.so")} == made


def test_it_needs_no_installed_package():
    code = "import sys, lorabatch.kernels.prebuild; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env=os.environ | {"PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"
