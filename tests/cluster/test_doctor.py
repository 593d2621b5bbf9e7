"""The doctor on machines that are not this one: each finding that would waste a job, and what torch
really computes."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from lorabatch import slurm
from lorabatch.cli import main
from lorabatch.cluster import doctor
from lorabatch.config import DoctorConfig
from lorabatch.machine import probe

V100 = {
    "device": "cuda:0",
    "name": "V100",
    "capability": [7, 0],
    "memory_bytes": 2**34,
    "free_bytes": 2**33,
}
V100 |= {"built_for": True, "bf16_claimed": True, "dtype": "fp16", "wrong_products": 0}
CPU = {"device": "cpu", "dtype": "fp32", "wrong_products": 0}


@pytest.fixture
def probed(monkeypatch):
    """Let the doctor's process for torch answer what the test says."""

    def answer(*devices, **build):
        found = {
            "version": "2.13.0",
            "file": f"{sys.prefix}/torch/__init__.py",
            "cuda": "13.0",
            "cuda_error": None,
            "arch_list": ["sm_80"],
        }
        found |= {"devices": list(devices)} | build
        monkeypatch.setattr(
            doctor.subprocess, "run", lambda *a, **k: SimpleNamespace(stdout=json.dumps(found))
        )

    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    return answer


def findings(check, **settings):
    return {(f.check, f.level): f"{f.found}; {f.fix}" for f in check(DoctorConfig(**settings))}


@pytest.mark.slow
def test_this_machine_is_fit_and_says_so_as_text_and_json(tmp_path, capsys, tiny_llama_dir):
    flags = [
        "doctor",
        "--no_cuda",
        "--output_dir",
        str(tmp_path),
        "--base_model",
        str(tiny_llama_dir),
    ]
    assert main(flags) == 0
    assert "matrix product exact" in capsys.readouterr().out
    assert main([*flags, "--json"]) == 0
    checks = {f["check"] for f in json.loads(capsys.readouterr().out)["findings"]}
    assert checks >= {
        "python",
        "torch",
        "cpu",
        "kernels",
        "threads",
        "load",
        "memory",
        "disk",
        "offline",
        "model",
        "slurm",
    }


@pytest.mark.slow
def test_missing_model_and_folder_that_cannot_be_written_are_69(capsys):
    assert (
        main(
            [
                "doctor",
                "--no_cuda",
                "--base_model",
                "no/such-model",
                "--output_dir",
                "/proc/lorabatch",
            ]
        )
        == 69
    )
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert (
        len(lines) == 2
        and "not writable" in lines[0]
        and "lorabatch fetch no/such-model" in lines[1]
    )


def test_good_v100_is_told_from_one_that_this_build_does_not_know(probed):
    probed(CPU, V100)
    found = findings(doctor._torch, need_gpu=True)
    assert "only emulates it" in found["gpu", "ok"] and ("gpu", "FAIL") not in found
    probed(CPU, V100 | {"built_for": False})
    assert "cu126" in findings(doctor._torch)["gpu", "FAIL"]


def test_a_device_that_computes_wrongly_or_not_at_all_fails(probed):
    probed(CPU, V100 | {"wrong_products": 3})
    assert "3 wrong entries" in findings(doctor._torch)["gpu", "FAIL"]
    probed(CPU | {"error": "illegal instruction"})
    assert "illegal instruction" in findings(doctor._torch)["cpu", "FAIL"]


@pytest.mark.parametrize(
    ("variant", "lacking", "independent", "level", "words"),
    [
        ("vnni", {"amx": "the operating system does not permit tiles"}, True, "ok", "vnni; not amx: the operating system does not permit tiles"),
        (None, {"amx": "x", "avx512": "the processor has no avx512bw"}, True, "ok", "torch's operators are used (the processor has no avx512bw)"),
        ("vnni", {}, True, "ok", "vnni; compiled by c++"),
        (None, {"amx": "x", "avx512": "no C++ compiler on the PATH"}, True, "warn", "give it a C++ compiler"),
        (None, {"avx512": "no C++ compiler on the PATH"}, True, "warn", "took 24 ms with the kernels and 110 without"),
        (None, {"kernels": "turned off (LORABATCH_KERNELS=off)"}, False, "warn", "depend on how many requests run at once here"),
    ],
)  # fmt: skip
def test_the_kernels_that_serve_and_why_not_better_ones(
    probed, variant, lacking, independent, level, words
):
    kernels = {"variant": variant, "why_not": lacking, "compiler": "c++"}
    probed(CPU | {"kernels": kernels, "rows_are_independent": independent})
    assert words in findings(doctor._torch)["kernels", level]


def test_fewer_gpus_than_the_job_has(probed, monkeypatch):
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    probed(CPU, V100)
    assert "2 GPUs, torch sees 1" in findings(doctor._torch)["gpu", "FAIL"]
    probed(CPU, V100, V100)
    assert ("gpu", "FAIL") not in findings(doctor._torch)


