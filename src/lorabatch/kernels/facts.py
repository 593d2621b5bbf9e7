"""What serves on this machine, for records and the doctor."""

from __future__ import annotations

import shlex
import shutil
from typing import Any

from lorabatch import kernels, processor


def facts() -> dict[str, Any]:
    """``variant``: of the kernels that serve, None where torch's own operators do; ``why_not``: better variants, or "kernels" for all of
    them -> what each lacks; ``compiler``: whether there is one; ``types``: what the processor multiplies natively.

    Call it where torch is loaded: the kernels use its threads.
    """
    try:
        compiler = shutil.which(shlex.split(kernels._compiler())[0]) is not None
    except OSError:
        compiler = False
    return {"variant": kernels.variant(), "why_not": kernels.why_not(), "compiler": compiler, "types": processor.native_types()}
