"""``lorabatch submit``: job scripts chained by Slurm's dependencies.

    train --afterok--> infer (array) --afterany--> merge --afterok--> report

``merge`` is the same inference command once more: it finishes what killed array tasks left, then
merges.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from lorabatch import slurm
from lorabatch.cluster.sites import check_rules, load_site
from lorabatch.cluster.sweep import planned_trials
from lorabatch.config import InferConfig, SubmitConfig, SweepConfig, TrainConfig
from lorabatch.errors import UnavailableError, UsageError
from lorabatch.records import write_json, writing
from lorabatch.settings import Settings, read_toml
from lorabatch.starter import environment_of_jobs

WHAT = ("train", "infer", "pipeline", "sweep")
SHARDS_PER_TASK = 4  # so that a slow task does not make the others wait for it
SIGNAL_BEFORE_END_S = 300

Arguments = tuple[str, ...]  # of a command line


@dataclass(frozen=True)
class Job:
    """One sbatch command. ``after``: (kind of dependency, name of the job) pairs."""

    name: str
    options: Arguments
    script: str
    arguments: Arguments  # of the script: a lorabatch command
    after: tuple[tuple[str, str], ...] = ()

    def command(self, ids: Mapping[str, str]) -> list[str]:
        """``ids``: of the jobs that were submitted before; the name stands in where there is none
        yet."""
        depends = []
        if self.after:
            conditions = ",".join(
                f"{kind}:{ids.get(name, name.upper() + '_ID')}" for kind, name in self.after
            )
            depends = [f"--dependency={conditions}", "--kill-on-invalid-dep=yes"]
        return [
            "sbatch",
            "--parsable",
            f"--job-name={self.name}",
            *self.options,
            *depends,
            self.script,
            *self.arguments,
        ]


def run_submit(config: SubmitConfig, command: list[str]) -> int:
    """Check everything that Slurm or the job would refuse, then submit, then say how to follow.
    Returns 0.

    UsageError for the site's rules, UnavailableError when Slurm is not there or refuses.
    """
    if config.what not in WHAT:
        raise UsageError(f"cannot submit '{config.what}'", fix=f"one of {', '.join(WHAT)}")
    if not Path("scripts/job.sh").is_file():
        raise UnavailableError(
            "no scripts/job.sh here",
            where=Path.cwd(),
            fix="go to the project's folder, or make this one: lorabatch init",
        )
    site, run_dir = load_site(config.site), _run_dir(config)
    partition = config.partition or (
        site.gpu_partition if config.device == "gpu" else site.cpu_partition
    )
    cpu_partition = partition if config.device == "cpu" else site.cpu_partition
    jobs = plan(config, run_dir, partition, cpu_partition)
    check_rules(config, site, partition, num_jobs=sum(_tasks(job) for job in jobs))
    # what scripts/job.sh reads
    environment = {"RUN": str(run_dir), "SITE": config.site} | environment_of_jobs()
    if config.dry_run:
        prefix = " ".join(f"{k}={shlex.quote(v)}" for k, v in environment.items())
        print(f"mkdir -p {shlex.quote(str(run_dir / 'logs'))}")
        print("\n".join(f"{prefix} {shlex.join(job.command({}))}" for job in jobs))
    else:
        _submit(jobs, run_dir, environment)
    return 0


def _run_dir(config: SubmitConfig) -> Path:
    run_dir = config.run_dir or f"results/{config.what}-{datetime.now():%Y%m%d-%H%M%S}"
    # in the name of an output file it turns off the patterns for jobs and tasks
    if "\\" in str(Path(run_dir)):
        raise UsageError(
            "Slurm takes no backslash in the name of a folder",
            where="--run_dir",
            fix="choose another",
        )
    return Path(run_dir)


def _submit(jobs: list[Job], run_dir: Path, environment: Mapping[str, str]) -> None:
    """All of them, or none if Slurm would refuse one."""
    with writing(run_dir, fix="choose another --run_dir"):
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    for job in jobs:
        _sbatch(["sbatch", "--test-only", *job.options, job.script, *job.arguments], environment)
    ids: dict[str, str] = {}
    for job in jobs:
        ids[job.name] = _sbatch(job.command(ids), environment).split(";")[0].strip()
        # at once: a later refusal leaves no lost job
        write_json(run_dir / "jobs.json", {"schema_version": 1, "jobs": ids})
        depends = "".join(f", {kind} {name}" for kind, name in job.after)
        print(f"{job.name:7} job {ids[job.name]}{depends}")
    _say_how_to_follow(shlex.quote(str(run_dir)), ids.values())


def _say_how_to_follow(run_dir: str, ids: Iterable[str]) -> None:
    print(f"follow: lorabatch status {run_dir}   or   tail -F {run_dir}/logs/*")
    print(f"stop:   scancel {' '.join(ids)}")


def plan(config: SubmitConfig, run_dir: Path, partition: str, cpu_partition: str) -> list[Job]:
    """The jobs in the order of submission. UsageError for a mistake in the settings that they will
    read."""
    options = _options(config, run_dir, partition)
    jobs: list[Job] = []
    if config.what in ("train", "pipeline"):
        jobs.append(_training(config, run_dir, options))
    if config.what in ("infer", "pipeline"):
        jobs += _inference(config, run_dir, options)
    if config.what == "sweep":
        jobs += _sweep(config, run_dir, options)
    if config.what == "pipeline":
        jobs.append(_report(config, run_dir, cpu_partition, after=jobs[-1].name))
    return jobs


def _training(config: SubmitConfig, run_dir: Path, options: Arguments) -> Job:
    processes = (f"--nodes={config.nodes}", f"--ntasks-per-node={config.tasks_per_node}")
    arguments = ("train", *_settings(TrainConfig, config), "--save_dir", str(run_dir / "train"))
    return Job("train", (*options, *processes), _script(config), (*arguments, "--resume", "auto"))


def _inference(config: SubmitConfig, run_dir: Path, options: Arguments) -> list[Job]:
    trained = config.what == "pipeline"
    adapter = ("--adapter_dir", str(run_dir / "train")) if trained else ()
    shards = config.shards or SHARDS_PER_TASK * (config.array or 1)
    output = ("--output_dir", str(run_dir / "infer"), "--shards", str(shards))
    arguments = ("infer", *_settings(InferConfig, config), *adapter, *output)
    after = (("afterok", "train"),) if trained else ()
    return _array("infer", config, options, arguments, after)


def _sweep(config: SubmitConfig, run_dir: Path, options: Arguments) -> list[Job]:
    if config.sweep_file is None:
        raise UsageError(
            "needs the sweep's file", where="submit sweep", fix="add --sweep_file sweep.toml"
        )
    num_trials = len(planned_trials(Path(config.sweep_file), no_cuda=config.device == "cpu")[1])
    runs = config.runs_per_task or max(
        1, min(SweepConfig.runs_per_task, num_trials // (config.array or 1))
    )
    output = ("--output_dir", str(run_dir), "--runs_per_task", str(runs))
    return _array(
        "sweep", config, options, ("sweep", config.sweep_file, *output, *_on_cpu(config)), ()
    )


def _report(config: SubmitConfig, run_dir: Path, cpu_partition: str, *, after: str) -> Job:
    """One core of a CPU node for some minutes."""
    options: Arguments = (f"--partition={cpu_partition}",) if cpu_partition else ()
    options += (f"--account={config.account}",) if config.account else ()
    options += ("--time=15", "--signal=B:USR1@60", "--cpus-per-task=1", "--mem=4G", _log(run_dir))
    runs, output = (str(run_dir / "train"), str(run_dir / "infer")), str(run_dir / "report")
    arguments = ("report", *runs, "--output_dir", output)
    return Job("report", options, "scripts/job_cpu.slurm", arguments, (("afterok", after),))


def _script(config: SubmitConfig) -> str:
    return f"scripts/job_{config.device}.slurm"


def _on_cpu(config: SubmitConfig) -> Arguments:
    return ("--no_cuda",) if config.device == "cpu" else ()


def _settings(config_class: type[Settings], config: SubmitConfig) -> Arguments:
    """The flags that bring the experiment's settings. A mistake in the file is found now, not after
    a night in the queue."""
    if config.config is None:
        return _on_cpu(config)
    config_class(**read_toml(config_class, Path(config.config)))
    return ("--config", config.config, *_on_cpu(config))


def _array(
    name: str,
    config: SubmitConfig,
    options: Arguments,
    arguments: Arguments,
    after: tuple[tuple[str, str], ...],
) -> list[Job]:
    """Tasks that share claimed work and leave when nothing is free, and the job that completes and
    sums up."""
    one, script = (*options, "--nodes=1", "--ntasks-per-node=1"), _script(config)
    if config.array is None:
        return [Job(name, one, script, arguments, after)]
    array = f"--array=0-{config.array - 1}" + (f"%{config.parallel}" if config.parallel else "")
    # as squeue and sacct name the tasks
    logs = tuple(re.sub("%j[.]out$", "%A_%a.out", option) for option in one)
    tasks = Job(name, (*logs, array), script, (*arguments, "--leave_early"), after)
    return [tasks, Job("merge", one, script, arguments, (*after, ("afterany", name)))]


def _options(config: SubmitConfig, run_dir: Path, partition: str) -> Arguments:
    total_s = slurm.seconds(config.time) or 0.0
    signal_s = int(min(SIGNAL_BEFORE_END_S, total_s / 4))
    options = [
        f"--time={config.time}",
        f"--signal=B:USR1@{signal_s}",
        f"--cpus-per-task={config.cpus_per_task}",
        _log(run_dir),
    ]
    optional = {"--partition": partition, "--account": config.account, "--mem": config.mem}
    options += [f"{flag}={value}" for flag, value in optional.items() if value]
    options += [f"--gpus-per-node={config.gpus}"] if config.device == "gpu" else []
    return (*options, *(["--exclusive"] if config.exclusive else []))


def _log(run_dir: Path) -> str:
    """The option for the jobs' output: what Slurm would replace in the folder's own name is
    doubled."""
    return f"--output={run_dir}/logs/".replace("%", "%%") + "%x-%j.out"


def _tasks(job: Job) -> int:
    array = next((o for o in job.options if o.startswith("--array=0-")), None)
    return int(array.removeprefix("--array=0-").partition("%")[0]) + 1 if array else 1


def _sbatch(command: list[str], environment: Mapping[str, str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
        )
    except FileNotFoundError:
        raise UnavailableError(
            "sbatch is not installed here", fix="run this on a login node, or look with --dry_run"
        ) from None
    except subprocess.TimeoutExpired:
        raise UnavailableError("Slurm does not answer", fix="try again later") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())
        raise UnavailableError(
            f"Slurm refuses ({said})", where=shlex.join(command), fix="change what it names"
        )
    return done.stdout
