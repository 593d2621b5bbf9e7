"""Damage of every kind in everything that is read back: an exit code that is documented, one line,
nothing lost, nothing silently wrong.

Each record is damaged as it is written now (sealed: a flipped bit must never change what a command
says) and as it was before there were checksums (then every field must survive another type, a
missing key, a number out of bounds).
"""

import contextlib
import io
import json
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.commands import infer_flags, train_flags, write_lines
from support.paths import ROOT

from lorabatch.bench.scaling import bench_record, estimate
from lorabatch.cli import main
from lorabatch.records import write_json
from lorabatch.schema import CHECKSUM

CODES = {0, 64, 65, 69, 70}
TEXTS = [
    "The patient has a fever",
    "chest pain",
    "rest and water",
    "a cough at night",
    "no pain today",
    "blood pressure is high",
]
VALUES = [
    None,
    True,
    -1,
    0,
    1,
    2.5,
    1e308,
    10**25,
    10**400,
    float("nan"),
    float("-inf"),
    "",
    "x",
    "\x00",
    "\ud800",
    "1e9",
    [],
    {},
    [[]],
    {"a": 1},
]
JUNK = [
    b"",
    b"null",
    b"[]",
    b"{}",
    b"NaN",
    b'"text"',
    b"{" * 3,
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"\xff\xfe",
    b"\x00" * 64,
    b"9" * 5000,
]


def damaged(content, data, *, lines, fields=True):
    """(the bytes with one damage, whether it was a single flipped bit). fields: it is JSON, whose
    fields may change."""
    kind = data.draw(
        st.sampled_from(["bit", "bit", "cut", "bytes", "junk"] + ["field"] * 4 * fields)
    )
    if kind == "bit" and content:
        place, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
        return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :], True
    if kind == "cut":
        return content[: data.draw(st.integers(0, len(content)))], False
    if kind == "bytes":
        place = data.draw(st.integers(0, len(content)))
        return content[:place] + data.draw(st.binary(min_size=1, max_size=4)) + content[
            place:
        ], False
    if kind == "junk":
        return data.draw(st.sampled_from(JUNK)) + b"\n", False
    rows = content.decode().splitlines() if lines else [content.decode()]
    number = data.draw(st.integers(0, len(rows) - 1))
    record = json.loads(rows[number])
    record.pop(CHECKSUM, None)
    inside, key = record, None
    while isinstance(inside, (dict, list)) and inside and (key is None or data.draw(st.booleans())):
        outer, keys = inside, list(inside) if isinstance(inside, dict) else list(range(len(inside)))
        key = data.draw(st.sampled_from(keys))
        inside = outer[key]
    if data.draw(st.integers(0, 4)) == 0:
        del outer[key]
    else:
        outer[key] = data.draw(st.sampled_from(VALUES))
    rows[number] = json.dumps(record)
    return ("\n".join(rows) + "\n").encode(errors="surrogatepass"), False


