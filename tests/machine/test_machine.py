"""Ceilings: measured once per machine, kept, found again; the vendor's figures by device name."""

import json
from types import SimpleNamespace

import pytest
import torch

from lorabatch.bench import machine as bench_machine
from lorabatch.cli import main
from lorabatch.machine import ceilings as machine
from lorabatch.machine.peaks import PEAKS, known_peak

CPU = torch.device("cpu")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORABATCH_CEILINGS", str(tmp_path / "kept"))
    monkeypatch.setattr(machine, "CPU_SHAPES", ((64, 96),))
    monkeypatch.setattr(machine, "CPU_ROWS", (1, 8))
    return tmp_path


def test_a_ceiling_is_measured_once(own_cache, monkeypatch):
    first = machine.measured_flops_per_s(torch.float32, CPU)
    monkeypatch.setattr(machine, "gemm_rates", lambda *a, **k: pytest.fail("measured again"))
    assert machine.measured_flops_per_s(torch.float32, CPU) == first > 0
    machine.cache_file(CPU).write_text("{torn")
    with pytest.raises(pytest.fail.Exception):
        machine.measured_flops_per_s(torch.float32, CPU)


def test_the_first_processes_measure_and_the_largest_stays(own_cache, monkeypatch):
    """A ceiling that was taken on a busy machine would make every later run look better than it
    is."""
    monkeypatch.setattr(machine, "disturbed", lambda share: False)
    rates = iter([5e9, 9e9, 7e9])
    monkeypatch.setattr(machine, "gemm_rates", lambda *a, **k: [{"flops_per_s": next(rates)}])
    seen = []
    for _ in range(5):
        monkeypatch.setattr(machine, "_measured_here", set())  # as in another process
        seen += [machine.measured_flops_per_s(torch.float32, CPU) for _ in range(2)]
    assert seen == 2 * [5e9] + 8 * [9e9]


def test_a_node_that_is_never_quiet_does_not_measure_for_ever(own_cache, monkeypatch):
    monkeypatch.setattr(machine, "disturbed", lambda share: True)
    measured = []
    monkeypatch.setattr(
        machine, "gemm_rates", lambda *a, **k: measured.append(1) or [{"flops_per_s": 5e9}]
    )
    for _ in range(10):
        monkeypatch.setattr(machine, "_measured_here", set())
        machine.measured_flops_per_s(torch.float32, CPU)
    assert len(measured) == 6
    monkeypatch.setattr(machine, "_measured_here", set())
    machine.cold_flops_per_s("fp32", CPU, reached=1e12)
    assert len(measured) == 7, "a rate above the ceiling: it is too low"


def test_other_threads_have_other_ceilings(own_cache):
    one = machine.cache_file(CPU)
    torch.set_num_threads(2)
    assert machine.cache_file(CPU) != one


def test_an_unwritable_cache_costs_a_measurement_not_the_run(own_cache, monkeypatch):
    monkeypatch.setenv("LORABATCH_CEILINGS", "/proc/nowhere")
    assert machine.measured_flops_per_s(torch.float32, CPU) > 0


def test_a_ceiling_that_finds_no_memory_costs_its_share_not_the_run(own_cache, monkeypatch, capsys):
    def no_memory(device, seconds):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(machine, "bandwidth", no_memory)
    assert machine.measured_bytes_per_s(CPU) == 0
    assert "no memory left to measure read_bytes_per_s" in capsys.readouterr().err
    monkeypatch.setattr(machine, "bandwidth", lambda device, seconds: {"read_bytes_per_s": 2e10})
    machine._measured_here.clear()
    assert machine.measured_bytes_per_s(CPU) == 2e10, "nothing was kept of the failure"


