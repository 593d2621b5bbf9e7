"""``lorabatch doctor``: everything that would waste the job, checked before the job starts."""

from __future__ import annotations

import json
import os
import resource
import shutil
import site
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from lorabatch import slurm
from lorabatch.config import DoctorConfig
from lorabatch.errors import LorabatchError
from lorabatch.findings import Finding
from lorabatch.machine.environment import usable_cores
from lorabatch.machine.memory import free_memory_bytes
from lorabatch.machine.waits import disturbed, probe
from lorabatch.model import hub
from lorabatch.schema import Record

GIB = 2**30
TORCH_RELEASES = ((2, 11), (2, 13))  # first and last that we test with
NATIVE_BF16 = [8, 0]  # compute capability; torch also says yes to emulation below it
MINIMUM_FREE_BYTES, MINIMUM_FREE_INODES = 2 * GIB, 1000
MINIMUM_MEMORY_BYTES = 2 * GIB
MINIMUM_SECONDS_LEFT = 360.0  # the job scripts stop and save five minutes before the end
# docs/LOG.md, 2026-11-24: one step of 64 requests, bf16, two threads
KERNELS_GAIN = "a step of 64 requests took 24 ms with the kernels and 110 without (AMD EPYC, Zen 5)"
PROBE_TIMEOUT_S = 240  # a cold start from a parallel file system takes minutes


Check = Callable[[DoctorConfig], Iterator[Finding]]


def run_doctor(config: DoctorConfig, command: list[str]) -> int:
    """Print the findings. Returns 69 if one of them is a FAIL, else 0."""
    hub.prepare_environment()
    findings = [finding for check in CHECKS for finding in check(config)]
    if config.json:
        print(
            json.dumps(
                {"host": os.uname().nodename, "findings": [asdict(f) for f in findings]}, indent=2
            )
        )
    else:
        for f in findings:
            print(f.line(8), flush=True)
    return 69 if any(f.level == "FAIL" for f in findings) else 0


def _python(_: DoctorConfig) -> Iterator[Finding]:
    version = sys.version_info[:2]
    text = f"{sys.version.split()[0]} in {sys.prefix}"
    if not (3, 10) <= version <= (3, 12):
        yield Finding(
            "python", "FAIL", text, "needs 3.10 to 3.12: set PYTHON and run scripts/build.sh"
        )
    elif sys.prefix == sys.base_prefix:
        yield Finding(
            "python",
            "warn",
            f"{text}, not a virtual environment",
            "use the one that scripts/build.sh makes",
        )
    else:
        yield Finding("python", "ok", text)
    if site.ENABLE_USER_SITE and (Path(site.getusersitepackages()) / "torch").exists():
        where = site.getusersitepackages()
        yield Finding(
            "python",
            "warn",
            f"a second torch is installed in {where}",
            "export PYTHONNOUSERSITE=1, so that it never wins",
        )


def _torch(config: DoctorConfig) -> Iterator[Finding]:
    """Build and devices, as a process of its own finds them."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "lorabatch.machine.probe"],
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            check=True,
        )
        found = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        yield Finding(
            "torch",
            "FAIL",
            f"no answer within {PROBE_TIMEOUT_S} s",
            "the driver or the file system hangs: try another node",
        )
        return
    except (subprocess.CalledProcessError, ValueError, OSError) as error:
        lines = str(getattr(error, "stderr", "") or error).strip().splitlines()
        yield Finding(
            "torch",
            "FAIL",
            f"does not work ({lines[-1] if lines else error})",
            "run scripts/build.sh again",
        )
        return
    yield _build(found)
    cpu, *gpus = found["devices"]
    yield _device(cpu, "cpu", f"{cpu.get('dtype')}")
    yield from _kernels(cpu)
    if not config.no_cuda:
        yield from _gpus(config, found, gpus)


def _build(found: Record) -> Finding:
    """Whether this torch is the environment's own, and one that we test with."""
    release = tuple(int(part) for part in found["version"].split("+")[0].split(".")[:2])
    text = f"{found['version']}, CUDA {found['cuda'] or 'none'}, from {Path(found['file']).parent}"
    if not Path(found["file"]).is_relative_to(sys.prefix):
        return Finding(
            "torch",
            "FAIL",
            f"{text}: not this environment's",
            "unset PYTHONPATH and export PYTHONNOUSERSITE=1",
        )
    if not TORCH_RELEASES[0] <= release <= TORCH_RELEASES[1]:
        return Finding("torch", "FAIL", text, "needs 2.11 to 2.13: run scripts/build.sh")
    return Finding("torch", "ok", text)


