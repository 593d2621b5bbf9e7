"""The package as a user without a checkout has it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from support.paths import ROOT


def wheel_environment(tmp_path):
    """The folder of an environment with the wheel of this tree in it, and all else from ours."""
    pytest.importorskip("setuptools", reason="nothing here builds a wheel")
    tree = tmp_path / "tree"
    tree.mkdir()
    for folder in ("src", "scripts", "configs", "data_sample"):
        # egg-info lists files of whatever this checkout was when it was installed
        shutil.copytree(
            ROOT / folder,
            tree / folder,
            symlinks=True,
            ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"),
        )
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run([*build, "-q", "-w", tmp_path, tree], check=True, env=os.environ | {"TZ": "UTC"})
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(venv)}))
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(packages)
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "lorabatch" not in path.name and not (packages / path.name).exists():
            (packages / path.name).symlink_to(path)
    return venv
