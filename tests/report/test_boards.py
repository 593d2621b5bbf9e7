"""A sweep in a report: its leaderboard, and the runs of its first row."""

import json

import pytest
from support.run_folders import train_run

from lorabatch.cli import main
from lorabatch.cluster.leaderboard import leaderboard
from lorabatch.records import write_json
from lorabatch.report.boards import MAX_ROWS, board_sections, load_boards
from lorabatch.report.words import Words


def sweep(folder, values, errors=()):
    """A sweep over learning rates, two seeds each: {rate: values by seed}."""
    trials, done = [], []
    for rate, of_seeds in values.items():
        for seed, value in enumerate(of_seeds):
            run = f"tasks/0000/output-000/{len(trials):04d}"
            train_run(folder / run)
            trials.append({"lr": rate, "seed": seed})
            done.append({"value": value, "error": None, "run": run})
    for error in errors:
        trials.append({"lr": 9.0, "seed": 0})
        done.append({"value": None, "error": error, "run": "nowhere"})
    write_json(folder / "leaderboard.json", leaderboard(trials, done, "eval_loss"))
    return folder


@pytest.mark.parametrize("name", ["", "leaderboard.json"])
def test_a_sweep_is_its_leaderboard_and_the_runs_of_the_first_row(tmp_path, name, capsys):
    folder = sweep(tmp_path / "search", {0.1: (2.0, 2.2), 0.2: (1.0, 1.1), 0.3: (1.0, 1.3)})
    assert main(["report", str(folder / name), "--output_dir", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "RELATORIO.md").read_text(encoding="utf-8")
    board = text[text.index("## Varreduras de configurações") :]
    assert "os primeiros 3 de 3 pontos por Perda de validação" in board
    assert "| 1 | `0.2` | 1,0500 | 0,6353 | – | 2 |  |" in board
    assert "| 2 | `0.3` | 1,1500 |" in board and "não se distingue do primeiro" in board
    assert "| 3 | `0.1` | 2,1000 |" in board
    assert "- 0002: LoRA" in text and "- 0003: LoRA" in text and "- 0000:" not in text


def test_points_that_failed_say_why_and_only_the_first_points_are_shown(tmp_path):
    many = {0.001 * n: (float(n), n + 0.5) for n in range(1, MAX_ROWS + 4)}
    boards, runs = load_boards([sweep(tmp_path / "search", {0.5: (0.0, 0.0)} | many)])
    assert len(runs) == 2
    note, table = board_sections(Words("en"), boards)[0].blocks
    assert f"the first {MAX_ROWS} of {MAX_ROWS + 4} points" in note.text
    assert len(table.rows) == MAX_ROWS
    boards, _ = load_boards([sweep(tmp_path / "two", {0.1: (2.0,)}, errors=["| boom"])])
    _, table = board_sections(Words("en"), boards)[0].blocks
    assert table.rows[0][2:4] == ["2.0000", "not measured"], "one seed has no interval"
    assert table.rows[1][2] == "failed" and table.rows[1][-1] == "| boom"


def test_a_sweep_that_has_not_ended_and_a_board_that_is_none_are_65(tmp_path, capsys):
    folder = tmp_path / "search"
    folder.mkdir()
    (folder / "sweep.json").write_text("{}")
    assert main(["report", str(folder)]) == 65
    assert "a sweep that has not ended (no leaderboard.json in it)" in capsys.readouterr().err
    (folder / "leaderboard.json").write_text(json.dumps({"metric": "eval_loss", "rows": [{}]}))
    assert main(["report", str(folder)]) == 65
    assert "'rows[0].point' is missing" in capsys.readouterr().err
