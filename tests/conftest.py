"""Fixtures for all tests: tiny model folders on disk, and the packaged real model for slow
tests."""

import os
import tempfile

# Threads that spin while they wait take the cores from whatever else runs here, their own team
# first. Before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Before anything imports the Hugging Face libraries: no test may reach the network.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
# Rates measured while tests keep the machine busy must not become this machine's ceilings.
os.environ["LORABATCH_CEILINGS"] = tempfile.mkdtemp(prefix="lorabatch-ceilings-")

import pytest
import torch
from support.commands import TEXTS, write_lines
from support.models import save_model, tiny_model
from support.processes import forking_process

from lorabatch.machine.device import usable_cores

SLURM = "tests/slurm/"


def pytest_configure(config):
    # peft asks transformers for a property under its old name; nothing that we could call otherwise
    config.addinivalue_line(
        "filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    )


def pytest_collection_modifyitems(items):
    """Slurm begins: of several processes the one that gets it takes longest."""
    items.sort(key=lambda item: not item.nodeid.startswith(SLURM))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With several processes (``-n 2``) a file stays whole, so that its fixtures are made once, and
    so does all of Slurm, of which one machine runs one. (xdist 3.8 finds no groups in pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return SLURM if nodeid.startswith(SLURM) else nodeid.partition("::")[0]

    config.option.loadscopereorder = False  # largest first would put Slurm last
    return ByFile(config, log)


@pytest.fixture(autouse=True)
def few_threads(request):
    """One thread: the models are tiny, and threads that wait for a busy core cost more than they
    bring."""
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


@pytest.fixture
def corpus(tmp_path):
    """A file of documents, which also serve as prompts."""
    return write_lines(tmp_path / "train.txt", TEXTS)


@pytest.fixture(scope="module")
def attempts():
    """Runs ``lorabatch`` in processes of its own, cheaply. Ends with each file: tests of other
    files count children."""
    with forking_process() as run:
        yield run


@pytest.fixture(scope="session")
def real_model_dir():
    """Folder of the packaged SmolLM2-135M-Instruct; for tests marked slow."""
    from lorabatch.model.hub import find_model

    return find_model("smollm2-135m").path