def _gpus(config: DoctorConfig, found: Record, gpus: list[Record]) -> Iterator[Finding]:
    asked = _gpus_asked()
    for gpu in gpus:
        capability = ".".join(map(str, gpu["capability"]))
        memory = f"{gpu.get('free_bytes', 0) / GIB:.1f} of {gpu['memory_bytes'] / GIB:.1f} GiB free"
        text = (
            f"{gpu['name']} (compute capability {capability}, {memory}), work in {gpu.get('dtype')}"
        )
        if not gpu["built_for"]:
            text += f": this torch is built for {' '.join(found['arch_list'])}"
            yield Finding(
                "gpu", "FAIL", text, "rebuild with TORCH_INDEX_URL (V100: the cu126 builds)"
            )
            continue
        if gpu["bf16_claimed"] and gpu["capability"] < NATIVE_BF16:
            text += " (torch claims bf16 here, but only emulates it)"
        yield _device(gpu, "gpu", text)
    if len(gpus) < asked:
        yield Finding(
            "gpu", "FAIL", f"the job has {asked} GPUs, torch sees {len(gpus)}", _why_no_gpu(found)
        )
    elif not gpus and config.need_gpu:
        yield Finding("gpu", "FAIL", "none, and this job needs one", _why_no_gpu(found))
    elif not gpus:
        yield Finding("gpu", "ok", "none: the work stays on the CPU")


def _device(device: Record, check: str, text: str) -> Finding:
    if "error" in device:
        return Finding(
            check,
            "FAIL",
            f"{text}: {device['error']}",
            "try another node, and tell its administrators",
        )
    if device["wrong_products"]:
        wrong = f"{device['wrong_products']} wrong entries in a matrix product"
        return Finding(
            check,
            "FAIL",
            f"{text}: {wrong}",
            "the device returns wrong results: try another node, and tell its administrators",
        )
    return Finding(check, "ok", f"{text}, matrix product exact")


def _kernels(cpu: Record) -> Iterator[Finding]:
    """Which variant of our kernels serves on this processor, and what a better one lacks."""
    if "kernels" not in cpu:  # products do not work at all
        return
    variant, lacking = cpu["kernels"]["variant"], cpu["kernels"]["why_not"]
    if variant is not None:
        text = "; not ".join([variant, *(f"{name}: {why}" for name, why in lacking.items())])
        yield Finding("kernels", "ok", f"{text}; compiled by {cpu['kernels']['compiler']}")
        return
    why = [*lacking.values()][-1]  # of the variant that asks for least
    text = f"none, torch's operators are used ({why})"
    if why.startswith(("the processor", "turned off")):
        yield Finding("kernels", "ok", text)
    else:
        fix = f"give it a C++ compiler (CXX) and a cache of its own: {KERNELS_GAIN}"
        yield Finding("kernels", "warn", text, fix)
    if not cpu["rows_are_independent"]:
        text = (
            f"torch's sums in {cpu['dtype']} depend on how many requests run at once here, and so "
            "may a text"
        )
        yield Finding("kernels", "warn", text, "--dtype fp32 or --deterministic avoids it")


def _gpus_asked() -> int:
    """GPUs of the job on this node."""
    if os.environ.get("SLURM_GPUS_ON_NODE", "").isdigit():
        return int(os.environ["SLURM_GPUS_ON_NODE"])
    return len(
        [
            part
            for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
            if part.strip() not in ("", "-1", "NoDevFiles")
        ]
    )


def _why_no_gpu(found: Record) -> str:
    if found["cuda"] is None:
        return (
            "this torch is a CPU build: rebuild with BUILD_FOR=gpu, or submit scripts/job_cpu.slurm"
        )
    if shutil.which("nvidia-smi") is None:
        return (
            "no nvidia-smi here: request a GPU (--gpus-per-node=1), or submit scripts/job_cpu.slurm"
        )
    return (
        f"CUDA {found['cuda']} does not start ({found['cuda_error']}): rebuild with a "
        "TORCH_INDEX_URL that fits the driver"
    )


def _threads(_: DoctorConfig) -> Iterator[Finding]:
    cores, threads, asked = (
        usable_cores(),
        os.environ.get("OMP_NUM_THREADS", ""),
        os.environ.get("SLURM_CPUS_PER_TASK", ""),
    )
    text = f"{cores} cores usable of {os.cpu_count()}"
    if asked.isdigit() and cores < int(asked):
        fix = (
            "the task is bound to fewer than --cpus-per-task: export "
            "SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"
        )
        yield Finding("threads", "warn", f"{text}, {asked} asked for", fix)
    elif threads.isdigit() and int(threads) > cores:
        yield Finding(
            "threads",
            "warn",
            f"{text}, OMP_NUM_THREADS={threads}",
            f"export OMP_NUM_THREADS={cores}",
        )
    else:
        yield Finding("threads", "ok", text)


