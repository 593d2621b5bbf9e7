"""The parts of the report that hold figures against limits: advice, roofline, sweeps; and the page
in a real browser."""

import json
import shutil
import subprocess

import pytest
from support.run_folders import INFER_METRICS, TRAIN_METRICS, completion, infer_run, train_run

from lorabatch.bench.scaling import bench_record, estimate
from lorabatch.cli import main
from lorabatch.errors import DataError
from lorabatch.report.advice import advice
from lorabatch.report.load import load_benches, load_runs
from lorabatch.report.roofline import position, roofline_plots
from lorabatch.report.sections import document
from lorabatch.report.tables import training
from lorabatch.report.threats import threats
from lorabatch.report.words import Words

GIB = 2**30
CHROMIUM = next(
    filter(
        None,
        map(
            shutil.which,
            ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome"),
        ),
    ),
    None,
)


def write_bench(path, sweep="batch_size", rates=(100.0, 180.0, 220.0)):
    points = [
        {
            sweep: 2**i,
            "tokens_per_s": estimate([r + j for j in range(6)]),
            "batch_latency_ms": estimate([50.0 * (i + 1)]),
        }
        | (
            {"weak_tokens_per_s": estimate([102.5 * 1.9**i + j for j in range(6)])}
            if sweep == "threads"
            else {}
        )
        for i, r in enumerate(rates)
    ]
    path.write_text(
        json.dumps(
            bench_record(
                "bench infer", sweep, points, command=["lorabatch", "bench", "infer"], threads=2
            )
        )
    )
    return path


def said(tmp_path, kind, changes, environment=None):
    """The advice for one run with these metrics."""
    make = (
        train_run
        if kind == "train"
        else lambda path, **k: infer_run(path, [completion(0, "a", "x")], **k)
    )
    metrics = (
        (TRAIN_METRICS if kind == "train" else INFER_METRICS)
        | {"cpu_percent": 190.0, "startup_s": 0.1, "duration_s": 10.0}
        | changes
    )
    return advice(
        Words("en"),
        load_runs([make(tmp_path / "run", metrics=metrics, environment=environment)]),
        [],
    )


@pytest.mark.parametrize(
    ("kind", "changes", "environment", "words"),
    [
        ("train", {"max_rss_bytes": 1.5 * GIB}, {"slurm": {"mem_per_node": str(25 * 1024)}}, "used 6.0% of the memory requested (1.50 GiB of 25.0 GiB): ask for --mem=3G"),
        ("train", {"max_rss_bytes": 1.5 * GIB}, {"slurm": {"mem_per_cpu": "4096", "cpus_per_task": "4"}}, "used 9.4% of the memory requested"),
        ("train", {"max_rss_bytes": 3.9 * GIB, "cgroup_memory_bytes": 4 * GIB}, None, "ask for --mem=6G, or it may be killed"),
        ("train", {"cpu_percent": 110.0}, {"usable_cores": 8}, "kept 1.10 of 8 cores busy: ask for --cpus-per-task=2"),
        ("train", {"throttled_share": 0.3}, None, "held back by its CPU quota for 30.0% of the time"),
        ("train", {"gpu_util_percent": 59.0}, None, "the GPU was idle 41.0% of the time: larger --block_tokens"),
        ("infer", {"gpu_util_percent": 59.0}, None, "more requests at once (--batch_size)"),
        ("infer", {"gpu_throttle_share": {"power cap": 0.5}}, None, "the GPU's clock was held down (power cap) in 50.0%"),
        ("train", {"cold_share": 1.2}, None, "run lorabatch bench machine again"),
        ("train", {"cold_share": 0.2, "better_variants": {"kernels": "turned off"}}, None, ("reached 20.0% of what this machine can do with cold weights: torch's own operators "
            "served instead of our kernels (turned off).")),
        ("train", {"cold_share": 0.2, "kernel_variant": "vnni", "better_variants": {"amx": "x"}, "total_tokens": 300}, None, "its steps have 100 tokens"),
        ("infer", {"cold_share": 0.49, "cpu_wait_percent": 95.0}, None, "it waited for cores that others used (50.0% of the time computed)"),
        ("infer", {"cold_share": 0.49}, None, "the records show no cause; lorabatch profile infer says"),
        ("train", {"train_s": 60.0, "phases": {"loop_s": 100.0}}, None, "spent 40.0% of its loop on evaluation and saving"),
        ("infer", {"startup_s": 5.0, "duration_s": 5.0}, None, "spent 50.0% of its time on start-up"),
        ("infer", {"mean_running": 4.0, "max_running": 16}, None, "had 4.00 of 16 requests running on average"),
    ],
)  # fmt: skip
def test_advice_follows_from_the_figures(tmp_path, kind, changes, environment, words):
    (line,) = said(tmp_path, kind, changes, environment)
    assert line.startswith("run") and words in line