def unsealed(content, *, lines):
    """As it was written before there were checksums."""
    records = [
        json.loads(text)
        for text in (content.decode().splitlines() if lines else [content.decode()])
    ]
    for record in records:
        record.pop(CHECKSUM, None)
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def run(argv):
    """(exit code, standard output, standard error)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in argv])
    return code, out.getvalue(), err.getvalue()


def check(argv):
    code, out, err = run(argv)
    assert code in CODES, (code, err)
    assert "Traceback" not in err and "unforeseen" not in err, err
    if code:
        assert err.strip().splitlines()[-1].startswith("lorabatch "), err
    return code, out, err


def bench_file(path, factor):
    points = [
        {
            "batch_size": n,
            "tokens_per_s": estimate([factor * n * 100.0 + i for i in range(6)]),
            "waited_share": 0.01,
        }
        for n in (1, 2)
    ]
    write_json(
        path,
        bench_record(
            "bench infer",
            "batch_size",
            points,
            command=["lorabatch", "bench"],
            config={"dtype": "fp32"},
            gpu=None,
        ),
    )


@pytest.fixture(scope="module")
def home(tiny_llama_dir, tmp_path_factory):
    """A training run and a copy that was killed, an inference, its shards, a sweep, two benchmarks.
    Read it only."""
    home = tmp_path_factory.mktemp("home")
    write_lines(home / "texts.txt", TEXTS)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for words in (
            train_words(home, tiny_llama_dir, "train"),
            infer_words(home, tiny_llama_dir, "infer"),
        ):
            assert main(words) == 0
    shutil.copytree(home / "train", home / "killed")
    shutil.rmtree(home / "killed/checkpoints/step-00000003")
    write_json(
        home / "killed/run.json",
        json.loads((home / "killed/run.json").read_text()) | {"status": "running"},
    )
    # done already, so that nothing is computed and no process is started
    shard = home / "shards/shards/0000"
    shutil.copytree(home / "infer", shard / "output-000/0-6")
    record = {
        "schema_version": 1,
        "files": ["output-000/0-6/completions.jsonl"],
        "quarantined": [],
        "work_keys": [],
    }
    write_json(shard / "DONE.json", record)
    assert run(infer_words(home, tiny_llama_dir, "shards", "--shards", 1))[0] == 0
    (home / "sweep.toml").write_text(
        '[train]\nbase_model = "x"\n[search]\nlr = [1e-4, 2e-4]\n', encoding="utf-8"
    )
    search = {
        "method": "grid",
        "samples": 10,
        "seed": 0,
        "metric": "eval_loss",
        "train": {"base_model": "x"},
        "search": {"lr": [1e-4, 2e-4]},
    }
    plan = {
        "schema_version": 2,
        "sweep": search,
        "trials": [{"lr": 1e-4}, {"lr": 2e-4}],
        "tasks": [[0], [1]],
    }
    for number in (0, 1):
        folder = home / f"sweep/tasks/000{number}"
        folder.mkdir(parents=True)
        trial = {
            "value": 3.5 - number,
            "error": None,
            "run": f"tasks/000{number}/output-000/000{number}",
        }
        write_json(
            folder / "DONE.json",
            {
                "schema_version": 1,
                "trials": {str(number): trial},
                "at": "2026-01-02T03:04:05+00:00",
            },
        )
    write_json(home / "sweep/sweep.json", plan)
    bench_file(home / "a.json", 1.0)
    bench_file(home / "b.json", 1.3)
    shutil.copy(ROOT / "configs/sites/sdumont2nd-h100.env", home / "site.env")
    (home / "e.toml").write_text(
        'base_model = "x"\n[train]\nlr = 1e-3\nmax_steps = 3\n[infer]\nstop = ["a", "b"]\n',
        encoding="utf-8",
    )
    return home


def train_words(home, model, name, *more):
    fixed = "--val_path none --max_steps 3 --batch_size 2 --save_every_steps 1"
    more = ["--lora_r", 2, "--keep_checkpoints", 4, *more]
    return train_flags(model, home / "texts.txt", home / name, *fixed.split(), *more)


def infer_words(home, model, name, *more):
    words = home / "texts.txt", home / name
    return infer_flags(model, *words, "--max_new_tokens", 2, *more)


def examples(quick, slow):
    """The test below with a few examples, and as ``test_..._slow`` with many."""

    def made(test):
        def decorated(count):
            quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
            return settings(
                max_examples=count,
                deadline=None,
                derandomize=True,
                suppress_health_check=quiet,
                database=None,
            )(given(st.data())(test))

        globals()[f"{test.__name__}_slow"] = pytest.mark.slow(decorated(slow))
        return decorated(quick)

    return made


@contextlib.contextmanager
def damaged_copy(home, names, data):
    """(a copy, the damaged file, its bytes before, whether it is sealed and one bit of it was
    flipped) with one of the files damaged."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "home"
        shutil.copytree(home, copy)
        path = copy / data.draw(st.sampled_from(names))
        lines, before = path.suffix == ".jsonl", path.read_bytes()
        sealed = data.draw(st.booleans()) or path.suffix not in (".json", ".jsonl")
        content = before if sealed else unsealed(before, lines=lines)
        after, flipped = damaged(content, data, lines=lines, fields=path.suffix != ".safetensors")
        path.write_bytes(after)
        yield copy, path, content, sealed and flipped


COMPARED = [
    "train/run.json",
    "train/metrics.json",
    "train/events.jsonl",
    "infer/run.json",
    "infer/metrics.json",
    "a.json",
]


@examples(14, 200)
def test_compare(home, data):
    with damaged_copy(home, COMPARED, data) as (copy, path, _, flipped):
        names = (
            ("a.json", "b.json") if path.name == "a.json" else (path.parent.name, path.parent.name)
        )
        words = ["compare", copy / names[0], home / names[1]]
        code, out, _ = check(words)
        if flipped and not code:
            assert (
                out.replace(str(copy), str(home))
                == run(["compare", home / names[0], home / names[1]])[1]
            )


REPORTED = [*COMPARED, "train/system.jsonl", "infer/completions.jsonl", "infer/system.jsonl"]


