"""What torch can really do here, as JSON: ``python -m lorabatch.machine.probe`` for ``lorabatch
doctor``.

A process of its own, because a broken build or driver may crash or hang whoever imports torch.
"""

from __future__ import annotations

import json
import sys

import torch

from lorabatch.kernels.facts import facts
from lorabatch.kernels.onednn import rows_are_independent
from lorabatch.machine.device import TYPE_NAMES, choose_dtype
from lorabatch.schema import Record


def wrong_products(device: torch.device, dtype: torch.dtype, size: int = 128) -> int:
    """How many entries of a product of two [size, size] matrices of -1, 0 and 1 are wrong.

    Sums stay within ±128, which bf16, fp16 and fp32 all hold exactly: any difference from the CPU's
    integer product is a fault, not rounding.
    """
    row, column = torch.arange(size)[:, None], torch.arange(size)[None, :]
    a, b = (row * 31 + column * 17) % 3 - 1, (row * 13 + column * 29) % 3 - 1
    product = a.to(device, dtype) @ b.to(device, dtype)
    return int((product.cpu().to(torch.int64) != a @ b).sum())


def built_for(major: int, minor: int, arch_list: list[str]) -> bool:
    """Whether a build with these architectures runs on compute capability major.minor.

    Machine code ``sm_80`` runs on 8.x with x >= 0; intermediate code ``compute_90`` is compiled for
    anything from 9.0 on.
    """
    for arch in arch_list:
        kind, _, number = arch.partition("_")
        digits = "".join(c for c in number if c.isdigit())
        if not digits:
            continue
        its_major, its_minor = int(digits[:-1]), int(digits[-1])
        if kind == "sm" and its_major == major and its_minor <= minor:
            return True
        if kind == "compute" and (its_major, its_minor) <= (major, minor):
            return True
    return False


def describe(device: torch.device) -> Record:
    """One device: what it is, which type the work would use, and whether its products are right."""
    found: Record = {"device": str(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "name": properties.name,
            "capability": [properties.major, properties.minor],
            "memory_bytes": properties.total_memory,
        }
        found["built_for"] = torch.version.hip is not None or built_for(
            properties.major, properties.minor, torch.cuda.get_arch_list()
        )
        found["bf16_claimed"] = torch.cuda.is_bf16_supported()
    try:
        dtype = choose_dtype("auto", device)
        found |= {"dtype": TYPE_NAMES[dtype], "wrong_products": wrong_products(device, dtype)}
        if device.type == "cuda":
            found["free_bytes"] = torch.cuda.mem_get_info(device)[0]
        else:
            found |= {"kernels": facts(), "rows_are_independent": rows_are_independent(dtype)}
    except RuntimeError as error:
        found["error"] = str(error).splitlines()[0]
    return found


def main() -> None:
    devices = [torch.device("cpu")]
    reason = None
    if torch.cuda.is_available():
        devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    elif torch.version.cuda or torch.version.hip:
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
    build = {
        "version": torch.__version__,
        "file": torch.__file__,
        "cuda": torch.version.cuda or torch.version.hip,
        "cuda_error": reason,
    }
    json.dump(
        build
        | {"arch_list": torch.cuda.get_arch_list(), "devices": [describe(d) for d in devices]},
        sys.stdout,
    )


if __name__ == "__main__":
    main()
