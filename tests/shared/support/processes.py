"""Real processes of ``lorabatch``: one, several ranks of one run, and one that forks many."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time

from support.paths import SHARED, SRC

# One thread: the models are tiny, and the machine has few cores.
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{SRC}:{SHARED}", "OMP_NUM_THREADS": "1"}
# What a step of a Slurm job tells each of its tasks.
SLURM = {
    "SLURM_JOB_ID": "812345",
    "SLURM_JOB_NODELIST": "gpu[11-12]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_ID": "0",
}


def python(code, **options):
    """A program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        **options,
    )


def python_alone(code, **environment):
    """A program that sees of our environment only where to find things, and ``environment``."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{SRC}:{SHARED}"} | kept | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def start(command, *, log):
    with log.open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "lorabatch", *command],
            env=ENVIRONMENT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def wait_for_lines(path, count, process):
    for _ in range(1200):
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        assert process.poll() is None, "ended too early"
        time.sleep(0.05)
    raise AssertionError(f"{path} did not reach {count} lines")


@contextlib.contextmanager
def forking_process():
    """Runs ``lorabatch`` in a process of its own: attempts(argv, log, kill_after_s=…) -> exit
    code; see attempts.py."""
    command = [sys.executable, "-m", "support.attempts"]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"

        def attempts(argv, log, **options):
            process.stdin.write(json.dumps({"argv": argv, "log": str(log), **options}) + "\n")
            process.stdin.flush()
            return int(process.stdout.readline())

        yield attempts
        process.stdin.close()


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


class Group:
    """``count`` processes of one run, started as torchrun would start them."""

    def __init__(self, count, argv, folder, *, slurm=False, timeout_s=600):
        base = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        base |= {
            "PYTHONPATH": str(SRC),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        port, job = free_port(), str(os.getpid())
        self.logs = [folder / f"log{rank}" for rank in range(count)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            place = {
                "RANK": rank,
                "WORLD_SIZE": count,
                "LOCAL_RANK": rank,
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": port,
            }
            if slurm:
                place = SLURM | {
                    "SLURM_JOB_ID": job,
                    "SLURM_JOB_NODELIST": "localhost",
                    "SLURM_PROCID": rank,
                    "SLURM_LOCALID": rank,
                }
                place |= {"SLURM_NTASKS": count, "SLURM_STEP_NUM_TASKS": count}
            with log.open("a") as output:
                self.processes.append(
                    subprocess.Popen(
                        [
                            sys.executable,
                            "-m",
                            "lorabatch",
                            *argv,
                            "--rank_timeout",
                            str(timeout_s),
                        ],
                        env=base | {k: str(v) for k, v in place.items()},
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

    def wait(self):
        return [p.wait(timeout=600) for p in self.processes]

    def text(self):
        return "\n".join(f"== rank {i}\n{log.read_text()}" for i, log in enumerate(self.logs))
