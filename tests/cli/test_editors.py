"""Completion in a real bash, and the JSON schema beside what the program itself accepts."""

import json
import subprocess

import jsonschema
import pytest
from support.paths import ROOT

from lorabatch.cli import COMMANDS, main
from lorabatch.editors import toml_schema
from lorabatch.errors import LorabatchError
from lorabatch.settings import REQUIRED, flags, read_table, read_toml

SCHEMA = toml_schema()


def completed(script, *words):
    """What bash offers for the last of the words."""
    line = " ".join(f"'{word}'" for word in ("lorabatch", *words))
    code = f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words)}; _shtab_lorabatch"
    done = subprocess.run(
        ["bash", "-c", f"{code}; echo ${{COMPREPLY[@]}}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT / "configs" / "examples",
    )
    return set(done.stdout.split())


def test_bash_completes_commands_flags_choices_and_files(tmp_path, capsys):
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion.sh"
    script.write_text(capsys.readouterr().out)
    assert completed(script, "be") == {"bench"}
    assert completed(script, "bench", "m") == {"machine"}
    assert completed(script, "train", "--max_s") == {"--max_steps"}
    assert completed(script, "train", "--dtype", "b") == {"bf16"}
    assert completed(script, "train", "--config", "sw") == {"sweep.toml"}


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells(shell, capsys):
    assert main(["completion", shell]) == 0
    assert "max_steps" in capsys.readouterr().out


def test_an_unknown_shell_is_one_line(capsys):
    assert main(["completion", "fish"]) == 64
    assert capsys.readouterr().err.count("\n") == 1


def test_the_schema_is_one_and_is_printed(capsys):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == SCHEMA


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_s_defaults_are_valid(name):
    config_class, _ = COMMANDS[name]
    values = {
        f.name: list(f.default) if isinstance(f.default, tuple) else f.default
        for f in flags(config_class)
        if f.default not in (None, REQUIRED)
    }
    table = values
    for word in reversed(name.split()):
        table = {word: table}
    jsonschema.validate(table, SCHEMA)


def test_the_example_is_valid():
    jsonschema.validate(read_table(ROOT / "configs/examples/experiment.toml"), SCHEMA)


@pytest.mark.parametrize(
    "text",
    ["[trian]\nlr = 1.0", "[train]\nlrr = 1.0", "[train]\nlr = -1.0", "[train]\nmax_steps = 1.5",
     '[train]\ndtype = "fp8"', "[bench.machine]\nx = 1"],
)  # fmt: skip
def test_what_the_program_refuses_the_schema_refuses(text, tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(read_table(path), SCHEMA)
    name = "bench machine" if "bench" in text else "train"
    with pytest.raises(LorabatchError):
        COMMANDS[name][0](**read_toml(COMMANDS[name][0], path))
