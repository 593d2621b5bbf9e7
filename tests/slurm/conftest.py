"""A real Slurm of two virtual nodes for the tests in this folder, started once; see
slurm_cluster.sh."""

import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.commands import patients, write_lines
from support.paths import ROOT

SCRIPT = Path(__file__).with_name("slurm_cluster.sh")
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "slurmdbd", "mariadbd")
PATIENCE_S = 300  # the machine may be busy with other things for minutes


@dataclass(frozen=True)
class Cluster:
    """``project``: a copy of ours that jobs are submitted from, with a symbolic link to the
    environment."""

    project: Path
    variables: dict[str, str]

    def run(self, *words, check=True, cwd=None, **variables):
        return subprocess.run(
            list(map(str, words)),
            cwd=cwd or self.project,
            env=self.variables | variables,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=check,
        )

    def lorabatch(self, *words, **variables):
        return self.run(
            self.project / ".venv/bin/python", "-m", "lorabatch", *words, check=False, **variables
        )

    def submit(self, *words, **variables):
        return self.run("sbatch", "--parsable", *words, **variables).stdout.strip()

    def sacct(self, job, *more):
        """[(job or task id, state, exit code)] of the job itself, without its steps."""
        lines = self.run(
            "sacct", "-X", "-n", "-P", "-j", job, "--format=JobID,State,ExitCode", *more
        ).stdout.splitlines()
        return [tuple(line.split("|")) for line in lines]

    def wait(self, job, timeout_s=PATIENCE_S):
        """Until the job and all tasks of an array have left the queue. Returns sacct's rows."""
        self.until(lambda: not self.in_queue(job), f"job {job} to end", timeout_s)
        self.until(
            lambda: (
                (rows := self.sacct(job)) and all(r[1] not in ("RUNNING", "PENDING") for r in rows)
            ),
            f"sacct of {job}",
            60,
        )
        return self.sacct(job)

    def in_queue(self, job):
        return bool(self.run("squeue", "-h", "-j", job, check=False).stdout.strip())

    def until(self, condition, what, timeout_s=PATIENCE_S):
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, f"waited {timeout_s} s for {what}; logs:\n{self.logs()}"
            time.sleep(0.2)

    def logs(self, job="*"):
        return "\n".join(
            p.read_text(errors="replace")
            for p in sorted((self.project / "results").rglob(f"*-{job}.out"))
        )


def copy_project(target):
    """What a fresh clone holds that jobs need; the environment is ours."""
    for folder in ("scripts", "configs", "env", "data_sample", "results"):
        shutil.copytree(
            ROOT / folder,
            target / folder,
            ignore=shutil.ignore_patterns("*-*") if folder == "results" else None,
        )
    shutil.copy(ROOT / "pyproject.toml", target)
    (target / ".venv").symlink_to(os.environ.get("VENV", ROOT / ".venv"))
    return target


# The cluster ends when the pipe to this script does: after the tests of this folder, or however
# else pytest ends.
UNTIL_END_OF_PIPE = '{ read -r _ || true; bash "$0" stop "$1"; rm -rf "$1"; } <&0 >/dev/null 2>&1 &'


@pytest.fixture(scope="package")
def cluster(tmp_path_factory):
    path = os.environ["PATH"] + ":/usr/local/sbin:/usr/sbin:/sbin"
    missing = [name for name in DAEMONS if not shutil.which(name, path=path)]
    if missing:
        pytest.skip(
            f"Slurm is not installed here ({', '.join(missing)}); .ci/run installs it, or "
            "tests/slurm/slurm_cluster.sh install"
        )
    folder = Path(tempfile.mkdtemp(prefix="lb-slurm-"))  # a short path: it holds sockets
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
    variables |= {"PATH": path, "TEST_SLURM_WAIT": str(PATIENCE_S)}
    words = ["bash", "-c", UNTIL_END_OF_PIPE, SCRIPT, folder]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, env=variables, start_new_session=True
    ) as watch:
        subprocess.run(
            ["bash", SCRIPT, "start", folder, "2"],
            check=True,
            timeout=2 * PATIENCE_S,
            env=variables,
            stdin=subprocess.DEVNULL,
        )
        variables["SLURM_CONF"] = f"{folder}/etc/slurm.conf"
        yield Cluster(copy_project(tmp_path_factory.mktemp("project")), variables)
        watch.stdin.close()
    end = time.monotonic() + 240
    while folder.exists():
        assert time.monotonic() < end, f"the cluster in {folder} does not stop"
        time.sleep(0.1)


@pytest.fixture(scope="package")
def named_nodes(cluster):
    """Slurm's node names resolve: without root they do not, and ranks on two nodes cannot meet."""
    if (
        Path(cluster.variables["SLURM_CONF"]).parent / "isolation"
    ).read_text().strip() != "unshare":
        pytest.skip("nodes with names of their own need root")


@pytest.fixture(scope="package")
def experiment(cluster, tiny_llama_dir):
    """A TOML file for all commands: a tiny model, 24 documents, 24 prompts."""
    data = write_lines(cluster.project / "texts.txt", patients(24))
    path = cluster.project / "experiment.toml"
    path.write_text(
        f'base_model = "{tiny_llama_dir}"\ndtype = "fp32"\nthreads = 1\n'
        f'[train]\ntrain_path = "{data}"\nval_path = "{data}"\nbatch_size = 4\nmax_steps = 6\nlr '
        '= 0.01\nlora_r = 4\ndata_checks = "off"\n'
        f'[infer]\nprompts = "{data}"\nmax_new_tokens = 8\nbatch_size = 4\n'
    )
    return path


@pytest.fixture(scope="package")
def environment_with(cluster):
    """Makes an environment like the project's whose Python first runs some code; job.sh clears
    PYTHONPATH, so its Python is a script."""

    def make(code, venv):
        real = cluster.project / ".venv"
        (venv / "bin").mkdir(parents=True)
        (venv / "sitecustomize.py").write_text(code)
        for name in ("pyvenv.cfg", ".lorabatch-build"):
            (venv / name).symlink_to(real / name)
        python = venv / "bin/python"
        python.write_text(f'#!/bin/sh\nPYTHONPATH={venv} exec {real}/bin/python "$@"\n')
        python.chmod(0o755)
        return str(venv)

    return make