def test_bench_machine(own_cache, monkeypatch, capsys):
    # whatever else the machine does
    monkeypatch.setattr(bench_machine, "disturbed", lambda share: False)
    monkeypatch.setattr(
        bench_machine,
        "bandwidth",
        lambda device, seconds: {"read_bytes_per_s": 2e10, "copy_bytes_per_s": 3e10},
    )
    path = own_cache / "machine.json"
    assert (
        main(
            [
                "bench",
                "machine",
                "--seconds",
                "0.002",
                "--no_cuda",
                "--output",
                str(path),
                "--threads",
                "1",
            ]
        )
        == 0
    )
    record = json.loads(path.read_text())
    kernels = {(r["dtype"], r["kernel"]) for r in record["gemm"]}
    assert {("fp32", "linear"), ("fp32", "prepacked")} <= kernels
    fp32 = [r for r in record["gemm"] if r["dtype"] == "fp32"]
    hot, cold = (max(r["flops_per_s"] for r in fp32 if r["cold"] == is_cold) for is_cold in (0, 1))
    assert record["fp32_flops_per_s"] == hot == machine.measured_flops_per_s(torch.float32, CPU), (
        "runs use what the command kept"
    )
    assert record["fp32_cold_flops_per_s"] == cold == machine.cold_flops_per_s("fp32", CPU)
    assert machine.measured_bytes_per_s(CPU) == 2e10
    shown = capsys.readouterr().out
    assert "20.0 GB/s" in shown and all(peak.name in shown for peak in PEAKS)


def test_ceilings_of_a_busy_machine_are_tried_again_and_left_to_the_runs(
    own_cache, monkeypatch, capsys
):
    """Each figure three times after waiting for the others; what stays disturbed counts as never
    measured, and is never below what was kept."""
    waits, tries = [], []

    def bandwidth(device, seconds):
        tries.append(seconds)
        return {"read_bytes_per_s": 2e10, "copy_bytes_per_s": 3e10}

    class Busy(bench_machine.Watch):
        share = 0.4

    monkeypatch.setattr(bench_machine, "Watch", Busy)
    monkeypatch.setattr(bench_machine, "probe", lambda cores: 0.4)
    monkeypatch.setattr(bench_machine, "time", SimpleNamespace(sleep=waits.append))
    monkeypatch.setattr(bench_machine, "bandwidth", bandwidth)
    product = {"dtype": "fp32", "kernel": "linear", "inputs": 8, "outputs": 8, "rows": 1}
    rates = [product | {"cold": False, "flops_per_s": 1e9}]
    monkeypatch.setattr(bench_machine, "gemm_rates", lambda *a, **k: rates)
    assert main(["bench", "machine", "--no_cuda", "--threads", "1"]) == 0
    said = capsys.readouterr()
    assert len(tries) == bench_machine.TRIES and len(waits) == bench_machine.QUIET_TRIES
    assert "waiting at most 30 s for them" in said.err
    assert "runs will measure them again" in said.out and "read_bytes_per_s (40%)" in said.out
    kept = json.loads(machine.cache_file(CPU).read_text())
    assert kept["read_bytes_per_s"] == 2e10 and kept["measurements"]["read_bytes_per_s"] == 0
    monkeypatch.setattr(machine, "bandwidth", lambda device, seconds: {"read_bytes_per_s": 3e10})
    machine._measured_here.clear()
    assert machine.measured_bytes_per_s(CPU) == 3e10


def test_bench_needs_a_known_second_word(capsys):
    assert main(["bench"]) == 64 and main(["bench", "machin"]) == 64
    assert "did you mean 'bench machine'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "memory", "expected"),
    [
        ("Tesla V100-SXM2-16GB", 16, "V100"),
        ("NVIDIA A100-SXM4-40GB", 40, "A100 40 GB"),
        ("NVIDIA A100-SXM4-80GB", 80, "A100 80 GB"),
        ("NVIDIA H100 80GB HBM3", 80, "H100"),
        ("NVIDIA H200", 141, "H200"),
        ("NVIDIA GH200 480GB", 95, "GH200 96 GB"),
        ("NVIDIA GH200 144G HBM3e", 143, "GH200 144 GB"),
        ("AMD Instinct MI300A", 128, "MI300A"),
        ("NVIDIA A100 80GB PCIe", 80, None),
        ("NVIDIA GeForce RTX 4090", 24, None),
    ],
)
def test_vendor_figures_by_name(device, memory, expected):
    peak = known_peak(device, memory * 10**9)
    assert (peak.name if peak else None) == expected
