"""Settings from flags and files: what is read, what is refused, and that it reads back."""

import inspect
import pkgutil
from dataclasses import fields, replace

import pytest

from lorabatch.cli import COMMANDS, main
from lorabatch.command_line import parse
from lorabatch.config import FetchConfig, InferConfig, ReportConfig, TrainConfig
from lorabatch.config_measure import BenchMachineConfig
from lorabatch.errors import UsageError
from lorabatch.settings import Settings


def test_the_specs_commands_parse_as_shown():
    train = (
        "--base_model distilgpt2 --train_path data_sample/train.txt --val_path "
        "data_sample/val.txt --save_dir results/lora-custom --epochs 2 --max_steps 100 --lr 2e-4 "
        "--lora_r 16 --lora_alpha 32"
    )
    config = parse(TrainConfig, train.split(), prog="train_lora.py")
    assert (config.epochs, config.max_steps, config.lr, config.lora_r, config.lora_alpha) == (
        2,
        100,
        2e-4,
        16,
        32.0,
    )
    infer = (
        "--base_model distilgpt2 --adapter_dir results/lora-distilgpt2 --prompts "
        "data_sample/prompts.txt --batch_size 16 --max_new_tokens 64 --iters 20"
    )
    config = parse(InferConfig, infer.split(), prog="infer_batch.py")
    assert (config.batch_size, config.max_new_tokens, config.iters) == (16, 64, 20)
    config = parse(TrainConfig, ["--no_cuda", "--batch-size", "4"], prog="x")
    assert config.no_cuda and config.batch_size == 4


# Settings


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_names_a_function_that_takes_its_settings(name):
    config_class, function = COMMANDS[name]
    assert config_class.command == name
    parameters = list(inspect.signature(pkgutil.resolve_name(function)).parameters.values())
    assert parameters[0].annotation == config_class.__name__
    assert parameters[1].annotation == "list[str]"
    assert all(p.default is not inspect.Parameter.empty for p in parameters[2:])


def test_every_settings_class_of_a_command_is_in_the_table():
    assert sorted(COMMANDS) == sorted(Settings.commands)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_table_in_a_settings_file(name, tmp_path):
    path = tmp_path / "experiment.toml"
    path.write_text(
        "".join(f"[{other.replace(' ', '.')}]\n" for other in COMMANDS), encoding="utf-8"
    )
    config_class, _ = COMMANDS[name]
    positionals = [f for f in fields(config_class) if f.metadata["positional"]]
    words = [(f.metadata["choices"] or ("x",))[0] for f in positionals]
    from_file = parse(config_class, [*words, "--config", str(path)], prog="x")
    plain = parse(config_class, words, prog="x")
    assert from_file == (replace(plain, config=str(path)) if name == "submit" else plain)
    path.write_text("[trian]\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"unknown table \[trian\]"):
        parse(config_class, [*words, "--config", str(path)], prog="x")


def test_a_positional_argument_is_no_flag_and_no_key_of_a_file(tmp_path, capsys):
    path = tmp_path / "a.toml"
    path.write_text('[fetch]\nname = "x"\n', encoding="utf-8")
    with pytest.raises(UsageError, match="unknown key 'name'"):
        parse(FetchConfig, ["gpt2", "--config", str(path)], prog="x")
    with pytest.raises(UsageError, match="unknown flag --name"):
        parse(FetchConfig, ["gpt2", "--name", "x"], prog="x")
    with pytest.raises(UsageError, match="required: name"):
        parse(FetchConfig, [], prog="x")
    assert parse(FetchConfig, ["gpt2"], prog="x").name == "gpt2"
    assert parse(ReportConfig, ["a", "b"], prog="x").runs == ("a", "b")
    with pytest.raises(SystemExit):
        parse(FetchConfig, ["gpt2", "--print_config"], prog="x")
    assert "name" not in capsys.readouterr().out


@pytest.mark.parametrize("config_class", [TrainConfig, InferConfig])
def test_printed_settings_read_back_to_the_same_object(config_class, tmp_path, capsys):
    command = "train" if config_class is TrainConfig else "infer"
    odd = ["--seed", "7", "--no-cuda"] + (
        ["--val_path", "none", "--target_modules", "q_proj", "v_proj"]
        if command == "train"
        else ["--stop", "a b", '"']
    )
    config = parse(config_class, odd, prog="x")
    (tmp_path / "a.toml").write_text(config.to_toml(), encoding="utf-8")
    again = parse(config_class, ["--config", str(tmp_path / "a.toml")], prog="x")
    assert again == config
    over = parse(config_class, ["--config", str(tmp_path / "a.toml"), "--seed", "8"], prog="x")
    assert over.seed == 8
    with pytest.raises(SystemExit):
        parse(config_class, [*odd, "--print_config"], prog="x")
    assert capsys.readouterr().out == config.to_toml()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lora_rank", "4"], "did you mean"),
        (["--lora_r", "0"], "--lora_r 0: out of range"),
        (["--lora_alpha", "-1"], "--lora_alpha"),
        (["--lr", "nan"], "finite"),
        (["--lr", "fast"], "not a number"),
        (["--batch_size", "2.5"], "not a whole number"),
        (["--scheduler", "cosin"], "did you mean 'cosine'"),
        (["stray"], "unexpected argument 'stray'"),
        (["--config", "/nonexistent.toml"], "no such file"),
    ],
)
def test_wrong_settings_are_one_line_and_64(flags, words, capsys):
    assert main(["train", *flags]) == 64
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error


