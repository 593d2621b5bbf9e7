"""The system sampler against what the kernel says about a known load, and control groups of both
versions."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lorabatch.machine.cgroup import ControlGroup
from lorabatch.machine.energy import Rapl
from lorabatch.machine.environment import environment
from lorabatch.machine.processes import descendants
from lorabatch.machine.sampler import SystemSampler

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
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout.readline() == "done\n"
            assert descendants(os.getpid()) == [os.getpid(), child.pid]
            time.sleep(0.25)  # two looks at the finished load
            after = resource.getrusage(resource.RUSAGE_SELF)
            with open(f"/proc/{child.pid}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
            child_cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            child.communicate()
    own_cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    summary = sampler.summary().to_dict()
    assert summary["cpu_percent"] / 100 * summary["sampled_s"] == pytest.approx(
        child_cpu_s + own_cpu_s, abs=0.1
    )
    assert child_cpu_s >= 0.6
    assert 3_000_000 <= summary["write_bytes_per_s"] * summary["sampled_s"] < 3_300_000
    samples = lines(tmp_path / "system.jsonl")
    assert max(s["processes"] for s in samples) == 2 and samples[-1]["t_s"] == pytest.approx(
        summary["sampled_s"], abs=0.01
    )
    assert max(s["rss_bytes"] for s in samples) == summary["max_rss_bytes"] > 10**7
    assert 0 < summary["max_pss_bytes"] <= summary["max_rss_bytes"] * 1.05
    assert (
        summary["voluntary_switches_per_s"] > 0
        and 0 < summary["sampler_cpu_s"] < summary["sampled_s"] / 2
    )


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
    write(root / "memory/slurm/job/memory.usage_in_bytes", f"{2**30}\n")
    write(root / "memory/slurm/job/memory.stat", "inactive_file 7\ntotal_inactive_file 9\n")
    write(root / "memory/memory.limit_in_bytes", f"{2**63 - 4096}\n")
    write(root / "cpu,cpuacct/slurm/job/cpu.cfs_quota_us", "-1\n")
    write(root / "cpu,cpuacct/slurm/job/cpu.cfs_period_us", "100000\n")
    write(root / "cpu,cpuacct/slurm/job/cpu.stat", "nr_throttled 1\nthrottled_time 1500000000\n")
    write(tmp_path / "membership", "4:memory:/slurm/job\n2:cpu,cpuacct:/slurm/job\n")
    group = ControlGroup(root, tmp_path / "membership")
    assert group.limits() == {"cgroup_memory_bytes": 3 * 2**30, "cgroup_cores": None}
    assert group.throttled_s() == 1.5 and group.left_bytes() == 2**31 + 9


def test_no_group_is_no_limit(tmp_path):
    group = ControlGroup(tmp_path / "none", tmp_path / "none")
    assert (
        group.limits() == {"cgroup_memory_bytes": None, "cgroup_cores": None}
        and group.throttled_s() is None
    )


def zone(root, name, kind, energy_uj):
    write(root / name / "name", f"{kind}\n")
    write(root / name / "max_energy_range_uj", "999999999\n")
    write(root / name / "energy_uj", f"{energy_uj}\n")


def test_energy_of_the_packages_is_added_over_a_wrap(tmp_path):
    """Two packages; their parts and the platform, which contain them or are contained, are not
    counted twice."""
    for name, kind, energy in (
        ("intel-rapl:0", "package-0", 5_000_000),
        ("intel-rapl:1", "package-1", 999_000_000),
    ):
        zone(tmp_path, name, kind, energy)
    zone(tmp_path, "intel-rapl:0:0", "dram", 1)
    zone(tmp_path, "intel-rapl:2", "psys", 1)
    rapl = Rapl(tmp_path)
    write(tmp_path / "intel-rapl:0/energy_uj", "8000000\n")
    # 1 J up to the end of its range, 1 J from zero
    write(tmp_path / "intel-rapl:1/energy_uj", "1000000\n")
    write(tmp_path / "intel-rapl:0:0/energy_uj", "900000000\n")
    assert rapl.missing is None and rapl.added_j() == pytest.approx(5.0)
    assert rapl.added_j() == 0


def test_energy_that_cannot_be_read_is_null_with_the_reason(tmp_path):
    assert Rapl(tmp_path).added_j() is None and "no processor in" in Rapl(tmp_path).missing
    zone(tmp_path, "intel-rapl:0", "package-0", 5)
    (tmp_path / "intel-rapl:0/energy_uj").unlink()
    (tmp_path / "intel-rapl:0/energy_uj").mkdir()  # root may read any file, but no folder
    assert Rapl(tmp_path).added_j() is None and "Is a directory" in Rapl(tmp_path).missing


def test_waiting_for_a_core_is_seen(tmp_path):
    """Two processes share one core: together they wait about as long as they run."""
    core = min(os.sched_getaffinity(0))
    code = (
        f"import os, time; os.sched_setaffinity(0, {{{core}}}); end = time.time() + 1.5\nwhile "
        "time.time() < end: pass"
    )
    with SystemSampler(tmp_path / "system.jsonl", interval_s=0.1) as sampler:
        children = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
        time.sleep(1.2)
    for child in children:
        child.wait()
    assert sampler.summary().cpu_wait_percent > 20


def test_the_processor_is_named_with_its_generation():
    """The name AMD EPYC alone is Zen 2 as well as Zen 5."""
    lines = dict(
        line.split(":", 1)
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        if ":" in line
    )
    facts = {name.strip(): value.strip() for name, value in lines.items()}
    if "cpu family" not in facts:
        pytest.skip("not an x86 processor")
    assert (
        environment()["cpu"]
        == f"{facts['model name']} (family {facts['cpu family']}, model {facts['model']})"
    )
