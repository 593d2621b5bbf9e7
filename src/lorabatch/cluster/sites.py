"""What a cluster wants of its jobs: ``configs/sites/*.env``, Slurm's own answers, and the rules
checked before submission."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from lorabatch import slurm
from lorabatch.config import SubmitConfig
from lorabatch.errors import DataError, UsageError, nearest
from lorabatch.progress import clock

FOLDER = Path("configs/sites")


@dataclass(frozen=True)
class Site:
    """The keys of a site file, in lower case and without ``SITE_``; empty where the site has no
    rule."""

    gpu_partition: str = ""
    cpu_partition: str = ""
    time_limits: str = ""
    shared: str = ""
    max_jobs: str = ""
    max_gpus_per_node: str = ""
    modules_gpu: str = ""
    modules_cpu: str = ""

    def limits_s(self) -> dict[str, float]:
        """Longest time of each partition: the running Slurm's, else the file's."""
        entries = (entry.partition("=") for entry in self.time_limits.split())
        return slurm.partition_limits() or {
            name: slurm.seconds(limit) or 0.0 for name, _, limit in entries
        }


def load_site(name: str) -> Site:
    """A name in configs/sites or the path of a file. UsageError for an unknown one, DataError for
    what is wrong in it."""
    path = Path(name) if "/" in name else FOLDER / f"{name}.env"
    if not path.is_file():
        raise UsageError(
            f"no such site ({path})",
            where=f"--site {name}",
            fix=nearest(name, [p.stem for p in FOLDER.glob("*.env")]),
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(
            f"not a readable text file ({error})", where=path, fix="see configs/sites/generic.env"
        ) from None
    values: dict[str, str] = {}
    for number, line in enumerate(text.replace("\0", "\ufffd").splitlines(), start=1):
        values |= _entries(line, f"{path}:{number}")
    return Site(**values)


def _entries(line: str, where: str) -> dict[str, str]:
    """The keys of one line, as fields of ``Site``."""
    try:
        entries = shlex.split(line, comments=True)
    except ValueError as error:  # a quote that is not closed
        raise DataError(
            f"not a line of a shell ({error})", where=where, fix="fix the quotes"
        ) from None
    values = {}
    for entry in entries:
        key, _, value = entry.partition("=")
        name = key.removeprefix("SITE_").lower()
        if name not in {f.name for f in fields(Site)}:
            raise DataError(
                f"unknown key '{key}'",
                where=where,
                fix="see configs/sites/generic.env for the keys",
            )
        if not _is_rule(name, value):
            raise DataError(
                f"'{value}' is not a value of {key}",
                where=where,
                fix="see configs/sites/generic.env",
            )
        values[name] = value
    return values


def _is_rule(name: str, value: str) -> bool:
    if name == "time_limits":
        return all(
            partition and slurm.seconds(limit)
            for partition, _, limit in (entry.partition("=") for entry in value.split())
        )
    return (
        name not in ("max_jobs", "max_gpus_per_node")
        or re.fullmatch("[0-9]{0,9}", value) is not None
    )


def check_rules(config: SubmitConfig, site: Site, partition: str, *, num_jobs: int) -> None:
    """UsageError for what the site would refuse or leave pending for ever."""
    _check_time(config, site.limits_s(), partition)
    if config.exclusive and partition in site.shared.split():
        raise UsageError(
            f"partition {partition} is shared",
            where="--exclusive",
            fix="leave it out, or choose an exclusive partition",
        )
    if config.device == "cpu" and partition and partition == site.gpu_partition:
        what = "a GPU partition, for a job without GPUs: it would pend for ever"
        raise UsageError(what, where=f"--partition {partition}", fix="--device gpu")
    _at_most(
        site.max_gpus_per_node,
        config.gpus if config.device == "gpu" else 0,
        "--gpus",
        "GPUs per node of one job",
    )
    _at_most(
        site.max_jobs,
        num_jobs,
        "--array",
        "jobs in the queue; fewer array tasks do the same shards",
    )


def _check_time(config: SubmitConfig, limits: Mapping[str, float], partition: str) -> None:
    asked = slurm.seconds(config.time)
    if asked is None or asked < 60:
        raise UsageError(
            "not a time limit of at least a minute",
            where=f"--time {config.time}",
            fix="give minutes, H:MM:SS or D-HH:MM:SS",
        )
    if partition and limits and partition not in limits:
        raise UsageError(
            "no such partition here",
            where=f"--partition {partition}",
            fix=nearest(partition, limits),
        )
    if partition in limits and asked > limits[partition]:
        most = clock(limits[partition])
        raise UsageError(
            f"longer than partition {partition} allows",
            where=f"--time {config.time}",
            fix=f"give at most {most}; work that does not fit saves itself and is requeued",
        )


def _at_most(limit: str, value: int, flag: str, what: str) -> None:
    if limit and value > int(limit):
        raise UsageError(
            f"the site allows {limit} {what}", where=f"{flag} (makes {value})", fix="request fewer"
        )
