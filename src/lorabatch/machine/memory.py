"""How much memory this process may still take, and the most that it had."""

from __future__ import annotations

import resource

from lorabatch.machine.cgroup import ControlGroup


def free_memory_bytes() -> int:
    """What this process can still take: of the machine's memory, within its control groups."""
    import psutil

    return int(min(psutil.virtual_memory().available, ControlGroup().left_bytes()))


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
