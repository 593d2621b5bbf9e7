"""What kind of processor this machine has, as Linux names it."""

from __future__ import annotations

import platform

# type -> flags, of which one suffices
NATIVE = {"bf16": {"avx512_bf16", "amx_bf16", "bf16"}, "int8": {"avx512_vnni", "amx_int8"}}


def cpuinfo(key: str) -> str:
    """The first processor's line of /proc/cpuinfo; empty where there is none."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return next(
                (
                    value.strip()
                    for name, _, value in (line.partition(":") for line in file)
                    if name.strip() == key
                ),
                "",
            )
    except OSError:
        return ""


def flags() -> frozenset[str]:
    """Instruction sets, by their names there (on ARM the line is called Features)."""
    return frozenset((cpuinfo("flags") or cpuinfo("Features") or "").split())


def native_types() -> list[str]:
    """Of the narrow types those that this processor multiplies with instructions of their own."""
    return [name for name, needed in NATIVE.items() if needed & flags()]


def vendor() -> str:
    return cpuinfo("vendor_id")


def processor_name() -> str:
    """With its family and model: clouds call every generation of a vendor by one name."""
    name, numbers = (
        cpuinfo("model name") or platform.machine(),
        [cpuinfo(key) for key in ("cpu family", "model")],
    )
    return "{} (family {}, model {})".format(name, *numbers) if all(numbers) else name