@examples(4, 20)
def test_report(home, data):
    with damaged_copy(home, REPORTED, data) as (copy, path, _, _):
        check(
            [
                "report",
                copy / "a.json" if path.name == "a.json" else path.parent,
                "--output_dir",
                copy / "report",
            ]
        )


@examples(6, 150)
def test_sweep(home, data):
    with damaged_copy(home, ["sweep/sweep.json", "sweep/tasks/0000/DONE.json"], data) as (
        copy,
        _,
        _,
        flipped,
    ):
        code, out, _ = check(["sweep", copy / "sweep.toml", "--output_dir", copy / "sweep"])
        if flipped and not code:
            assert "| 1 | 0.0002 | 2.5000 |" in out and "| 2 | 0.0001 | 3.5000 |" in out


@examples(6, 200)
def test_site_files_and_toml(home, data):
    """Text files: whatever stands in them, one line says so."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        name = data.draw(st.sampled_from(["site.env", "e.toml", "sweep.toml"]))
        paths = {
            n: Path(shutil.copy(home / n, folder)) for n in ("site.env", "e.toml", "sweep.toml")
        }
        content = paths[name].read_bytes()
        place = data.draw(st.integers(0, len(content)))
        piece = data.draw(
            st.sampled_from(
                [
                    *JUNK,
                    b"9" * 400,
                    b"=",
                    b"'",
                    b'"',
                    b"\n",
                    b"[",
                    b"\xc3",
                    b"-",
                    b"1e999",
                    b"nan",
                    b"9" * 20,
                ]
            )
        )
        gone = data.draw(st.sampled_from([0, 1, 4, 40]))
        paths[name].write_bytes(content[:place] + piece + content[place + gone :])
        what = (
            ["sweep", "--sweep_file", paths["sweep.toml"]]
            if name == "sweep.toml"
            else ["pipeline", "--config", paths["e.toml"]]
        )
        check(
            [
                "submit",
                *what,
                "--site",
                paths["site.env"],
                "--dry_run",
                "--run_dir",
                f"{folder}/run",
                "--time",
                "20",
            ]
        )


@examples(4, 15)
def test_infer_goes_on_and_loses_nothing(home, tiny_llama_dir, data):
    files = [
        "infer/completions.jsonl",
        "infer/completions.jsonl",
        "infer/run.json",
        "infer/metrics.json",
    ]
    with damaged_copy(home, files, data) as (copy, path, before, flipped):
        whole = (
            set(before.splitlines()) & set(path.read_bytes().splitlines())
            if path.suffix == ".jsonl"
            else set()
        )
        shutil.copy(home / "texts.txt", copy)
        code, _, _ = check(infer_words(copy, tiny_llama_dir, "infer", "--resume"))
        left = (copy / "infer/completions.jsonl").read_bytes().splitlines()
        assert whole <= set(left)
        if not code:
            assert sorted(json.loads(line)["id"] for line in left) == [
                str(i) for i in range(len(TEXTS))
            ], "every request once"
        if flipped and path.suffix == ".jsonl":
            assert code == 0, "the damaged line is done again"


SHARD = [
    f"shards/shards/0000/{name}"
    for name in (
        "DONE.json",
        *(f"output-000/0-6/{n}" for n in ("completions.jsonl", "run.json", "metrics.json")),
    )
]


@examples(4, 30)
def test_shards_merge_every_request_once(home, tiny_llama_dir, data):
    with damaged_copy(home, ["shards/plan.json", "shards/run.json", *SHARD], data) as (
        copy,
        _,
        _,
        _,
    ):
        words = infer_words(home, tiny_llama_dir, copy / "shards", "--shards", 1)
        code, _, _ = check(words)
        if not code:
            lines = (copy / "shards/completions.jsonl").read_text(encoding="utf-8").splitlines()
            assert [json.loads(line)["id"] for line in lines] == [str(i) for i in range(len(TEXTS))]


STATE = [
    f"killed/checkpoints/step-00000002/{name}"
    for name in ("COMPLETE", "state.json", "state.safetensors")
]


@examples(4, 15)
def test_training_goes_on_to_the_same_bits(home, tiny_llama_dir, data):
    files = [*STATE, "killed/run.json", "killed/events.jsonl"]
    with damaged_copy(home, files, data) as (copy, path, _, _):
        code, _, _ = check(train_words(copy, tiny_llama_dir, "killed", "--resume", "auto"))
        if path.parent.name.startswith("step-"):
            assert code == 0, "the checkpoint before serves"
        if not code:
            final = "adapter_model.safetensors"
            assert (copy / "killed" / final).read_bytes() == (home / "train" / final).read_bytes()
