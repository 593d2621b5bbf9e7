"""How much memory this process may still take, and the most that it had."""

from __future__ import annotations

import re
import resource
from pathlib import Path

from lorabatch.machine.cgroup import ControlGroup


def free_memory_bytes() -> int:
    """What this process can still take: of the machine's memory, within its control groups."""
    import psutil

    return int(min(psutil.virtual_memory().available, ControlGroup().left_bytes()))


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far.

    The kernel's figure of the address space, not ``ru_maxrss``: that one starts with what the
    process that began this one held (getrusage(2)), which may be more than this one ever takes.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        (kibibytes,) = re.findall(r"^VmHWM:\s+(\d+) kB$", lines, re.MULTILINE)
    except (OSError, ValueError):  # a sandbox without it
        kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(kibibytes) * 1024
