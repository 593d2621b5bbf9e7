"""The model card beside an adapter: what hubs read, and what becomes of it."""

import hashlib

import pytest
from huggingface_hub import ModelCard
from support.commands import FIXED, train_flags, write_rows

from lorabatch.cli import main

NAME = "a|b <i>"


@pytest.fixture
def trained(tiny_llama_dir, corpus, tmp_path):
    steps = ["--max_steps", 2, "--batch_size", 4]
    assert main(train_flags(tiny_llama_dir, corpus, tmp_path / NAME, *steps)) == 0
    return tmp_path / NAME


def evaluated(model, adapter, folder, *more):
    rows = [{"text": f"The patient in bed {i} slept well."} for i in range(20, 24)]
    file = write_rows(folder / "ward.jsonl", rows)
    other = write_rows(folder / "other.jsonl", rows[:3])
    words = ["eval", file, other, "--base_model", model, "--output_dir", folder / "out", *FIXED]
    assert main([str(w) for w in (*words, "--adapters", f"x={adapter}", *more)]) == 0


def test_training_writes_what_a_hub_reads_and_eval_rewrites_its_section(
    trained, tiny_llama_dir, corpus, tmp_path
):
    card = ModelCard.load(trained / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-generation")
    assert card.data.base_model is None  # a folder here is no name that others find
    text = card.text
    assert (
        f"train.txt, 12 documents, SHA-256 `{hashlib.sha256(corpus.read_bytes()).hexdigest()}`"
        in text
    )
    assert "rank 16, alpha 32" in text and "bits per byte" in text and "energy" in text
    assert "# a\\|b \\<i\\>" in text and "Not evaluated on a file of its own yet" in text
    path = trained / "README.md"
    path.write_text(path.read_text() + "\nWritten by hand.\n")
    evaluated(tiny_llama_dir, trained, tmp_path)
    after = ModelCard.load(path)
    result, other = after.data.eval_results
    assert (result.dataset_name, result.metric_type) == ("ward", "bits_per_byte")
    assert other.dataset_name == "other" and other.metric_value != result.metric_value
    assert f"{result.metric_value:.4f} bits a byte; beside base " in after.text
    assert "- ward: 4 items are few" in after.text and "Written by hand." in after.text
    assert (
        "Not evaluated" not in after.text and text.split("## Evaluation")[0].strip() in after.text
    )
    evaluated(tiny_llama_dir, trained, tmp_path, "--overwrite")
    assert ModelCard.load(path).text == after.text


def test_a_readme_of_the_user_is_never_touched(trained, tiny_llama_dir, corpus, tmp_path):
    steps, path = ["--max_steps", 2, "--batch_size", 4, "--overwrite"], trained / "README.md"
    path.write_text("mine")
    assert main(train_flags(tiny_llama_dir, corpus, trained, *steps)) == 0
    evaluated(tiny_llama_dir, trained, tmp_path)
    assert path.read_text() == "mine"
    path.unlink()
    assert main(train_flags(tiny_llama_dir, corpus, trained, *steps)) == 0
    assert "Made by" in path.read_text()


def test_the_packaged_base_has_a_name_that_others_find():
    from lorabatch.model.card import PUBLIC_NAMES
    from lorabatch.model.hub import PACKAGED

    assert PUBLIC_NAMES.keys() == PACKAGED.keys()
