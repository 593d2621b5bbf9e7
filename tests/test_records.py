"""Records: any single flipped bit is found, old ones stay readable, newer ones are refused, damaged
lines are set aside."""

import json
import re
import shutil
from pathlib import Path

import pytest
from support.commands import train_flags, write_lines
from support.paths import ROOT

from lorabatch.bench.scaling import bench_record, estimate
from lorabatch.cli import main
from lorabatch.cluster.claims import try_claim
from lorabatch.errors import DataError, LorabatchError, visible
from lorabatch.records import JsonlWriter, read_json, read_jsonl, set_damaged_aside, write_json
from lorabatch.runs import RUN_FILES, RUN_FOLDERS, RUN_OUTPUTS, RunFolder
from lorabatch.schema import CHECKSUM, KINDS, NewerRecord, check, parsed, sealed
from lorabatch.train import checkpoint

RECORD = {
    "schema_version": 1,
    "name": "\udce9\u202e é",
    "rate": 1e-8,
    "none": None,
    "values": [1, 2.5, {"a": True}],
}
RUN = {
    "schema_version": 1,
    "kind": "train",
    "status": "completed",
    "command": [],
    "config": {},
    "environment": {},
}
STEP = {"event": "step", "step": 1, "loss": 2.5, "lr": 1e-4, "tokens_per_s": 100.0}
COMPLETION = {
    "id": "a",
    "index": 0,
    "sample": 0,
    "key": "0" * 16,
    "prompt": "p",
    "text": "t",
    "input_tokens": 1,
    "output_tokens": 1,
    **dict.fromkeys(
        (
            "finish_reason",
            "truncated",
            "error",
            "adapter",
            "queue_ms",
            "ttft_ms",
            "e2el_ms",
            "logprobs",
        )
    ),
    "chat": False,
}


@pytest.mark.parametrize("indent", [None, 2])
def test_every_flipped_bit_is_found_or_changes_nothing(indent):
    content = sealed(RECORD, indent=indent) + b"\n"
    assert parsed(content, None, "x") == RECORD
    harmless = 0
    for place in range(len(content)):
        for bit in range(8):
            flipped = content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]
            try:
                found = parsed(flipped, None, "x")
            except DataError:
                continue
            harmless += 1
            assert {k: v for k, v in found.items() if k in RECORD} == RECORD, flipped
    assert harmless < 0.1 * 8 * len(content), "the name of the checksum and white space"


def test_what_was_written_before_checksums_is_read(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(RUN), encoding="utf-8")
    assert read_json(tmp_path / "run.json") == RUN
    (tmp_path / "events.jsonl").write_text(json.dumps(STEP) + "\n", encoding="utf-8")
    assert list(read_jsonl(tmp_path / "events.jsonl")) == [STEP]


def test_files_that_others_read_have_no_checksum(tmp_path):
    write_json(tmp_path / "adapter_config.json", {"r": 8})
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {"r": 8}
    write_json(tmp_path / "run.json", RUN)
    assert CHECKSUM in json.loads(
        (tmp_path / "run.json").read_text()
    ) and CHECKSUM not in read_json(tmp_path / "run.json")


@pytest.mark.parametrize("kind", [name for name in KINDS if not name.endswith(".jsonl")])
def test_a_newer_version_of_any_record_is_refused(kind):
    with pytest.raises(
        NewerRecord, match=r"written by a newer lorabatch .* update lorabatch"
    ) as error:
        check(
            {"schema_version": KINDS[kind].version + 1, "what": "it holds, nobody knows"},
            kind,
            "there",
            fix="x",
        )
    assert error.value.exit_code == 65 and "\n" not in str(error.value)


def test_the_commands_refuse_newer_records(tiny_llama_dir, tmp_path, capsys):
    point = {"batch_size": 1, "tokens_per_s": estimate([1.0] * 6)}
    write_json(
        tmp_path / "b.json",
        bench_record("bench infer", "batch_size", [point], command=[]) | {"schema_version": 9},
    )
    (tmp_path / "run").mkdir()
    write_json(tmp_path / "run/run.json", RUN | {"schema_version": 9})
    (tmp_path / "texts.txt").write_text("a\nb\n")
    run, texts = str(tmp_path / "run"), str(tmp_path / "texts.txt")
    for words in (
        ["compare", str(tmp_path / "b.json"), str(tmp_path / "b.json")],
        ["report", str(tmp_path / "b.json")],
        ["report", run],
        train_flags(tiny_llama_dir, texts, run, "--resume", "auto"),
    ):
        assert main(words) == 65, words
        error = capsys.readouterr().err
        assert "written by a newer lorabatch" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), 1e300, 10**400, "7", True, [7], {"a": 7}]
)
def test_a_number_is_a_finite_number(value, tmp_path):
    (tmp_path / "events.jsonl").write_text(
        json.dumps(STEP) + "\n" + json.dumps(STEP | {"loss": value}) + "\n"
    )
    with pytest.raises(DataError, match=r"events\.jsonl:2: (not a JSON line|'loss' is)"):
        list(read_jsonl(tmp_path / "events.jsonl"))


