"""What serves on this machine, for records and the doctor."""

from __future__ import annotations

import shlex
import shutil
from typing import Any

from lorabatch import kernels, processor

TYPES = {"bf16": {"avx512_bf16", "amx_bf16"}, "int8": {"avx512_vnni", "amx_int8"}}  # type -> flags of processors that multiply it natively


def facts() -> dict[str, Any]:
    """``variant``: of the kernels that serve, None where torch's own operators do; ``why_not``: better variants, or "kernels" for all of
    them -> what each lacks; ``compiler``: whether there is one; ``types``: what the processor multiplies natively.

    Call it where torch is loaded: the kernels use its threads.
    """
    try:
        compiler = shutil.which(shlex.split(kernels._compiler())[0]) is not None
    except OSError:
        compiler = False
    types = [name for name, flags in TYPES.items() if flags & processor.flags()]
    return {"variant": kernels.variant(), "why_not": kernels.why_not(), "compiler": compiler, "types": types}
