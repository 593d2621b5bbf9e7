"""Expansion of a search, and a leaderboard computed by hand."""

import math

import pytest

from lorabatch.cli import main
from lorabatch.cluster.sweep import as_markdown, expand, leaderboard, read_sweep
from lorabatch.errors import LorabatchError


def sweep_file(tmp_path, text):
    path = tmp_path / "sweep.toml"
    path.write_text(text)
    return path


def trials(tmp_path, text):
    return list(expand(read_sweep(sweep_file(tmp_path, text))))


def test_grid_is_the_product_in_the_order_of_the_file(tmp_path):
    found = trials(tmp_path, "[search]\nlr = [0.1, 0.2]\nlora_r = [4, 8]\n")
    assert found == [{"lr": 0.1, "lora_r": 4}, {"lr": 0.1, "lora_r": 8}, {"lr": 0.2, "lora_r": 4}, {"lr": 0.2, "lora_r": 8}]


def test_random_draws_within_bounds_the_same_each_time_and_repeats_over_seeds(tmp_path):
    text = (
        'method = "random"\nsamples = 50\n[search]\nlr = {min = 1e-5, max = 1e-2, log = true}\nlora_r = {min = 2, max = 9}\nseed = [1, 2]\n'
    )
    found = trials(tmp_path, text)
    assert found == trials(tmp_path, text) != trials(tmp_path, text.replace("samples", "seed = 7\nsamples"))
    assert len(found) == 100 and all(a | {"seed": 2} == b for a, b in zip(found[::2], found[1::2], strict=True))
    assert all(1e-5 <= t["lr"] <= 1e-2 and 2 <= t["lora_r"] <= 9 and isinstance(t["lora_r"], int) for t in found)
    assert 10 < sum(t["lr"] < math.sqrt(1e-5 * 1e-2) for t in found[::2]) < 40, "half of the draws lie below the geometric middle"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[search]\nlr = 0.1\n", "lr"),
        ("methd = 'grid'\n[search]\nlr = [1]\n", "method"),
        ("method = 'best'\n[search]\nlr = [1]\n", "random"),
        ("[train]\nlr = 1.0\n", "search"),
        ("[search]\nlrr = [0.1]\n", "lr"),
        ("[search]\nlr = [-0.1]\n", "--lr"),
        ("[search]\nlr = ['high']\n", "lr"),
        ("method = 'random'\n[search]\nlr = {min = 1}\n", "{min = A, max = B}"),
        ("[search\n", "TOML"),
    ],
)
def test_a_wrong_file_is_one_line_before_anything_runs(tmp_path, capsys, text, word):
    code = main(["sweep", str(sweep_file(tmp_path, text)), "--output_dir", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert code in (64, 65) and said.count("\n") == 1 and word in said
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_sweep_is_refused(tmp_path):
    from lorabatch.cluster.sweep import _keep_plan

    _keep_plan(tmp_path, {"trials": [1]})
    _keep_plan(tmp_path, {"trials": [1]})
    with pytest.raises(LorabatchError, match="another sweep"):
        _keep_plan(tmp_path, {"trials": [2]})


def done(value, error=None):
    return {"value": value, "error": error}


def test_leaderboard_averages_over_seeds_with_student_s_interval():
    points = [{"lr": lr, "seed": s} for lr in (0.1, 0.2, 0.3, 0.4) for s in (1, 2, 3)]
    values = [3.0, 3.2, 3.4, 1.0, 1.1, 1.2, 1.05, 1.3, 1.25, None, None, None]
    board = leaderboard(points, [done(v, None if v else "exit code 70: loss") for v in values], "eval_loss")
    assert [row["point"]["lr"] for row in board["rows"]] == [0.2, 0.3, 0.1, 0.4]
    best = board["rows"][0]
    assert best["mean"] == pytest.approx(1.1) and best["trials"] == [3, 4, 5]
    assert best["half_width"] == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    text = as_markdown(board).splitlines()
    assert "| 1 | 0.2 | 1.1000 | 0.2484 | 3 |  |" in text
    assert "not told apart" in text[3] and "not told apart" not in text[4] and "exit code 70" in text[5]


def test_one_seed_has_no_interval():
    board = leaderboard([{"lr": 1}, {"lr": 2}], [done(2.0), done(1.0)], "eval_loss")
    assert [row["half_width"] for row in board["rows"]] == [None, None]
    assert "needs two seeds" in as_markdown(board) and "not measured" in as_markdown(board)
