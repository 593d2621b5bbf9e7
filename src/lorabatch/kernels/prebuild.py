"""``python -m lorabatch.kernels.prebuild``: compile the kernels for every processor of this kind,
x86 or ARM, beside their sources, so that a node needs no compiler and no time at first use.

Needs no package but this one, so that it runs while others are still being installed. What the
libraries ask of the C library is what the compiling machine has or less (glibc 2.14 with GCC 12);
one that a node cannot load is compiled there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from lorabatch import processor
from lorabatch.kernels import build, reason_of
from lorabatch.kernels.variants import Variant, related

LIBRARIES = ("step", "train")


def main() -> int:
    """Prints what could not be compiled; 0 whatever it was, since compiling at first use and
    torch's own operators remain."""
    if not processor.flags():
        print("no kernels for this kind of processor: torch's own operators serve")
        return 0
    wanted = [(name, v) for v in related() if not v.for_tests for name in LIBRARIES]
    paths = {build.prebuilt_path(name, v) for name, v in wanted}
    build.PREBUILT.mkdir(exist_ok=True)
    for old in set(build.PREBUILT.glob("*.so")) - paths:
        old.unlink()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reasons = list(pool.map(_build, *zip(*wanted, strict=True)))
    for reason in dict.fromkeys(filter(None, reasons)):
        print(f"CPU kernels not compiled: {reason}")
    return 0


def _build(name: str, variant: Variant) -> str | None:
    """Why it could not be compiled, which an old compiler cannot do for new processors."""
    path = build.prebuilt_path(name, variant)
    try:
        if not path.exists():
            build.compile_to(path, name, variant, mode=0o755)
    except (OSError, subprocess.SubprocessError) as error:
        return reason_of(error)
    return None


if __name__ == "__main__":
    sys.exit(main())
