"""``lorabatch submit`` and ``lorabatch status``: job scripts chained by Slurm's dependencies.

    train --afterok--> infer (array) --afterany--> merge --afterok--> report

``merge`` is the same inference command once more: it finishes what killed array tasks left, then merges.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lorabatch import slurm
from lorabatch.cluster.claims import DONE
from lorabatch.cluster.sites import check_rules, load_site
from lorabatch.cluster.sweep import planned_trials
from lorabatch.config import InferConfig, SubmitConfig, SweepConfig, TrainConfig
from lorabatch.errors import UnavailableError, UsageError
from lorabatch.records import read_json, write_json, writing
from lorabatch.settings import read_toml

WHAT = ("train", "infer", "pipeline", "sweep")
SHARDS_PER_TASK = 4  # so that a slow task does not make the others wait for it
SIGNAL_BEFORE_END_S = 300
BAD_ENDS = {"BOOT_FAIL", "CANCELLED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"}


@dataclass(frozen=True)
class Job:
    """One sbatch command. ``after``: (kind of dependency, name of the job) pairs."""

    name: str
    options: tuple[str, ...]
    script: str
    words: tuple[str, ...]
    after: tuple[tuple[str, str], ...] = ()

    def command(self, ids: Mapping[str, str]) -> list[str]:
        """``ids``: of the jobs that were submitted before; the name stands in where there is none yet."""
        depends = []
        if self.after:
            conditions = ",".join(f"{kind}:{ids.get(name, name.upper() + '_ID')}" for kind, name in self.after)
            depends = [f"--dependency={conditions}", "--kill-on-invalid-dep=yes"]
        return ["sbatch", "--parsable", f"--job-name={self.name}", *self.options, *depends, self.script, *self.words]


def submit(what: str, config: SubmitConfig, experiment: str | None) -> int:
    """Check everything that Slurm or the job would refuse, then submit, then say how to follow. Returns 0.

    UsageError for the site's rules, UnavailableError when Slurm is not there or refuses.
    """
    if what not in WHAT:
        raise UsageError(f"cannot submit '{what}'", fix=f"one of {', '.join(WHAT)}")
    if not Path("scripts/job.sh").is_file():
        raise UnavailableError("no scripts/job.sh here", where=Path.cwd(), fix="go to the project's folder")
    site = load_site(config.site)
    partition = config.partition or (site.gpu_partition if config.device == "gpu" else site.cpu_partition)
    run_dir = Path(config.run_dir or f"results/{what}-{datetime.now():%Y%m%d-%H%M%S}")
    if "\\" in str(run_dir):  # in the name of an output file it turns off the patterns for jobs and tasks
        raise UsageError("Slurm takes no backslash in the name of a folder", where="--run_dir", fix="choose another")
    cpu_partition = partition if config.device == "cpu" else site.cpu_partition
    jobs = plan(what, config, experiment, run_dir, partition, cpu_partition)
    check_rules(config, site, partition, num_jobs=sum(_tasks(job) for job in jobs))
    environment = {"RUN": str(run_dir), "SITE": config.site}  # what scripts/job.sh reads
    if config.dry_run:
        prefix = " ".join(f"{k}={shlex.quote(v)}" for k, v in environment.items())
        print(f"mkdir -p {shlex.quote(str(run_dir / 'logs'))}")
        print("\n".join(f"{prefix} {shlex.join(job.command({}))}" for job in jobs))
        return 0
    with writing(run_dir, fix="choose another --run_dir"):
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    for job in jobs:
        _sbatch(["sbatch", "--test-only", *job.options, job.script, *job.words], environment)
    ids: dict[str, str] = {}
    for job in jobs:
        ids[job.name] = _sbatch(job.command(ids), environment).split(";")[0].strip()
        write_json(run_dir / "jobs.json", {"schema_version": 1, "jobs": ids})  # at once: a later refusal leaves no lost job
        print(f"{job.name:7} job {ids[job.name]}" + "".join(f", {kind} {name}" for kind, name in job.after))
    shown = shlex.quote(str(run_dir))
    print(f"follow: lorabatch status {shown}   or   tail -F {shown}/logs/*")
    print(f"stop:   scancel {' '.join(ids.values())}")
    return 0


def plan(what: str, config: SubmitConfig, experiment: str | None, run_dir: Path, partition: str, cpu_partition: str) -> list[Job]:
    """The jobs in the order of submission. UsageError for a mistake in the settings that they will read."""
    settings = ("--config", experiment) if experiment else ()
    script = f"scripts/job_{config.device}.slurm"
    on_cpu = ("--no_cuda",) if config.device == "cpu" else ()
    options = _options(config, run_dir, partition)
    jobs: list[Job] = []
    if what in ("train", "pipeline"):
        _check(TrainConfig, experiment)
        words = ("train", *settings, *on_cpu, "--save_dir", str(run_dir / "train"), "--resume", "auto")
        jobs.append(Job("train", (*options, f"--nodes={config.nodes}", f"--ntasks-per-node={config.tasks_per_node}"), script, words))
    if what in ("infer", "pipeline"):
        _check(InferConfig, experiment)
        adapter = ("--adapter_dir", str(run_dir / "train")) if what == "pipeline" else ()
        shards = config.shards or SHARDS_PER_TASK * (config.array or 1)
        words = ("infer", *settings, *on_cpu, *adapter, "--output_dir", str(run_dir / "infer"), "--shards", str(shards))
        jobs += _array("infer", config, options, script, words, (("afterok", "train"),) if what == "pipeline" else ())
    if what == "sweep":
        if config.sweep_file is None:
            raise UsageError("needs the sweep's file", where="submit sweep", fix="add --sweep_file sweep.toml")
        num_trials = len(planned_trials(Path(config.sweep_file), no_cuda=config.device == "cpu")[1])
        runs = config.runs_per_task or max(1, min(SweepConfig().runs_per_task, num_trials // (config.array or 1)))
        words = ("sweep", config.sweep_file, "--output_dir", str(run_dir), "--runs_per_task", str(runs), *on_cpu)
        jobs += _array("sweep", config, options, script, words, ())
    if what == "pipeline":
        words = ("report", str(run_dir / "train"), str(run_dir / "infer"), "--output_dir", str(run_dir / "report"))
        small: tuple[str, ...] = (f"--partition={cpu_partition}",) if cpu_partition else ()
        small += (f"--account={config.account}",) if config.account else ()
        small += ("--time=15", "--signal=B:USR1@60", "--cpus-per-task=1", "--mem=4G", _log(run_dir))
        jobs.append(Job("report", small, "scripts/job_cpu.slurm", words, (("afterok", jobs[-1].name),)))
    return jobs


def _array(
    name: str, config: SubmitConfig, options: tuple[str, ...], script: str, words: tuple[str, ...], after: tuple[tuple[str, str], ...]
) -> list[Job]:
    """Tasks that share claimed work and leave when nothing is free, and the job that completes and sums up."""
    one = (*options, "--nodes=1", "--ntasks-per-node=1")
    if config.array is None:
        return [Job(name, one, script, words, after)]
    array = f"--array=0-{config.array - 1}" + (f"%{config.parallel}" if config.parallel else "")
    logs = tuple(re.sub("%j[.]out$", "%A_%a.out", option) for option in one)  # as squeue and sacct name the tasks
    tasks = Job(name, (*logs, array), script, (*words, "--leave_early"), after)
    return [tasks, Job("merge", one, script, words, (*after, ("afterany", name)))]


def _options(config: SubmitConfig, run_dir: Path, partition: str) -> tuple[str, ...]:
    total_s = slurm.seconds(config.time) or 0.0
    signal_s = int(min(SIGNAL_BEFORE_END_S, total_s / 4))
    options = [f"--time={config.time}", f"--signal=B:USR1@{signal_s}", f"--cpus-per-task={config.cpus_per_task}", _log(run_dir)]
    optional = {"--partition": partition, "--account": config.account, "--mem": config.mem}
    options += [f"{flag}={value}" for flag, value in optional.items() if value]
    options += [f"--gpus-per-node={config.gpus}"] if config.device == "gpu" else []
    return (*options, *(["--exclusive"] if config.exclusive else []))


def _log(run_dir: Path) -> str:
    """The option for the jobs' output: what Slurm would replace in the folder's own name is doubled."""
    return f"--output={run_dir}/logs/".replace("%", "%%") + "%x-%j.out"


def _check(config_class: Any, experiment: str | None) -> None:
    """A mistake in the file is found now, not after a night in the queue."""
    if experiment:
        config_class(**read_toml(config_class, Path(experiment)))


def _tasks(job: Job) -> int:
    array = next((o for o in job.options if o.startswith("--array=0-")), None)
    return int(array.removeprefix("--array=0-").partition("%")[0]) + 1 if array else 1


def _sbatch(words: list[str], environment: Mapping[str, str]) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, env={**os.environ, **environment})
    except FileNotFoundError:
        raise UnavailableError("sbatch is not installed here", fix="run this on a login node, or look with --dry_run") from None
    except subprocess.TimeoutExpired:
        raise UnavailableError("Slurm does not answer", fix="try again later") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise UnavailableError(f"Slurm refuses ({said})", where=shlex.join(words), fix="change what it names")
    return done.stdout


def status(run_dir: Path) -> int:
    """One line per job of a submission: Slurm's states, and the shards that are done. Returns 70 if a job failed, else 0."""
    ids: dict[str, str] = read_json(run_dir / "jobs.json")["jobs"]
    failed = False
    for name, job in ids.items():
        states = _states(job)
        failed |= not BAD_ENDS.isdisjoint(states)
        shown = ", ".join(f"{count} {state}" if sum(states.values()) > 1 else state for state, count in states.items())
        print(f"{name:7} job {job}: {shown or 'no longer in the queue, and no accounting'}{_progress(run_dir, name)}")
    return 70 if failed else 0


def _states(job: str) -> Counter[str]:
    """Of the job, or of every task of an array. The queue knows what goes on now, the accounting (seconds behind) what is over."""
    over = _rows("sacct", "-X", "--noheader", "--parsable2", "--delimiter= ", f"--jobs={job}", "--format=JobID,State")
    now = _rows("squeue", "--noheader", "--array", f"--jobs={job}", "--format=%i %T")
    waiting = "["  # the accounting's line for all tasks that have not begun
    return Counter(({task: state for task, state in over.items() if not (now and waiting in task)} | now).values())


def _rows(*words: str) -> dict[str, str]:
    """First two words of the lines of an answer ("8_1 CANCELLED by 0" -> {"8_1": "CANCELLED"})."""
    lines = [line.split() for line in (slurm.ask(*words) or "").splitlines() if line.strip()]
    return {job: state for job, state, *_ in lines}


def _progress(run_dir: Path, name: str) -> str:
    for folder in (run_dir / name / "shards", run_dir / "tasks"):
        if name in ("infer", "sweep") and folder.is_dir():
            items = [p for p in folder.iterdir() if p.is_dir()]
            return f"; {sum((p / DONE).exists() for p in items)} of {len(items)} begun {folder.name} done"
    return ""