@pytest.mark.parametrize("kind", ["train", "infer"])
def test_a_run_that_used_what_it_asked_for_gets_no_advice(tmp_path, kind):
    assert (
        said(
            tmp_path,
            kind,
            {"max_rss_bytes": 3 * GIB, "cgroup_memory_bytes": 4 * GIB, "gpu_util_percent": 95},
        )
        == []
    )


def efficiency(runs):
    """Rows of the efficiency table, and the texts below it."""
    section = next(
        s
        for s in document(Words("en"), runs, grid_g_per_kwh=100.0).sections
        if s.key == "efficiency"
    )
    table = [block for block in section.blocks if type(block).__name__ == "Table"][-1]
    return {row[0]: row[1:] for row in table.rows}, [
        block.text for block in section.blocks if type(block).__name__ == "Paragraph"
    ]


def test_energy_and_gpu_figures_with_the_reasons_of_those_that_are_missing(tmp_path):
    """1.8 MJ of the GPU and 1.8 MJ of the processors are 1 kWh."""
    measured = {
        "gpu_util_percent": 90.0,
        "energy_j": 1.8e6,
        "cpu_energy_j": 1.8e6,
        "missing": {"gpu_dram_active_percent": "NVML: Not Supported"},
    }
    paths = [
        train_run(tmp_path / "lora", metrics=TRAIN_METRICS | measured),
        infer_run(tmp_path / "out", [completion(0, "a", "x")]),
    ]
    rows, texts = efficiency(load_runs(paths))
    assert rows["CO2e of the energy measured"] == ["100 g", "not measured"]
    assert rows["GPU memory rate, of its peak, mean"] == ["not measured"] * 2 and rows[
        "GPU busy in time, mean"
    ] == [
        "90.0%",
        "not measured",
    ]
    assert texts[-1] == "Not measured in lora, and why: NVML: Not Supported."
    assert (
        Words("pt").reason("no processor in /sys/class/powercap")
        == "nenhum processador em /sys/class/powercap"
    )
    rows, _ = efficiency(load_runs(paths[1:]))
    assert (
        rows["GPU: activity, memory, power, energy, PCIe"] == ["not measured"]
        and "GPU busy in time, mean" not in rows
    )


@pytest.mark.parametrize(("share", "remark"), [(0.5, False), (1.64, True)])
def test_a_share_above_its_ceiling_has_a_remark_beside_it(tmp_path, share, remark):
    metrics = INFER_METRICS | {"mbu": share, "measured_bytes_per_s": 2e10}
    runs = load_runs([infer_run(tmp_path / "out", [completion(0, "a", "x")], metrics=metrics)])
    rows, _ = efficiency(runs)
    (cell,) = rows["Memory reads in decode: achieved of measured peak"]
    assert ("this ceiling is too low" in cell) == remark


def test_a_run_that_waited_for_cores_is_a_threat_and_gets_no_advice_on_cores(tmp_path):
    waiting = {"cpu_percent": 40.0, "cpu_wait_percent": 20.0}
    assert said(tmp_path, "train", waiting, {"usable_cores": 8}) == []
    found = threats(Words("en"), load_runs([tmp_path / "run"]), [])
    assert any("waited for a core 50.0% as long as it computed" in line for line in found)


def test_an_epoch_that_was_not_completed_is_estimated_and_said_to_be(tmp_path):
    """24 documents in steps of 8 are three steps of 10 s."""
    (run,) = load_runs(
        [train_run(tmp_path / "lora", metrics=TRAIN_METRICS | {"train_s": 20.0, "steps": 2})]
    )
    row = next(
        row for row in training(Words("en"), [run]).rows if row[0] == "Time per epoch, in steps"
    )
    assert row[1] == "about 30.0 s at this rate (none completed)"
    (run,) = load_runs([train_run(tmp_path / "whole", metrics=TRAIN_METRICS | {"epoch_s": 31.0})])
    assert ["Time per epoch, in steps", "31.0 s"] in training(Words("en"), [run]).rows


