"""What a number was measured on: hardware, versions, commit, Slurm job. No torch import."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from lorabatch.machine.cgroup import ControlGroup
from lorabatch.processor import processor_name
from lorabatch.schema import Record

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
)
SLURM_VARIABLES = (
    *("JOB_ID", "JOB_NAME", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "JOB_PARTITION", "JOB_NODELIST"),
    *("NTASKS", "CPUS_PER_TASK", "MEM_PER_NODE", "MEM_PER_CPU", "RESTART_COUNT"),
)


def environment() -> Record:
    """The environment block of ``run.json``."""
    return {
        "host": platform.node(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": processor_name(),
        "logical_cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "git": _git(),
        "slurm": {
            name.lower(): os.environ[f"SLURM_{name}"]
            for name in SLURM_VARIABLES
            if f"SLURM_{name}" in os.environ
        },
    }


def usable_cores() -> int:
    """Cores this process may use: the Slurm allocation, the CPU affinity, the quotas of its control
    groups; the least of them."""
    found = [
        len(os.sched_getaffinity(0)),
        int(ControlGroup().limits()["cgroup_cores"] or sys.maxsize),
    ]
    if os.environ.get("SLURM_CPUS_PER_TASK", "").isdigit():
        found.append(int(os.environ["SLURM_CPUS_PER_TASK"]))
    return max(1, min(found))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git() -> Record | None:
    """Commit of the code that runs, and whether it differs from it; None outside a repository. A
    run's report replaces the filled example in report/ and changes no code."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "dirty": bool(
                git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/report")
            ),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def gpu_description() -> Record | None:
    """The GPU that torch uses; only looked at when torch is loaded already."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda or f"none (HIP {torch.version.hip})",
    }