@pytest.mark.parametrize(
    "content",
    [b"[" * 200_000, b'{"a":' * 100_000, b"\xff\xfe{}", b"\x00", b"", b"null", b"9" * 5000],
)
def test_what_is_no_record_is_one_line(content, tmp_path):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(DataError, match=r"run\.json: "):
        read_json(tmp_path / "run.json")


def test_damaged_lines_are_set_aside_and_the_whole_ones_stay(tmp_path, capsys):
    path = tmp_path / "completions.jsonl"
    with JsonlWriter(path) as file:
        for i in range(4):
            file.write(COMPLETION | {"id": str(i), "index": i})
    lines = path.read_bytes().splitlines(keepends=True)
    set_damaged_aside(path)
    assert (
        path.read_bytes() == b"".join(lines)
        and not path.with_name("completions.jsonl.damaged").exists()
    )
    flipped = lines[1].replace(b'"text": "t"', b'"text": "u"')
    path.write_bytes(lines[0] + flipped + lines[2] + b"{torn\n" + lines[3][:9])
    set_damaged_aside(path)
    assert path.read_bytes() == lines[0] + lines[2]
    assert (
        path.with_name("completions.jsonl.damaged").read_bytes()
        == flipped + b"{torn\n" + lines[3][:9] + b"\n"
    )
    assert "3 damaged lines moved to completions.jsonl.damaged" in capsys.readouterr().err


def test_a_claim_with_a_flipped_digit_proves_no_death(tmp_path):
    """Its process number would be that of nobody, and two owners would work on one item."""
    path = try_claim(tmp_path / "0", timeout_s=60).path
    content = path.read_bytes()
    pid = json.loads(content)["pid"]
    path.write_bytes(content.replace(b'"pid": %d' % pid, b'"pid": %d' % (2**22 - 1)))
    assert try_claim(tmp_path / "0", timeout_s=60) is None


def test_an_estimate_that_its_values_do_not_give_is_refused(tmp_path, capsys):
    record = bench_record(
        "bench infer",
        "batch_size",
        [{"batch_size": 1, "tokens_per_s": estimate([100.0 + i for i in range(6)])}],
        command=[],
    )
    # a flipped digit, before there were checksums
    record["points"][0]["tokens_per_s"]["high"] = 905.0
    (tmp_path / "a.json").write_text(json.dumps(record))
    assert main(["compare", str(tmp_path / "a.json"), str(tmp_path / "a.json")]) == 65
    assert "'tokens_per_s' at 1 is not what its values give" in capsys.readouterr().err


def test_an_unforeseen_exception_is_one_line_and_70(monkeypatch, capsys):
    import lorabatch.bench.compare

    monkeypatch.setattr(lorabatch.bench.compare, "compare", lambda *a, **k: {}["a\nb\u202e"])
    assert main(["compare", "a", "b"]) == 70
    error = capsys.readouterr().err
    assert re.fullmatch(
        r"lorabatch compare: unforeseen KeyError: .*; this is a fault of lorabatch: run again with --debug to see where\n",
        error,
    )
    with pytest.raises(KeyError):
        main(["compare", "a", "b", "--debug"])


STEERING = [
    *range(9),
    0x0B,
    0x1B,
    0x7F,
    0x85,
    0x9B,
    0xAD,
    0x61C,
    *range(0x200B, 0x2010),
    *range(0x2028, 0x202F),
    *range(0x2060, 0x2065),
    *range(0x2066, 0x206A),
    0xFEFF,
]


def test_steering_characters_are_visible():
    text = "".join(f"a{chr(c)}" for c in STEERING)
    assert (
        visible(text).isprintable()
        and visible("a\u202eb") == r"a\u202eb"
        and visible("\x1b[2J") == r"\x1b[2J"
    )
    assert visible("preço 5\u00a0€\n\tخط 🙂") == "preço 5\u00a0€\n\tخط 🙂"
    assert str(LorabatchError("a\u202eb", where="c\x1b")) == r"c\x1b: a\u202eb"


