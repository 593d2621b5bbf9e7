"""``python -m lorabatch.cluster.leash PARENT MODULE WORDS...``: run a module in a process that does
not outlive process PARENT.

Without it, the child of a killed process would continue to compute, beside the successor that took
its work over.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent ends, or the thread of it that started
    this one. Only Linux can do that."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, *map(ctypes.c_ulong, (signal.SIGKILL, 0, 0, 0)))
    except (OSError, AttributeError):
        return
    if os.getppid() != parent:  # it ended before we asked
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    _, parent, module, *arguments = sys.argv
    die_with(int(parent))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
