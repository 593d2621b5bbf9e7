"""``lorabatch sweep FILE``: a grid or random search over training settings, shared between
processes.

    method = "grid"                      # or "random", with samples = 20 and seed = 0
    metric = "eval_loss"                 # of metrics.json; smaller is better
    [train]                              # settings of every trial
    base_model = "smollm2-135m"
    [search]
    lr = [1e-4, 3e-4]                    # values, or for random: {min = 1e-5, max = 1e-3, log =
    true}
    lora_r = [8, 16]
    seed = [1, 2, 3]                     # repetitions: the leaderboard averages over them

Trials that agree in base, type and device are put into tasks: ``--runs_per_task`` of them train
over one base in one process (``lorabatch train --jobs``). Every process runs the same command:
tasks are claimed as the shards of an inference are, a trial that was stopped resumes from its
checkpoint, and whoever sees the last task done writes the leaderboard.

    sweep.json   tasks/0001/claim-000   tasks/0001/output-000/0003/adapter_model.safetensors
    tasks/0001/DONE.json
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lorabatch.cluster.child import Ended, run_child
from lorabatch.cluster.claims import DONE, Claim, is_done, owners, work_through
from lorabatch.cluster.leaderboard import as_markdown, leaderboard
from lorabatch.config import SweepConfig, TrainConfig
from lorabatch.errors import DataError, InterruptedRun, UsageError, nearest
from lorabatch.progress import counted
from lorabatch.records import read_json, replacing, utc_now, write_json, writing
from lorabatch.rules import is_number
from lorabatch.schema import Fields, Record
from lorabatch.settings import known_keys, read_table, typed_values
from lorabatch.signals import StopSignals
from lorabatch.train.jobfile import SHARED

MOST_TRIALS = 100_000
ANEW = "remove it and run the same command again: trials that are complete are not trained again"
DEFAULTS: Record = {
    "method": "grid",
    "samples": 10,
    "seed": 0,
    "metric": "eval_loss",
    "train": {},
    "search": {},
}


def run_sweep(config: SweepConfig, command: list[str]) -> int:
    """Returns 0 when the leaderboard stands, or, with ``--leave_early``, when nothing is left to
    claim.

    Raises UsageError or DataError for the file, InterruptedRun after a signal, DataError if every
    trial failed.
    """
    sweep, trials, settings = planned_trials(Path(config.file), no_cuda=config.no_cuda)
    folder = Path(config.output_dir or f"results/sweep-{Path(config.file).stem}")
    tasks = _kept_tasks(
        folder,
        {"schema_version": 2, "sweep": sweep, "trials": trials},
        grouped(settings, config.runs_per_task),
    )
    folders = [folder / "tasks" / f"{i:04d}" for i in range(len(tasks))]
    with StopSignals() as signals:

        def work(index: int, claim: Claim) -> None:
            numbers = tasks[index]
            own = {trial: trials[trial] for trial in numbers}
            _Task(claim, own, settings[numbers[0]], sweep["metric"], signals).complete()
            done = f"{sum(map(is_done, folders))} of {len(folders)}"
            print(f"task {index} (trials {', '.join(map(str, numbers))}) done; {done}", flush=True)

        left = work_through(
            folders,
            work,
            timeout_s=config.claim_timeout_s,
            wait=not config.leave_early,
            stop_requested=lambda: bool(signals),
        )
        if left and signals:
            raise InterruptedRun(
                f"stopped; {left} of {len(tasks)} tasks left",
                where=folder,
                fix="run the same command again",
            )
    if left:
        holders = ", ".join(owners(folders)) or "nobody"
        print(f"nothing left to claim; {counted(left, 'task')} held by {holders}")
        return 0
    results = _results(tasks, folders)
    board = leaderboard(trials, [results[i] for i in range(len(trials))], sweep["metric"])
    _write_board(folder, board)
    if not any(row["runs"] for row in board["rows"]):
        raise DataError("every trial failed", where=folder, fix=f"see {folder}/tasks/*/DONE.json")
    return 0


def _results(tasks: list[list[int]], folders: list[Path]) -> dict[int, Record]:
    """Trial -> its result. DataError for a task whose record is of other trials."""
    found = {
        trial: (folder, result)
        for folder in folders
        for trial, result in read_json(folder / DONE, "task", fix=ANEW)["trials"].items()
    }
    for task, folder in zip(tasks, folders, strict=True):
        if any(found.get(str(trial), (None,))[0] != folder for trial in task):
            raise DataError("does not name the trials of its task", where=folder / DONE, fix=ANEW)
    return {trial: found[str(trial)][1] for task in tasks for trial in task}


def _write_board(folder: Path, board: Record) -> None:
    """By every process that sees the last task done."""
    write_json(folder / "leaderboard.json", board)
    text = as_markdown(board)
    with replacing(folder / "LEADERBOARD.md") as file:
        file.write(text.encode())
    print(text + f"\n{folder / 'LEADERBOARD.md'}")


def planned_trials(path: Path, *, no_cuda: bool) -> tuple[Record, list[Record], list[TrainConfig]]:
    """(the file, the values of each trial, its settings); every mistake in the file is raised
    here."""
    sweep = read_sweep(path)
    trials = list(itertools.islice(expand(sweep), MOST_TRIALS + 1))
    if len(trials) > MOST_TRIALS:
        raise UsageError(
            f"more than {MOST_TRIALS} trials", where=path, fix="give fewer values or samples"
        )
    if not trials:
        raise UsageError(
            "nothing to try",
            where=path,
            fix="give samples of at least 1, and lists with something in them",
        )
    device = {"no_cuda": True} if no_cuda else {}
    return (
        sweep,
        trials,
        [
            TrainConfig(**typed_values(TrainConfig, sweep["train"] | values | device, path))
            for values in trials
        ],
    )


def read_sweep(path: Path) -> Record:
    """The file with its defaults filled in. DataError or UsageError for what is wrong with it."""
    table = read_table(path)
    for key, value in table.items():
        if key not in DEFAULTS:
            raise UsageError(f"unknown key '{key}'", where=path, fix=nearest(key, DEFAULTS))
        if type(value) is not type(DEFAULTS[key]):
            kind = {str: "text", int: "a whole number", dict: "a table"}[type(DEFAULTS[key])]
            raise UsageError(f"'{key}' is {value!r}", where=path, fix=f"give {kind}")
    sweep = DEFAULTS | table
    for name in ("train", "search"):
        sweep[name] = known_keys(TrainConfig, sweep[name], path, f"in [{name}]")
    if sweep["method"] not in ("grid", "random"):
        raise UsageError(
            f"unknown method '{sweep['method']}'", where=path, fix="give grid or random"
        )
    if not sweep["search"]:
        raise UsageError(
            "nothing to search", where=path, fix="add a table [search] with lists of values"
        )
    return sweep


def expand(sweep: Fields) -> Iterator[Record]:
    """The values of each trial. Random search repeats each sampled point for every listed seed."""
    search = dict(sweep["search"])
    for name, values in search.items():
        if not isinstance(values, list) and (sweep["method"] == "grid" or name == "seed"):
            fix = 'give [A, B]; only method = "random" takes {min = A, max = B}, and seed never'
            raise UsageError("not a list of values", where=f"[search] {name}", fix=fix)
    if sweep["method"] == "grid":
        for values in itertools.product(*search.values()):
            yield dict(zip(search, values, strict=True))
        return
    seeds = search.pop("seed", [None])
    generator = random.Random(sweep["seed"])
    for _ in range(sweep["samples"]):
        point = {name: _draw(name, space, generator) for name, space in search.items()}
        for seed in seeds:
            yield point if seed is None else point | {"seed": seed}


def _draw(name: str, space: Record | list[object], generator: random.Random) -> object:
    try:
        if isinstance(space, list):
            return generator.choice(space)
        low, high = space["min"], space["max"]
        if space.get("log"):
            low, high = math.log(low), math.log(high)
        value = generator.uniform(low, high)
        value = math.exp(value) if space.get("log") else value
        return (
            round(value)
            if isinstance(space["min"], int) and isinstance(space["max"], int)
            else float(f"{value:.4g}")
        )
    except (TypeError, KeyError, ValueError, IndexError, OverflowError):
        raise UsageError(
            "not a range", where=f"[search] {name}", fix="give {min = A, max = B} or a list"
        ) from None


def grouped(settings: Sequence[TrainConfig], most: int) -> list[list[int]]:
    """The trials of each task by number: at most ``most``, about as many in each, alike in what
    runs over one base share."""
    alike: dict[str, list[int]] = {}
    for index, config in enumerate(settings):
        alike.setdefault(str([getattr(config, name) for name in SHARED]), []).append(index)
    counts = {key: math.ceil(len(same) / most) for key, same in alike.items()}
    return [
        same[start :: counts[key]] for key, same in alike.items() for start in range(counts[key])
    ]


def _kept_tasks(folder: Path, plan: Record, tasks: list[list[int]]) -> list[list[int]]:
    """The tasks that the sweep began with: ``tasks`` if it begins now. UsageError if the folder
    contains another sweep."""
    path = folder / "sweep.json"
    with writing(folder, fix="choose another --output_dir"):
        folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_json(path, plan | {"tasks": tasks})  # processes that start at once write the same
    found = read_json(path)
    begun: list[list[int]] = found.pop("tasks")
    if found != plan:
        raise UsageError("contains another sweep", where=path, fix="choose another --output_dir")
    if sorted(trial for task in begun for trial in task) != list(
        range(len(plan["trials"]))
    ) or not all(begun):
        raise DataError(
            "its tasks do not hold every trial once",
            where=path,
            fix="restore the file or choose another --output_dir",
        )
    return begun


class _Task:
    """Some trials, trained under one claim. ``trials``: number -> values; ``shared``: settings of
    one of them."""

    def __init__(
        self,
        claim: Claim,
        trials: Mapping[int, Fields],
        shared: TrainConfig,
        metric: str,
        signals: StopSignals,
    ) -> None:
        self._claim, self._trials, self._metric, self._signals = claim, trials, metric, signals
        claim.outputs.mkdir(exist_ok=True)
        self._settings = claim.outputs / "settings.toml"
        self._settings.write_text(shared.to_toml(), encoding="utf-8")

    def complete(self) -> None:
        """Train all in one process. One that does not complete there is tried once alone: it may
        only be the victim of another, or of what killed the process."""
        results = self._train(list(self._trials))
        again = len(results) > 1 or self._killed
        for trial, result in results.items():
            if result["value"] is None and again:
                results |= self._train([trial])
            print(
                f"trial {trial} {self._trials[trial]}: "
                f"{results[trial]['error'] or results[trial]['value']}",
                flush=True,
            )
        self._claim.finish({"trials": results, "at": utc_now()})

    def _train(self, trials: list[int]) -> dict[int, Record]:
        outputs = self._claim.outputs
        jobs = outputs / "jobs.jsonl"
        jobs.write_text(
            "".join(json.dumps(self._job(trial)) + "\n" for trial in trials), encoding="utf-8"
        )
        arguments: list[str | Path] = [
            "train",
            "--config",
            self._settings,
            "--jobs",
            jobs,
            "--save_dir",
            outputs,
            "--resume",
            "auto",
        ]
        ended = run_child(arguments, outputs / "log.txt", self._signals)
        ended.raise_mistake()
        self._killed = ended.code < 0
        return {trial: self._result(outputs / f"{trial:04d}", ended) for trial in trials}

    def _job(self, trial: int) -> Record:
        """Its line of the jobs file; it resumes from what an abandoned claim saved of it."""
        claim, name = self._claim, f"{trial:04d}"
        values = {k: v for k, v in self._trials[trial].items() if k not in SHARED}
        earlier = [
            p
            for g in range(claim.generation)
            if any((p := claim.folder / f"output-{g:03d}" / name).glob("checkpoints/*"))
        ]
        return {
            "name": name,
            **values,
            **(
                {"resume": str(earlier[-1])}
                if earlier and not (claim.outputs / name).exists()
                else {}
            ),
        }

    def _result(self, run: Path, ended: Ended) -> Record:
        record = read_json(run / "run.json") if (run / "run.json").exists() else {}
        value, error = None, record.get("error") or ended.reason
        if record.get("status") == "completed":
            value = read_json(run / "metrics.json").get(self._metric)
            value = value if is_number(value) else None
            error = None if value is not None else f"{self._metric} is not a number in metrics.json"
        return {
            "value": value,
            "error": error,
            "run": str(run.relative_to(self._claim.folder.parents[1])),
        }
