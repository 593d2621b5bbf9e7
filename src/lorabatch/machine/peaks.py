"""What vendors promise: dense peak rates of the accelerators that our users meet. Shown beside what
was measured.

Sources: NVIDIA's data sheets of V100 SXM2, A100 SXM4, H100 SXM5, H200 SXM and GH200 (half of the
figures "with sparsity"), AMD's data sheet of MI300A.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """FLOP/s by type, and bytes/s of the device's own memory. No bf16: the chip only emulates
    it."""

    name: str
    flops_per_s: dict[str, float]
    bytes_per_s: float


def _peak(
    name: str, half_tflops: float, fp32_tflops: float, gb_per_s: float, *, bf16: bool = True
) -> Peak:
    types = {"fp16": half_tflops * 1e12, "fp32": fp32_tflops * 1e12} | (
        {"bf16": half_tflops * 1e12} if bf16 else {}
    )
    return Peak(name, types, gb_per_s * 1e9)


PEAKS = (
    _peak("V100", 125, 15.7, 900, bf16=False),
    _peak("A100 40 GB", 312, 19.5, 1555),
    _peak("A100 80 GB", 312, 19.5, 2039),
    _peak("H100", 989, 67, 3350),
    _peak("H200", 989, 67, 4800),
    _peak("GH200 96 GB", 989, 67, 4000),
    _peak("GH200 144 GB", 989, 67, 4900),
    _peak("MI300A", 980.6, 122.6, 5300),
)


def known_peak(device_name: str, memory_bytes: int) -> Peak | None:
    """The row of a device by its name and, where one name has two memories, the nearer size; None
    for others.

    >>> known_peak("NVIDIA GH200 480GB", 95 * 2**30).name
    'GH200 96 GB'
    """
    words = device_name.replace("-", " ").split()
    found = [p for p in PEAKS if p.name.split()[0] in words]
    if "PCIe" in words or not found:
        return None  # the boards with a PCI Express connector are slower, and not in the table
    return min(
        found,
        key=lambda p: abs(float(p.name.split()[1]) * 1e9 - memory_bytes) if " " in p.name else 0.0,
    )