def _load(_: DoctorConfig) -> Iterator[Finding]:
    """Whether others compute on our cores just now."""
    cores = usable_cores()
    waited = probe(cores)
    if disturbed(waited):
        text = f"others use the cores: work on all {cores} waited {waited:.0%} as long as it ran"
        fix = "wait for them: runs are slow meanwhile, and what they measure proves nothing"
        yield Finding("load", "warn", text, fix)
    else:
        known = "not known: the system counts no waits" if waited is None else "nobody else's"
        yield Finding("load", "ok", f"the cores are {known}")


def _memory(_: DoctorConfig) -> Iterator[Finding]:
    free = free_memory_bytes()
    level, fix = (
        ("ok", "")
        if free >= MINIMUM_MEMORY_BYTES
        else ("FAIL", "request more, for example --mem=8G")
    )
    yield Finding("memory", level, f"{free / GIB:.1f} GiB usable", fix)
    files, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= files < 256:
        yield Finding("memory", "warn", f"only {files} open files allowed", "ulimit -n 4096")


def _disk(config: DoctorConfig) -> Iterator[Finding]:
    temporary = os.environ.get("SLURM_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    yield _folder("output", Path(config.output_dir), writes=True)
    yield _folder("cache", hub.cache_folders()[0][1], writes=False)
    yield _folder("temporary", Path(temporary), writes=True)


def _folder(name: str, folder: Path, *, writes: bool) -> Finding:
    there = folder
    while not there.exists():
        there = there.parent
    stat, text = os.statvfs(there), f"{name} {folder}"
    free = stat.f_bavail * stat.f_frsize
    text += f": {free / GIB:.1f} GiB free"
    text += f", {stat.f_favail:,} inodes" if stat.f_files else ""
    if writes and not _writable(there):
        return Finding(
            "disk",
            "FAIL",
            f"{name} {folder} is not writable",
            "choose another folder; compute nodes may not see your home",
        )
    if writes and free < MINIMUM_FREE_BYTES:
        return Finding(
            "disk", "FAIL", text, "free some, or choose another folder (check your quota)"
        )
    if writes and stat.f_files and stat.f_favail < MINIMUM_FREE_INODES:
        return Finding(
            "disk", "FAIL", text, "remove small files: the file system takes no more of them"
        )
    return Finding("disk", "ok", text)


def _writable(folder: Path) -> bool:
    """By doing it: access bits lie on network file systems."""
    probe = folder / f".lorabatch-doctor-{os.uname().nodename}-{os.getpid()}"
    try:
        probe.write_bytes(b"")
        probe.unlink()
    except OSError:
        return False
    return True


def _offline(_: DoctorConfig) -> Iterator[Finding]:
    name, cache = hub.cache_folders()[0]
    if hub.is_offline():
        yield Finding("offline", "ok", f"no network; cache {name}={cache}")
    else:
        level, fix = (
            ("warn", "export HF_HUB_OFFLINE=1: without internet every look-up waits")
            if slurm.job_id()
            else ("ok", "")
        )
        yield Finding("offline", level, f"the network may be used; cache {name}={cache}", fix)
    ignored = os.environ.get("TRANSFORMERS_CACHE")
    if ignored and os.environ.get("HF_HUB_CACHE") != ignored:
        fix = "transformers 5 ignores it; set HF_HUB_CACHE or HF_HOME alone"
        yield Finding(
            "offline", "warn", f"TRANSFORMERS_CACHE={ignored} is not the cache in use", fix
        )


def _model(config: DoctorConfig) -> Iterator[Finding]:
    if config.base_model is None:
        return
    try:
        source = hub.find_model(config.base_model, download=False)
    except LorabatchError as error:
        yield Finding("model", "FAIL", error.one_line())
    else:
        yield Finding("model", "ok", f"{source.name}: {source.path}")


def _slurm(_: DoctorConfig) -> Iterator[Finding]:
    job = slurm.job_id()
    if job is None:
        limits = slurm.partition_limits()
        yield Finding("slurm", "ok", f"partitions {', '.join(limits)}" if limits else "none here")
        return
    left = slurm.job_seconds_left()
    text = (
        f"job {job} on {os.environ.get('SLURM_JOB_NODELIST')}, start "
        f"{os.environ.get('SLURM_RESTART_COUNT', 0)}"
    )
    text += "" if left is None else f", {left / 60:.0f} minutes left"
    short = left is not None and left < MINIMUM_SECONDS_LEFT
    fix = (
        "jobs save themselves and stop 300 s before the end: request more --time, or give sbatch "
        "--signal=B:USR1@20"
    )
    yield Finding("slurm", "warn" if short else "ok", text, fix if short else "")


CHECKS: tuple[Check, ...] = (
    *(_python, _torch, _threads, _load, _memory, _disk, _offline, _model, _slurm),
)