def test_unknown_keys_and_tables_of_a_file(tmp_path):
    path = tmp_path / "a.toml"
    for text, words in (
        ("[train]\nbatchsize = 4\n", "did you mean 'batch_size'"),
        ("[trian]\n", "did you mean 'train'"),
        ("[train]\nlr = 'a'\n", "'lr' must be"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=words):
            parse(TrainConfig, ["--config", str(path)], prog="x")
    path.write_text("[train]\nlr = 1e-3\n[infer]\nbatch_size = 3\n")
    assert parse(TrainConfig, ["--config", str(path)], prog="x").lr == 1e-3
    assert parse(InferConfig, ["--config", str(path)], prog="x").batch_size == 3


@pytest.mark.parametrize(
    ("config_class", "text", "words"),
    [
        (BenchMachineConfig, "lr = 0.1\n", "unknown key 'lr' outside of tables; it is a setting of [train] and [profile.train]"),
        (InferConfig, "[infer]\nlora_r = 3\n", "unknown key 'lora_r' in [infer]; it is a setting of [train] "),
        (BenchMachineConfig, "[bench.machine]\nsecnds = 3\n", "unknown key 'secnds' in [bench.machine]; did you mean 'seconds'?"),
        (BenchMachineConfig, "[bench]\nsecnds = 3\n", "unknown key 'secnds' in [bench]; did you mean 'seconds'?"),
        (TrainConfig, "[train]\nlora-rank = 3\n", "unknown key 'lora-rank' in [train]; did you mean"),
        (TrainConfig, "[train]\nlora-r = 3\nlora_r = 4\n", "'lora_r' is set twice in [train]; leave one out"),
    ],
)  # fmt: skip
def test_a_wrong_key_of_a_file_is_named_with_its_table(config_class, text, words, tmp_path):
    path = tmp_path / "a.toml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        parse(config_class, ["--config", str(path)], prog="x")
    assert f"a.toml: {words}" in str(error.value)


def test_hyphens_and_underscores_are_the_same_in_files_too(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("batch-size = 3\n[train]\nlora-r = 4\n")
    config = parse(TrainConfig, ["--config", str(path)], prog="x")
    assert (config.batch_size, config.lora_r) == (3, 4)


@pytest.mark.parametrize(
    ("name", "instead"), [("adapter_mode", "--adapter_dir merges one"), ("processes", "--shards N")]
)
def test_a_setting_that_is_gone_is_refused_with_what_serves_in_its_place(
    name, instead, tmp_path, capsys
):
    (tmp_path / "old.toml").write_text(f'[infer]\n{name} = "1"\n')
    for flags in ([f"--{name}", "1"], ["--config", str(tmp_path / "old.toml")]):
        assert main(["infer", *flags]) == 64
        assert instead in capsys.readouterr().err