def test_places_on_the_roofline(tmp_path):
    """Training: 2 * 2048 / 4 flop a byte; decoding: its flops over the bytes it had to read.
    Another machine is not drawn with them."""
    decode = INFER_METRICS | {
        "mbu": 0.5,
        "measured_bytes_per_s": 2e10,
        "decode_flops_per_s": 4e10,
        "cold_flops_per_s": 5e11,
    }
    paths = [
        train_run(tmp_path / "lora"),
        infer_run(tmp_path / "out", [completion(0, "a", "x")], metrics=decode),
    ]
    trained, inferred = load_runs(paths)
    assert position(trained) == (2 * 2048 / 4, 3e11) and position(inferred) == (4.0, 4e10)
    (drawn,) = roofline_plots(Words("en"), [trained, inferred])
    assert "lora" in drawn.svg and "out" in drawn.svg and "20.0 GB/s" in drawn.svg
    assert roofline_plots(Words("en"), [trained]) == [], "no memory rate was measured"
    elsewhere = infer_run(
        tmp_path / "far", [completion(0, "a", "x")], metrics=decode, environment={"host": "node-2"}
    )
    assert roofline_plots(Words("en"), load_runs([*paths, elsewhere])) == []


def test_sweeps_are_tables_and_plots_with_their_conclusion(tmp_path):
    benches = load_benches(
        [
            write_bench(tmp_path / "batch.json"),
            write_bench(tmp_path / "cores.json", "threads", (100.0, 160.0)),
        ]
    )
    sections = {s.key: s for s in document(Words("en"), [], benches).sections}
    batch, threads, weak = (
        block for block in sections["sweeps"].blocks if type(block).__name__ == "Table"
    )
    assert batch.rows[1] == ["2", "182 tokens/s", "180 … 185", "1.78", "100 ms"], (
        "six values: the interval is their range"
    )
    assert threads.rows[1][4].endswith("%") and threads.rows[0][4] == "–"
    assert "growing" in weak.head[1] and weak.rows[1] == ["2", "197 tokens/s", "195 … 200", "1.88"]
    laws = [
        block.text
        for block in sections["sweeps"].blocks
        if type(block).__name__ == "Paragraph" and "Gustafson" in block.text
    ]
    assert len(laws) == 1 and "12.1% is serial by Gustafson" in laws[0], "2 - 197.25 / 105"
    one, two = (block for block in sections["sweeps"].blocks if type(block).__name__ == "Plot")
    assert (
        (one.name, two.name) == ("sweep1", "sweep2") and "knee" in one.svg and "knee" not in two.svg
    )
    first, second = sections["advice"].blocks[0].items
    assert "beyond 2 requests at once" in first and "Amdahl" in second


def test_a_file_that_is_no_bench_is_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"points": []}')
    with pytest.raises(DataError, match="lorabatch bench"):
        load_benches([tmp_path / "x.json"])


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(tmp_path, width):
    """No message on the console, and nothing wider than the screen: an outer page with a script
    measures the inner one."""
    runs = [
        train_run(tmp_path / "lora"),
        infer_run(tmp_path / ("long-name-" * 6), [completion(0, "word " * 99, "x" * 300)]),
    ]
    assert (
        main(
            [
                "report",
                *map(str, runs),
                str(write_bench(tmp_path / "batch.json")),
                "--output_dir",
                str(tmp_path),
            ]
        )
        == 0
    )
    measure = (
        "const d = f.contentDocument.documentElement; document.title = `${d.scrollWidth} of "
        "${d.clientWidth}`"
    )
    frame = (
        '<iframe id="f" src="report.html" '
        f'style="width:{width}px;height:800px;border:0"></iframe><script>f.onload = () => '
        f"{{{measure}}}</script>"
    )
    (tmp_path / "outer.html").write_text(frame)
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--virtual-time-budget=5000",
        "--enable-logging=stderr",
    ]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [CHROMIUM, *flags, profile, "--dump-dom", f"file://{tmp_path}/outer.html"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    shown, screen = map(
        int, done.stdout.partition("<title>")[2].partition("</title>")[0].split(" of ")
    )
    assert 0 < shown <= screen <= width
    assert "CONSOLE" not in done.stderr
