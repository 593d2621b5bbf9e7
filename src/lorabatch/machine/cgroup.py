"""The control groups of this process: what a container or a Slurm job may use, and how long it was
held back."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

UNLIMITED = 2**60  # version 1 of control groups writes "no limit" as a huge number of bytes


class ControlGroup:
    """Limits of this process's control group and of those above it (version 1 or 2): what Slurm or
    a container allows."""

    def __init__(
        self, root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
    ) -> None:
        self._memory, self._cpu = [root], [root]
        with suppress(OSError):
            for line in membership.read_text(encoding="utf-8").splitlines():
                _, controllers, path = line.split(":", 2)
                for kind, folders in (("memory", self._memory), ("cpu", self._cpu)):
                    if kind in controllers.split(","):
                        folders[:] = (
                            _upwards(root / controllers, path)
                            if (root / controllers).exists()
                            else _upwards(root / kind, path)
                        )
                    elif not controllers and (root / "cgroup.controllers").exists():
                        folders[:] = _upwards(root, path)

    def limits(self) -> dict[str, float | None]:
        memory = [
            value
            for folder in self._memory
            for name in ("memory.max", "memory.limit_in_bytes")
            for value in _numbers(folder / name)[:1]
        ]
        cores = [
            quota / period
            for folder in self._cpu
            for quota, period in [_quota(folder)]
            if quota and period
        ]
        memory = [value for value in memory if value < UNLIMITED]
        return {
            "cgroup_memory_bytes": min(memory, default=None),
            "cgroup_cores": min(cores, default=None),
        }

    def throttled_s(self) -> float | None:
        """Seconds for which the group had to wait because its quota was used up."""
        stat = _table(self._cpu[0] / "cpu.stat")
        return next(
            (
                stat[name] / unit
                for name, unit in (("throttled_usec", 1e6), ("throttled_time", 1e9))
                if name in stat
            ),
            None,
        )

    def left_bytes(self) -> float:
        """What the tightest limit leaves (infinite without one). Pages of files that were read once
        are free: the kernel drops them."""
        left = [float("inf")]
        for folder in self._memory:
            for limit, usage, once in (
                ("memory.max", "memory.current", "inactive_file"),
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            ):
                most, used = _numbers(folder / limit)[:1], _numbers(folder / usage)[:1]
                if most and used and most[0] < UNLIMITED:
                    left.append(most[0] - used[0] + _table(folder / "memory.stat").get(once, 0))
        return max(0.0, min(left))


def _upwards(root: Path, path: str) -> list[Path]:
    """The group's folder and those above it, as far as they are visible from here (a container sees
    only its own)."""
    folder = root / path.strip("/")
    return [
        place
        for place in (folder, *folder.parents)
        if place.is_relative_to(root) and place.is_dir()
    ] or [root]


def _quota(folder: Path) -> tuple[float, float]:
    both = _numbers(folder / "cpu.max")
    if len(both) < 2:
        both = _numbers(folder / "cpu.cfs_quota_us") + _numbers(folder / "cpu.cfs_period_us")
    return (both[0], both[1]) if len(both) == 2 and both[0] > 0 else (0.0, 0.0)


def _numbers(path: Path) -> list[float]:
    """The numbers in a one-line file; none where it is missing. "max" is no number."""
    with suppress(OSError):
        return [
            float(word)
            for word in path.read_text(encoding="ascii").split()
            if word.lstrip("-").isdigit()
        ]
    return []


def _table(path: Path) -> dict[str, int]:
    """A file with a name and a number in each line; empty where it is missing."""
    with suppress(OSError, ValueError):
        return {
            name: int(value)
            for name, value in map(str.split, path.read_text(encoding="ascii").splitlines())
        }
    return {}
