"""What a run records of the code that made it."""

import shutil
import subprocess

from support.paths import ROOT
from support.processes import python_alone

DIRTY = (
    "from lorabatch.machine.environment import environment; print(environment()['git']['dirty'])"
)


def test_a_report_in_the_checkout_does_not_change_the_code(tmp_path):
    shutil.copytree(
        ROOT / "src" / "lorabatch",
        tmp_path / "src" / "lorabatch",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    (tmp_path / ".gitignore").write_text("__pycache__\n", encoding="utf-8")
    shutil.copytree(ROOT / "report", tmp_path / "report")

    def git(*words):
        who = ("-c", "user.name=test", "-c", "user.email=test@localhost")
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    def dirty():
        ended = python_alone(DIRTY, PYTHONPATH=str(tmp_path / "src"))
        assert ended.returncode == 0, ended.stderr
        return ended.stdout.strip()

    git("init", "--quiet")
    git("add", "--all")
    git("commit", "--quiet", "--message", "all")
    (tmp_path / "report" / "RELATORIO.md").write_text("mine", encoding="utf-8")
    assert dirty() == "False"
    with (tmp_path / "src" / "lorabatch" / "errors.py").open("a") as file:
        file.write("# changed\n")
    assert dirty() == "True"
