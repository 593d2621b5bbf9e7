"""The system sampler against what the kernel says about a known load, and control groups of both versions."""

import json
import os
import resource
import subprocess
import sys
import time

import pytest

from lorabatch.measure.system import ControlGroup, SystemSampler, descendants, throttle_names, visible_gpu

BURN = """
import time, sys
end = time.process_time() + 0.6
while time.process_time() < end: pass
open(sys.argv[1], "wb", buffering=0).write(b"x" * 3_000_000)
print("done", flush=True); sys.stdin.read()
"""


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_known_load_of_a_child_is_found(tmp_path):
    """CPU seconds within two ticks of the kernel's own account, bytes at least those written."""
    with SystemSampler(tmp_path / "system.jsonl", interval_s=0.1) as sampler:
        before = resource.getrusage(resource.RUSAGE_SELF)
        command = [sys.executable, "-c", BURN, tmp_path / "bytes"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout.readline() == "done\n"
            assert descendants(os.getpid()) == [os.getpid(), child.pid]
            time.sleep(0.25)  # two looks at the finished load
            after = resource.getrusage(resource.RUSAGE_SELF)
            with open(f"/proc/{child.pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            child_cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            child.communicate()
    own_cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    summary = sampler.summary()
    assert summary["cpu_percent"] / 100 * summary["sampled_s"] == pytest.approx(child_cpu_s + own_cpu_s, abs=0.1)
    assert child_cpu_s >= 0.6
    assert 3_000_000 <= summary["write_bytes_per_s"] * summary["sampled_s"] < 3_300_000
    samples = lines(tmp_path / "system.jsonl")
    assert max(s["processes"] for s in samples) == 2 and samples[-1]["t_s"] == pytest.approx(summary["sampled_s"], abs=0.01)
    assert max(s["rss_bytes"] for s in samples) == summary["max_rss_bytes"] > 10**7
    assert 0 < summary["max_pss_bytes"] <= summary["max_rss_bytes"] * 1.05
    assert summary["voluntary_switches_per_s"] > 0 and 0 < summary["sampler_cpu_s"] < summary["sampled_s"] / 2


def test_a_gpu_that_is_not_there_is_null_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with SystemSampler(tmp_path / "system.jsonl", interval_s=10) as sampler:
        pass
    summary = sampler.summary()
    assert summary["gpu_missing"] == "nvidia-ml-py is not installed"
    assert all(summary[name] is None for name in ("energy_j", "gpu_util_percent", "gpu_throttle_share", "max_gpu_memory_bytes"))


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_limits_of_a_version_2_group_are_the_tightest_on_the_way_up(tmp_path):
    root = tmp_path / "cgroup"
    write(root / "cgroup.controllers", "cpu memory\n")
    write(root / "job/memory.max", f"{2**30}\n")
    write(root / "job/step/memory.max", "max\n")
    write(root / "job/step/cpu.max", "150000 100000\n")
    write(root / "job/step/cpu.stat", "usage_usec 5\nthrottled_usec 2500000\n")
    write(tmp_path / "membership", "0::/job/step\n")
    group = ControlGroup(root, tmp_path / "membership")
    assert group.limits() == {"cgroup_memory_bytes": 2**30, "cgroup_cores": 1.5}
    assert group.throttled_s() == 2.5


def test_limits_of_a_version_1_group(tmp_path):
    root = tmp_path / "cgroup"
    write(root / "memory/slurm/job/memory.limit_in_bytes", f"{3 * 2**30}\n")
    write(root / "memory/memory.limit_in_bytes", f"{2**63 - 4096}\n")
    write(root / "cpu,cpuacct/slurm/job/cpu.cfs_quota_us", "-1\n")
    write(root / "cpu,cpuacct/slurm/job/cpu.cfs_period_us", "100000\n")
    write(root / "cpu,cpuacct/slurm/job/cpu.stat", "nr_throttled 1\nthrottled_time 1500000000\n")
    write(tmp_path / "membership", "4:memory:/slurm/job\n2:cpu,cpuacct:/slurm/job\n")
    group = ControlGroup(root, tmp_path / "membership")
    assert group.limits() == {"cgroup_memory_bytes": 3 * 2**30, "cgroup_cores": None}
    assert group.throttled_s() == 1.5


def test_no_group_is_no_limit(tmp_path):
    group = ControlGroup(tmp_path / "none", tmp_path / "none")
    assert group.limits() == {"cgroup_memory_bytes": None, "cgroup_cores": None} and group.throttled_s() is None


def test_which_gpu_and_why_it_is_slow():
    assert visible_gpu({}) == 0 and visible_gpu({"LOCAL_RANK": "1"}) == visible_gpu({"SLURM_LOCALID": "1"}) == 1
    assert visible_gpu({"CUDA_VISIBLE_DEVICES": "3,5", "LOCAL_RANK": "1"}) == 5
    assert visible_gpu({"CUDA_VISIBLE_DEVICES": "GPU-ab-1"}) == "GPU-ab-1"
    assert throttle_names(0x1) == [] and throttle_names(0x44) == ["power cap", "hardware thermal"]
