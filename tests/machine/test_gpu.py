"""NVML through the real nvidia-ml-py: its own errors on a machine without a driver, and the
arithmetic against a library that answers like one with a driver (``FAKE``, compiled here; its
answers are those of no GPU in particular)."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from lorabatch.machine.gpu import GAUGES, Gpu, throttle_names, visible_gpu
from lorabatch.machine.sampler import SystemSampler

FAKE = r"""
#include <string.h>
typedef struct { unsigned version, count; void *before, *now; struct { unsigned id, ret; double value; char *names[3]; } metric[333]; } Metrics;
static int looks = 0;
static unsigned long long energy = 7000;
int nvmlInitWithFlags(unsigned f) { return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void** d) { *d = (void*)8; return i == 1 ? 0 : 2; }
int nvmlDeviceGetUtilizationRates(void* d, unsigned* u) { u[0] = 40, u[1] = 9; return 0; }
int nvmlDeviceGetMemoryInfo(void* d, unsigned long long* m) { m[0] = 90, m[1] = 30, m[2] = 60; return 0; }
int nvmlDeviceGetPowerUsage(void* d, unsigned* mw) { *mw = 250000; return 0; }
int nvmlDeviceGetClockInfo(void* d, int kind, unsigned* mhz) { *mhz = kind == 1 ? 1980 : 0; return 0; }
int nvmlDeviceGetTotalEnergyConsumption(void* d, unsigned long long* mj) { *mj = energy, energy += 5000; return 0; }
int nvmlDeviceGetCurrentClocksThrottleReasons(void* d, unsigned long long* mask) { *mask = 4; return 0; }
int nvmlDeviceGetPcieThroughput(void* d, int counter, unsigned* kb) { *kb = 100 + counter; return 0; }
int nvmlGpmQueryDeviceSupport(void* d, unsigned* s) { if (s[0] != 1) return 25; s[1] = GPM; return 0; }
int nvmlGpmSampleAlloc(void** s) { static int room[4], n; *s = room + n++; return 0; }
int nvmlGpmSampleGet(void* d, int* s) { *s = ++looks; return 0; }
int nvmlGpmMetricsGet(Metrics* m) {
    if (m->version != 1 || *(int*)m->now != *(int*)m->before + 1) return 2;
    for (unsigned i = 0; i < m->count; i++) m->metric[i].ret = m->metric[i].id == 5 ? 3 : 0, m->metric[i].value = 10.0 * m->metric[i].id;
    return 0;
}
"""
RUN = """
import json, sys, time
from pathlib import Path
from lorabatch.machine.sampler import SystemSampler
with SystemSampler(Path(sys.argv[1]), interval_s=0.05) as sampler:
    time.sleep(0.3)
print(json.dumps(sampler.summary().to_dict()))
"""


@pytest.fixture
def sampled(tmp_path):
    """The summary and the samples of a run that finds this NVML; GPM: whether the GPU has such
    counters."""

    def run(*, gpm):
        compiler = shutil.which("cc") or pytest.skip("no C compiler")
        command = [
            compiler,
            "-w",
            "-shared",
            "-fPIC",
            f"-DGPM={gpm}",
            "-x",
            "c",
            "-",
            "-o",
            str(tmp_path / "libnvidia-ml.so.1"),
        ]
        subprocess.run(command, input=FAKE, text=True, check=True)
        environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "1"}
        done = subprocess.run(
            [sys.executable, "-c", RUN, tmp_path / "system.jsonl"],
            capture_output=True,
            text=True,
            env=environment,
            check=True,
        )
        return json.loads(done.stdout), [
            json.loads(line) for line in (tmp_path / "system.jsonl").read_text().splitlines()
        ]

    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    return run


def test_figures_of_a_gpu_with_performance_counters(sampled):
    summary, samples = sampled(gpm=1)
    expected = {
        "gpu_util_percent": 40,
        "gpu_memory_bytes": 60,
        "gpu_power_w": 250,
        "gpu_sm_mhz": 1980,
        "gpu_pcie_tx_bytes_per_s": 100e3,
        "gpu_pcie_rx_bytes_per_s": 101e3,
        "gpu_sm_active_percent": 20,
        "gpu_dram_active_percent": 100,
        "gpu_tensor_active_percent": None,
    }
    assert set(expected) == set(GAUGES)
    assert (
        {name: summary[name] for name in expected}
        == expected
        == {name: samples[-1][name] for name in expected}
    )
    assert summary["energy_j"] == 5.0, "the counter at the end less the counter at the start"
    assert summary["gpu_throttle_share"] == {"power cap": 1.0} and samples[0][
        "gpu_throttle_reasons"
    ] == ["power cap"]
    assert {n: r for n, r in summary["missing"].items() if "gpu" in n} == {
        "gpu_tensor_active_percent": "NVML: Not Supported"
    }


def test_a_gpu_before_hopper_says_so(sampled):
    summary, _ = sampled(gpm=0)
    assert summary["gpu_util_percent"] == 40 and summary["gpu_dram_active_percent"] is None
    assert "no GPM counters" in summary["missing"]["gpu_dram_active_percent"]


def test_a_machine_without_a_driver_gives_the_real_librarys_reason(monkeypatch):
    nvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    try:
        nvml.nvmlInit()
        pytest.skip("there is a driver here")
    except nvml.NVMLError as error:
        assert Gpu().missing["gpu_power_w"] == f"NVML: {error}"
    assert set(Gpu().missing) == {*GAUGES, "energy_j", "gpu_throttle_share"}


def test_a_gpu_that_is_not_there_is_null_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with SystemSampler(tmp_path / "system.jsonl", interval_s=10) as sampler:
        pass
    summary = sampler.summary().to_dict()
    for name in (*GAUGES, "energy_j", "gpu_throttle_share"):
        assert summary[name] is None and summary["missing"][name] == "nvidia-ml-py is not installed"


def test_which_gpu_and_why_it_is_slow():
    assert (
        visible_gpu({}) == 0
        and visible_gpu({"LOCAL_RANK": "1"}) == visible_gpu({"SLURM_LOCALID": "1"}) == 1
    )
    assert visible_gpu({"CUDA_VISIBLE_DEVICES": "3,5", "LOCAL_RANK": "1"}) == 5
    assert visible_gpu({"CUDA_VISIBLE_DEVICES": "GPU-ab-1"}) == "GPU-ab-1"
    assert throttle_names(0x1) == [] and throttle_names(0x44) == ["power cap", "hardware thermal"]
