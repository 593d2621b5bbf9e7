"""The settings of the commands that say whether data and results can be trusted. The rest of
``lorabatch.config``, by the same rules."""

from __future__ import annotations

from dataclasses import dataclass

from lorabatch.config import A_MODEL, DTYPES, THREADS, InferConfig, TrainConfig
from lorabatch.settings import REQUIRED, Settings, like, setting


@dataclass(frozen=True)
class CheckConfig(Settings, command="check"):
    """Look for leaks, repeats, personal data and damaged text before training; exit 65 if one of
    them would spoil it."""

    SHARES = TrainConfig

    files: tuple[str, ...] = setting(
        (), "training file, and the validation file, in place of the flags", positional=True
    )
    train_path: tuple[str, ...] = like(TrainConfig, "train_path")
    val_path: str | None = like(TrainConfig, "val_path")
    against: tuple[str, ...] = setting(
        (), "files of test items that must not stand in the training file"
    )
    base_model: str | None = setting(
        None, "model whose tokenizer says what is cut: " + A_MODEL + " (default: not looked at)"
    )
    max_len: int = like(TrainConfig, "max_len")
    show: int | None = setting(
        None,
        "instead: print the first N training documents as the model will see them, supervised "
        "text in brackets",
        minimum=1,
    )
    txt_format: str = like(TrainConfig, "txt_format")
    text_field: str = like(TrainConfig, "text_field")
    group_field: str | None = like(TrainConfig, "group_field")
    domain_field: str | None = setting(
        None, "field with the domain of a row: whether both files have the same mix"
    )
    near_words: float = setting(
        0.5, "share of a text's words that makes it a leak", above=0, maximum=1
    )
    near_jaccard: float = setting(
        0.8,
        "Jaccard index of runs of five words that makes two texts near-equal",
        above=0,
        maximum=1,
    )
    warn_at: tuple[str, ...] = setting(
        (), "NAME=SHARE: warn of this check from another share on (0: any, none: never)"
    )
    fail_at: tuple[str, ...] = setting(
        (), "NAME=SHARE: fail by this check from another share on (0: any, none: never)"
    )
    output_dir: str = setting("results/check", "folder for check.json and findings.jsonl")
    json: bool = setting(False, "print JSON")


@dataclass(frozen=True)
class SplitConfig(Settings, command="split"):
    """Split a file into training and validation so that no group and no near-equal texts are on
    both sides."""

    file: str = setting(
        REQUIRED, "documents: .txt, .jsonl, .csv or .parquet; it is not changed", positional=True
    )
    output_dir: str = setting(
        "results/split", "folder for train and val, neither of which is there"
    )
    val_fraction: float = setting(0.05, "share of the documents for validation", above=0, below=1)
    group_field: str | None = like(TrainConfig, "group_field")
    near_jaccard: float = like(CheckConfig, "near_jaccard")
    txt_format: str = like(TrainConfig, "txt_format")
    text_field: str = like(TrainConfig, "text_field")
    seed: int = setting(TrainConfig.seed, "seed of the choice", minimum=0)


@dataclass(frozen=True)
class EvalConfig(Settings, command="eval"):
    """Say whether adapters are better than their base: documents, multiple choice or completions,
    with intervals."""

    files: tuple[str, ...] = setting(
        REQUIRED,
        "documents (as --val_path of train), or .jsonl rows of question, options and answer, or "
        "of prompt and target",
        positional=True,
    )
    base_model: str = setting(TrainConfig.base_model, A_MODEL)
    adapter_dir: str | None = setting(None, "LoRA adapter in PEFT's format, called as its folder")
    adapters: tuple[str, ...] = setting((), "several adapters: NAME=DIR each")
    output_dir: str | None = setting(None, "run folder (default: a new one in results/)")
    resume: bool = setting(False, "continue the run in --output_dir: scored items are skipped")
    overwrite: bool = setting(False, "replace an earlier run in --output_dir")

    general: str | None = setting(
        None, "documents of another kind, one more file: says whether the adapters forget"
    )
    group_field: str | None = setting(
        None,
        "field of .jsonl rows whose equal values mark items that are not independent: a patient, a "
        "page",
    )
    domain_field: str | None = setting(
        None, "field of .jsonl rows that the figures are also listed by: a source, a speciality"
    )
    answer_with: str = setting(
        "option",
        "multiple choice: the model scores each option's text, or reads all and scores the letter",
        choices=("option", "letter"),
    )
    max_new_tokens: int = setting(
        InferConfig.max_new_tokens, "rows with a target: most tokens to generate", minimum=1
    )
    max_items: int | None = setting(None, "use only the first N items of each file", minimum=1)
    max_len: int = setting(
        TrainConfig.max_len,
        "longest document in tokens; longer text is split, longer answers are cut",
        minimum=2,
    )
    block_tokens: int = setting(
        TrainConfig.block_tokens,
        "tokens of the packed block that goes through the model at once",
        minimum=2,
    )
    txt_format: str = setting(
        TrainConfig.txt_format,
        ".txt: one document a line, or separated by blank lines",
        choices=("auto", "line", "blank"),
    )
    text_field: str = setting(
        TrainConfig.text_field, "field of .jsonl, .csv and .parquet rows that holds plain text"
    )
    seed: int = setting(0, "seed of the resampling behind intervals and p values", minimum=0)

    dtype: str = setting("auto", "type of the base's weights; adapters stay fp32", choices=DTYPES)
    no_cuda: bool = setting(False, "stay on the CPU")
    backend: str = setting(
        "auto",
        "native decoder, or transformers for any other model",
        choices=("auto", "native", "hf"),
    )
    threads: int | None = setting(None, THREADS, minimum=1, maximum=1024)
