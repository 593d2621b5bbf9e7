"""Fixtures for all tests: tiny model folders on disk, and the packaged real model for slow tests."""

import os
import tempfile

# Before anything imports the Hugging Face libraries: no test may reach the network.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
# Rates measured while tests keep the machine busy must not become this machine's ceilings.
os.environ["LORABATCH_CEILINGS"] = tempfile.mkdtemp(prefix="lorabatch-ceilings-")

import pytest
import torch
from helpers import save_model, tiny_model

from lorabatch.model.device import usable_cores


def pytest_configure(config):
    # peft asks transformers for a property under its old name; nothing that we could call otherwise
    config.addinivalue_line("filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def few_threads(request):
    """One thread: the models are tiny, and threads that wait for a busy core cost more than they bring."""
    torch.set_num_threads(usable_cores() if request.node.get_closest_marker("slow") else 1)


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory):
    """Folder of a tiny Llama whose tokenizer has a chat template. Read it only."""
    return save_model(tiny_model("llama"), tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_gpt2_dir(tmp_path_factory):
    """Folder of a tiny GPT-2 whose tokenizer has no chat template. Read it only."""
    return save_model(tiny_model("gpt2"), tmp_path_factory.mktemp("tiny-gpt2"), chat=False)


@pytest.fixture(scope="session")
def tiny_neox_dir(tmp_path_factory):
    """Folder of a tiny GPT-NeoX, which only the hf backend can run. Read it only."""
    return save_model(tiny_model("neox"), tmp_path_factory.mktemp("tiny-neox"))


@pytest.fixture(scope="session")
def real_model_dir():
    """Folder of the packaged SmolLM2-135M-Instruct; for tests marked slow."""
    from lorabatch.hub import find_model

    return find_model("smollm2-135m").path