def test_a_torch_of_another_place_or_version_fails(probed):
    probed(CPU, file="/home/me/.local/lib/python3.11/site-packages/torch/__init__.py")
    assert "PYTHONNOUSERSITE" in findings(doctor._torch)["torch", "FAIL"]
    probed(CPU, version="2.4.1+cu121")
    assert "2.11 to 2.13" in findings(doctor._torch)["torch", "FAIL"]


def test_a_torch_that_hangs_or_crashes_is_a_finding_not_the_end(monkeypatch):
    def hang(*words, **options):
        raise subprocess.TimeoutExpired(words, 1)

    monkeypatch.setattr(doctor.subprocess, "run", hang)
    assert "no answer" in findings(doctor._torch)["torch", "FAIL"]
    monkeypatch.undo()
    monkeypatch.setattr(doctor.sys, "executable", "/bin/false")
    assert ("torch", "FAIL") in findings(doctor._torch)


def test_threads_caches_and_offline_variables(monkeypatch, tmp_path):
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(doctor, "usable_cores", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "48")
    assert "OMP_NUM_THREADS=4" in findings(doctor._threads)["threads", "warn"]
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    assert "SRUN_CPUS_PER_TASK" in findings(doctor._threads)["threads", "warn"]
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert "HF_HUB_OFFLINE=1" in findings(doctor._offline)["offline", "warn"]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRANSFORMERS_CACHE", str(tmp_path))
    assert "transformers 5 ignores it" in findings(doctor._offline)["offline", "warn"]


def test_cores_that_others_use_are_found_by_working_on_them(monkeypatch):
    monkeypatch.setattr(doctor, "probe", lambda cores: 0.04)
    assert "nobody else's" in findings(doctor._load)["load", "ok"]
    monkeypatch.setattr(doctor, "probe", lambda cores: None)
    assert "not known" in findings(doctor._load)["load", "ok"]
    monkeypatch.undo()
    busy = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(busy) for _ in range(2 * doctor.usable_cores())]
    try:
        time.sleep(0.3)
        assert "wait for them" in findings(doctor._load)["load", "warn"]
    finally:
        for other in others:
            other.kill()
            other.wait()


def test_full_disk_and_exhausted_inodes_fail(monkeypatch, tmp_path):
    stat = {"f_bavail": 10**9, "f_frsize": 4096, "f_files": 10, "f_favail": 10**6}
    for change, word in ({"f_bavail": 1}, "quota"), ({"f_favail": 5}, "small files"):
        monkeypatch.setattr(
            doctor.os, "statvfs", lambda path, change=change: SimpleNamespace(**stat | change)
        )
        assert word in findings(doctor._disk, output_dir=str(tmp_path))["disk", "FAIL"]


@pytest.mark.parametrize(
    ("capability", "arch_list", "runs"),
    [
        ((7, 0), ["sm_75", "sm_80", "sm_90"], False),
        ((7, 0), ["sm_70", "sm_80"], True),
        ((8, 6), ["sm_80", "sm_90"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80", "compute_80"], True),
        ((12, 0), ["sm_90a", "sm_120"], True),
        ((10, 0), ["sm_90"], False),
    ],
)
def test_architectures_that_a_build_runs_on(capability, arch_list, runs):
    assert probe.built_for(*capability, arch_list) == runs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_wrong_entry_of_a_product_is_seen(dtype):
    device = torch.device("cpu")
    assert probe.wrong_products(device, dtype) == 0
    true_matmul = torch.Tensor.__matmul__

    def off_by_one(a, b):
        product = true_matmul(a, b).clone()
        product[3, 5] += 1 if product.dtype == dtype else 0
        return product

    torch.Tensor.__matmul__ = off_by_one
    try:
        assert probe.wrong_products(device, dtype) == 1
    finally:
        torch.Tensor.__matmul__ = true_matmul


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("20", 1200),
        ("1:30", 90),
        ("02:00:00", 7200),
        ("1-00", 86400),
        ("4-12:00:30", 388830),
        ("infinite", float("inf")),
        ("soon", None),
    ],
)
def test_time_formats_of_slurm(text, expected):
    assert slurm.seconds(text) == expected


def test_a_task_of_an_array_asks_for_itself_alone(monkeypatch):
    """Slurm answers with a line per task where the number stands for the whole array."""
    answers = {"--jobs=7": "20:00\n19:00\n", "--jobs=7_1": "19:00\n", "--jobs=8": "UNLIMITED\n"}
    monkeypatch.setattr(slurm, "ask", lambda *words: answers[words[2]])
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert slurm.job_seconds_left() is None
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert slurm.job_seconds_left() == 1140
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert slurm.job_seconds_left() is None
