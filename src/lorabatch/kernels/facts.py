"""What serves on this machine, for records and the doctor."""

from __future__ import annotations

import shlex
import shutil

from lorabatch import kernels, processor
from lorabatch.kernels.build import compiler
from lorabatch.schema import Record


def facts() -> Record:
    """``variant``: of the kernels that serve, None where torch's own operators do; ``why_not``:
    better variants, or "kernels" for all of them -> what each lacks; ``compiler``: its command or
    None; ``types``: what the processor multiplies natively.

    Call it where torch is loaded: the kernels use its threads.
    """
    try:
        command = compiler()
        found = command if shutil.which(shlex.split(command)[0]) else None
    except OSError:
        found = None
    return {
        "variant": kernels.variant(),
        "why_not": kernels.why_not(),
        "compiler": found,
        "types": processor.native_types(),
    }
