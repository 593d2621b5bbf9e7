"""Which device, which number type, how many threads: chosen by what the machine can really do."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Mapping

import torch

from lorabatch import processor
from lorabatch.errors import UnavailableError
from lorabatch.kernels.onednn import packed_product
from lorabatch.machine.environment import usable_cores
from lorabatch.machine.memory import free_memory_bytes
from lorabatch.slurm import local_rank

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TYPE_NAMES = {v: k for k, v in TYPES.items()}
NO_MEMORY = (  # in lower case
    "can't allocate memory",
    "not enough memory",
    "bad_alloc",
    "bad allocation",
    "could not create a memory object",
    "out of memory",  # of CUDA itself, and of NCCL
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
)


def choose_device(*, no_cuda: bool) -> torch.device:
    """The GPU of this process, which is then torch's current one; else the CPU."""
    if no_cuda or not torch.cuda.is_available():
        return torch.device("cpu")
    # A launcher may show each rank all GPUs of the node or only its own.
    device = torch.device("cuda", local_rank(os.environ) % torch.cuda.device_count())
    torch.cuda.set_device(device)  # peak memory, properties and launches mean the current device
    products = torch.backends.cuda.matmul
    products.allow_fp16_reduced_precision_reduction = False  # partial sums stay in fp32
    products.allow_bf16_reduced_precision_reduction = False
    return device


def free_bytes(device: torch.device) -> int:
    """Memory of the device that this process can still take; on GPUs with what torch's allocator
    keeps for it."""
    if device.type != "cuda":
        return free_memory_bytes()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def out_of_memory(error: BaseException) -> bool:
    """torch has a class for it on GPUs only; on CPUs it is a RuntimeError of its allocator, of C++
    or of oneDNN."""
    message = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        text in message for text in NO_MEMORY
    )


def choose_threads(threads: int | None) -> int:
    # torchrun's; Slurm gives each task cores of its own
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    count = threads or max(1, usable_cores() // ranks_here)
    torch.set_num_threads(count)
    return count


def keep_freed_memory() -> None:
    """Ask glibc to reuse what was freed instead of giving it back: a training step frees and takes
    the same gigabyte again and again, and mapping fresh pages cost 5 to 15 % of it (docs/LOG.md,
    2026-11-24). Elsewhere nothing happens."""
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    _mallopt({mmap_max: 0, trim_threshold: 2**31 - 1})


def return_freed_memory() -> None:
    """Ask glibc for the opposite, where memory counts more than speed: freed temporaries leave
    holes in its heap that later ones do not fill, 0.55 GB beside the 0.2 that a step of
    ``--checkpointing full`` needs (docs/LOG.md, 2026-11-29)."""
    # M_MMAP_THRESHOLD: larger pieces have a mapping each; set, it no longer grows by itself
    mmap_threshold = -3
    _mallopt({mmap_threshold: 2**20})


def _mallopt(options: Mapping[int, int]) -> None:
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for option, value in options.items():
        mallopt(option, value)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of frozen weights and activations.

    "auto": bf16 on GPUs that have it natively (compute capability 8.0; ``is_bf16_supported`` also
    says yes to emulation), else fp16; on CPUs bf16 if the processor has it and a short timing says
    it is faster, else fp32.
    """
    if name == "fp16" and device.type == "cpu":
        raise UnavailableError(
            "fp16 needs a GPU", where="--dtype fp16", fix="use --dtype fp32 or bf16"
        )
    if name != "auto":
        return TYPES[name]
    if device.type == "cuda":
        return (
            torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        )
    return torch.bfloat16 if cpu_has_bf16() and _bf16_is_faster() else torch.float32


def cpu_has_bf16() -> bool:
    return "bf16" in processor.native_types()


def _bf16_is_faster(*, at_least: float = 1.2) -> bool:
    """The shortest of twenty alternating products of a small model's shape, [64, 576] x [576,
    1536], on one thread.

    On a busy machine most runs are disturbed, and two threads wait for each other: of thirty
    medians of five some said that bf16 was sixteen times slower. The shortest run of one thread is
    the one that nothing disturbed.
    """
    runs = {dtype: _small_product(dtype) for dtype in (torch.float32, torch.bfloat16)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(20):
        for dtype, run in runs.items():
            start = time.perf_counter()
            run()
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    torch.set_num_threads(threads)
    return best[torch.float32] >= at_least * best[torch.bfloat16]


def _small_product(dtype: torch.dtype) -> Callable[[], object]:
    product = packed_product(torch.zeros(1536, 576, dtype=dtype))
    x = torch.zeros(64, 576, dtype=dtype)
    return lambda: product.forward(x, None)
