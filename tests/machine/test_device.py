"""Device, type and threads on machines that are not this one."""

import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from lorabatch import processor
from lorabatch.errors import UnavailableError
from lorabatch.machine import device, environment
from lorabatch.machine.cgroup import ControlGroup
from lorabatch.machine.device import (
    TYPE_NAMES,
    TYPES,
    choose_device,
    choose_dtype,
    choose_threads,
    free_bytes,
    out_of_memory,
)
from lorabatch.machine.environment import usable_cores

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_device_follows_the_local_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    assert choose_device(no_cuda=False) == torch.device("cuda", 0)
    # srun alone, as the sharded inference of a job is started
    monkeypatch.setenv("SLURM_LOCALID", "2")
    assert choose_device(no_cuda=False) == torch.device("cuda", 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device(no_cuda=False) == torch.device("cuda", 3)
    assert choose_device(no_cuda=True) == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(no_cuda=False) == CPU


def test_the_gpu_of_a_process_is_torchs_current_one_and_sums_in_fp32(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("SLURM_LOCALID", "1")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    products = torch.backends.cuda.matmul
    products.allow_fp16_reduced_precision_reduction = True
    products.allow_bf16_reduced_precision_reduction = True
    choose_device(no_cuda=False)
    assert current == [torch.device("cuda", 1)]
    assert not products.allow_fp16_reduced_precision_reduction
    assert not products.allow_bf16_reduced_precision_reduction


def test_free_memory_of_a_gpu_counts_what_the_allocator_keeps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert free_bytes(GPU) == 1500


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "NCCL error: ncclUnhandledCudaError; last error: Cuda failure 2 'out of memory'",
        "std::bad_alloc",
    ],
)
def test_want_of_memory_is_recognised_in_every_librarys_words(message):
    assert out_of_memory(RuntimeError(message))
    assert not out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_asked_types_are_given(name):
    assert TYPE_NAMES[choose_dtype(name, GPU)] == name
    assert TYPES[name] == choose_dtype(name, GPU)


def test_fp16_on_a_cpu_is_refused():
    with pytest.raises(UnavailableError, match="fp16 needs a GPU; use --dtype fp32 or bf16"):
        choose_dtype("fp16", CPU)
    assert choose_dtype("bf16", CPU) == torch.bfloat16


@pytest.mark.parametrize(
    ("capability", "expected"),
    [
        ((7, 0), torch.float16),
        ((7, 5), torch.float16),
        ((8, 0), torch.bfloat16),
        ((9, 0), torch.bfloat16),
    ],
)
def test_gpus_get_bf16_only_where_it_is_native(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda which: capability)
    # it says yes to emulation too
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)
    assert choose_dtype("auto", GPU) == expected


@pytest.mark.parametrize(
    ("has_it", "faster"), [(True, True), (True, False), (False, True), (False, False)]
)
def test_cpus_get_bf16_only_if_native_and_faster(has_it, faster, monkeypatch):
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: has_it)
    monkeypatch.setattr(device, "_bf16_is_faster", lambda: faster)
    assert choose_dtype("auto", CPU) == (torch.bfloat16 if has_it and faster else torch.float32)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 sse\n", True),
        ("flags\t\t: fpu amx_bf16\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("flags\t\t: fpu avx512f avx512bw\n", False),
        ("flags\t\t: fpu xavx512_bf16\n", False),
        ("model name\t: bf16\n", False),
    ],
)
def test_bf16_is_read_from_the_processors_flags(line, expected, tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\n" + line)
    monkeypatch.setattr(
        processor, "open", lambda path, **kwargs: cpuinfo.open(**kwargs), raising=False
    )
    assert device.cpu_has_bf16() == expected
    cpuinfo.unlink()
    assert not device.cpu_has_bf16()  # no such file: not Linux


@pytest.mark.parametrize(
    ("fp32_s", "bf16_s", "expected"),
    [(2.0, 1.0, True), (1.2, 1.0, True), (1.1, 1.0, False), (1.0, 2.0, False)],
)
def test_faster_means_the_shortest_of_alternating_runs(fp32_s, bf16_s, expected, monkeypatch):
    """One undisturbed run of each type decides, whatever else ran on the machine meanwhile."""
    slow = [100.0 * (1 + n % 7) for n in range(20)]
    durations = [
        d
        for n in range(20)
        for d in (fp32_s if n == 3 else slow[n], bf16_s if n == 16 else slow[-n])
    ]
    clock = itertools.chain.from_iterable((0.0, d) for d in durations)
    monkeypatch.setattr(device, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    threads = torch.get_num_threads()
    assert device._bf16_is_faster() == expected
    assert next(clock, None) is None and torch.get_num_threads() == threads


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with 16 cores in the affinity mask, no Slurm and no quota of our control group;
    write ``cpu.max`` to add one."""
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    (tmp_path / "job").mkdir()
    (tmp_path / "cgroup.controllers").write_text("cpu\n")
    (tmp_path / "membership").write_text("0::/job\n")
    monkeypatch.setattr(
        environment, "ControlGroup", partial(ControlGroup, tmp_path, tmp_path / "membership")
    )
    return tmp_path / "job/cpu.max"


def test_cores_are_the_least_of_all_limits(machine, monkeypatch):
    assert usable_cores() == 16
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert usable_cores() == 6
    machine.write_text("250000 100000\n")
    assert usable_cores() == 2
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    assert usable_cores() == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max 100000\n", 16),
        ("50000 100000\n", 1),
        ("400000 100000\n", 4),
        ("nonsense", 16),
        ("", 16),
    ],
)
def test_cgroup_quota(machine, text, expected):
    machine.write_text(text)
    assert usable_cores() == expected


@pytest.mark.parametrize("value", ["", "many", "-2"])
def test_nonsense_from_slurm_is_ignored(machine, monkeypatch, value):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", value)
    assert usable_cores() == 16


def test_threads_are_set(machine, monkeypatch):
    monkeypatch.setattr(device.torch, "set_num_threads", lambda count: chosen.append(count))
    chosen = []
    assert choose_threads(3) == 3
    assert choose_threads(None) == 16
    assert chosen == [3, 16]
