"""What serves on this machine, in words for records and the doctor."""

from __future__ import annotations

import os
import shlex
import shutil
from typing import Any

from lorabatch import kernels


def facts() -> dict[str, Any]:
    """``variant``: of the kernels that serve, None where torch's own operators do; ``why_not``: why none or no better one serves;
    ``compiler``: the one that would build them; ``able``: whether a compiler could help; ``types``: what the processor multiplies natively.

    Call it where torch is loaded: the kernels use its threads.
    """
    words = shlex.split(os.environ.get("CXX") or "") or [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
    able = os.environ.get("LORABATCH_KERNELS") != "off" and set(kernels.NEEDED) <= kernels.cpu_flags()
    found: dict[str, Any] = {"compiler": shutil.which(words[0]) if words else None, "able": able}
    types = {"bf16": {"avx512_bf16", "amx_bf16", "bf16"}, "int8": {"avx512_vnni", "amx_int8", "i8mm"}}
    found["types"] = [name for name, flags in types.items() if flags & kernels.cpu_flags()]
    variant, why_not = getattr(kernels, "variant", None), getattr(kernels, "why_not", None)
    if variant is not None:
        return found | {"variant": variant(), "why_not": why_not() if why_not else None}
    if kernels.library("step") is not None:
        return found | {"variant": "native", "why_not": None}
    if os.environ.get("LORABATCH_KERNELS") == "off":
        return found | {"variant": None, "why_not": "LORABATCH_KERNELS=off"}
    lacking = ", ".join(sorted(set(kernels.NEEDED) - kernels.cpu_flags()))
    return found | {"variant": None, "why_not": f"this processor has no {lacking}" if lacking else "they could not be built"}