def test_no_field_steers_a_report(tmp_path):
    """Every text of the records and the folder's own name."""
    bad = "x" + "".join(map(chr, STEERING)) + "y"
    folder = tmp_path / ("run" + "".join(chr(c) for c in STEERING if c))
    folder.mkdir()
    texts = dict.fromkeys(("host", "os", "cpu", "python"), bad)
    environment = texts | {
        "packages": {bad: bad},
        "git": {"commit": bad, "dirty": True},
        "slurm": {bad: bad},
    }
    record = RUN | {
        "kind": "infer",
        "status": bad,
        "command": [bad, bad],
        "config": {"base_model": bad, bad: bad},
        "environment": environment,
    }
    record |= {
        "error": bad,
        "device": bad,
        "dtype": bad,
        "threads": 1,
        "backend": bad,
        "gpu": {"name": bad, "capability": bad, "cuda": bad},
    }
    write_json(
        folder / "run.json",
        record
        | {"model": {"name": bad, "adapter": bad}, "started_at": "2026-01-02T03:04:05+00:00"},
    )
    write_json(
        folder / "metrics.json",
        {"schema_version": 1, "missing": {bad: bad}, "gpu_throttle_share": {bad: 0.5}},
    )
    with JsonlWriter(folder / "completions.jsonl") as file:
        for i, error in enumerate((None, None, bad)):
            times = {"queue_ms": 1.0, "ttft_ms": 2.0 + i, "e2el_ms": 9.0 + i}
            file.write(
                COMPLETION
                | times
                | {
                    "id": f"{i}{bad}",
                    "index": i,
                    "prompt": bad,
                    "text": bad,
                    "error": error,
                    "finish_reason": bad,
                }
            )
    bench = bench_record(
        bad,
        "batch_size",
        [{"batch_size": 1, "tokens_per_s": estimate([1.0] * 6)}],
        command=[bad],
        gpu={"name": bad},
    )
    write_json(tmp_path / f"b{bad[2:]}.json", bench)
    assert (
        main(
            [
                "report",
                str(folder),
                str(tmp_path / f"b{bad[2:]}.json"),
                "--output_dir",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(written) >= 4
    for path in written:
        text = path.read_text(encoding="utf-8")
        assert not {c for c in map(chr, STEERING) if c in text}, path
    assert r"\u202e" in (tmp_path / "out/report.html").read_text(encoding="utf-8")


def test_a_folder_with_a_percent_sign_is_doubled_for_slurm(tmp_path, monkeypatch, capsys):
    for folder in ("scripts", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / "e.toml").write_text('base_model = "x"\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nonexistent")
    words = [
        "submit",
        "pipeline",
        "--config",
        "e.toml",
        "--array",
        "2",
        "--parallel",
        "1",
        "--dry_run",
        "--run_dir",
    ]
    assert main([*words, "100%jobs %j"]) == 0
    out = capsys.readouterr().out
    logs = re.findall(r"--output=(.*?)/logs/(\S+)'", out)
    assert logs == [
        ("100%%jobs %%j", "%x-%j.out"),
        ("100%%jobs %%j", "%x-%A_%a.out"),
        *[("100%%jobs %%j", "%x-%j.out")] * 2,
    ]
    assert (
        "--array=0-1%1" in out
        and "RUN='100%jobs %j'" in out
        and "mkdir -p '100%jobs %j/logs'" in out
    )
    assert (
        main([*words, "back\\slash"]) == 64
        and "Slurm takes no backslash" in capsys.readouterr().err
    )
    for script in Path("scripts").glob("*.slurm"):  # what sbatch reads when nobody gives the option
        assert re.findall(r"^#SBATCH --output=(.*)$", script.read_text(), re.M) == [
            "results/%x-%j.out"
        ]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("SITE_SHARED='a", "not a line of a shell"),
        ("SITE_TIME_LIMITS='gpu'", "is not a value of SITE_TIME_LIMITS"),
        ("SITE_TIME_LIMITS='gpu=soon'", "is not a value of SITE_TIME_LIMITS"),
        ("SITE_MAX_JOBS=many", "is not a value of SITE_MAX_JOBS"),
        ("SITE_MAX_JOBS=²", "is not a value of SITE_MAX_JOBS"),
        (b"SITE_SHARED=\xff", "not a readable text file"),
    ],
)
def test_a_damaged_site_file_is_one_line(line, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "site.env"
    path.write_bytes(line if isinstance(line, bytes) else line.encode())
    assert main(["submit", "train", "--dry_run", "--site", str(path)]) == 65
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("train = 3\n", 64, "'train' is 3, not a table"),
        ("[train]\nlr = " + "9" * 5000, 65, "not a readable TOML file"),
        ("[train]\nlr = " + "9" * 400, 64, "--lr: out of range"),
        ("[train]\nseed = 99999999999999999999", 64, "--seed: out of range"),
        (
            "[train]\nlora_alpha = 1e308",
            64,
            "--lora_alpha 1e+308: out of range; give a value of at most 1e+30",
        ),
        ("[train]\nlora_r = 4611686018427387904", 64, "--lora_r 4611686018427387904: out of range"),
        ("[train]\ntext_field = " + "[" * 5000, 65, "not a readable TOML file"),
        (
            '[train]\ntrain_path = "a\\u0000b"',
            64,
            "contains a character that no path and no text may contain",
        ),
    ],
)
def test_hostile_toml_is_one_line(text, code, words, tmp_path, capsys):
    (tmp_path / "e.toml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "e.toml")]) == code
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.fixture(scope="module")
def trained(tiny_llama_dir, tmp_path_factory):
    """(flags of a run of two steps, its folder, whose checkpoint of step 1 is the newest). Copy
    it."""
    home = tmp_path_factory.mktemp("trained")
    write_lines(home / "texts.txt", ["chest pain", "rest and water"])
    fixed = "--val_path none --batch_size 1 --save_every_steps 1 --keep_checkpoints 9"
    more = ["--max_steps", 2, "--lora_r", 2]
    flags = train_flags(tiny_llama_dir, home / "texts.txt", home / "run", *fixed.split(), *more)
    assert main(flags) == 0
    checkpoint.discard_after(home / "run/checkpoints", 1)
    write_json(home / "run/run.json", read_json(home / "run/run.json") | {"status": "running"})
    return flags, home / "run"


def rewritten(run, change):
    """The newest checkpoint as another lorabatch would have written it: ``change`` its record, the
    sums are right."""
    found = checkpoint.newest(run / "checkpoints")
    state = {k: v for k, v in found.state.items() if k != "step"}
    change(state)
    checkpoint.write(run / "checkpoints", found.step, state, found.tensors, keep=9)


@pytest.mark.parametrize(
    ("kernels", "words"),
    [("vnni", "kernels vnni -> none"), (None, "kernels not recorded -> none"), ("none", "")],
)
def test_another_kernel_variant_may_change_the_last_bits(
    kernels, words, trained, tmp_path, capsys, monkeypatch
):
    flags, folder = trained
    monkeypatch.setattr("lorabatch.kernels.variant", lambda: None)
    run = shutil.copytree(folder, tmp_path / "run")
    rewritten(run, lambda state: state["identity"]["circumstances"].update(kernels=kernels))
    if kernels is None:
        rewritten(run, lambda state: state["identity"]["circumstances"].pop("kernels"))
    assert main([*flags, "--save_dir", str(run), "--resume", "auto"]) == 0
    error = capsys.readouterr().err
    assert words in error and ("the last bits of the result may differ" in error) == bool(words)
    assert read_json(run / "run.json")["kernel_variant"] is None


def test_a_checkpoint_of_a_newer_version_is_no_reason_to_take_an_older_one(
    trained, tmp_path, capsys
):
    flags, folder = trained
    run = shutil.copytree(folder, tmp_path / "run")
    rewritten(run, lambda state: state.update(schema_version=2))
    assert main([*flags, "--save_dir", str(run), "--resume", "auto"]) == 65
    assert "written by a newer lorabatch" in capsys.readouterr().err


def test_a_checkpoint_whose_record_has_another_type_gives_way(trained, tmp_path, capsys):
    flags, folder = trained
    run = shutil.copytree(folder, tmp_path / "run")
    rewritten(run, lambda state: state.update(events_bytes="many"))
    assert main([*flags, "--save_dir", str(run), "--resume", "auto"]) == 0
    out = capsys.readouterr()
    assert (
        "skipped a damaged checkpoint" in out.err
        and "'events_bytes' is 'many'" in out.err
        and "(step 0)" in out.out
    )


@pytest.mark.parametrize("kind", ["train", "infer", "eval"])
def test_overwrite_begins_with_nothing_of_an_earlier_run(kind, tmp_path):
    for name in (
        *RUN_FILES,
        *RUN_OUTPUTS[kind],
        "notes.txt",
        *(f"{folder}/x" for folder in RUN_FOLDERS[kind]),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("an earlier run's")
    write_json(tmp_path / "run.json", RUN | {"kind": kind})
    facts = {
        "kind": kind,
        "config": {},
        "command": [],
        "environment": {},
        "folder_flag": "--save_dir",
    }
    RunFolder.create(tmp_path, overwrite=True, **facts).finish("completed")
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", "notes.txt", ".lock"}
