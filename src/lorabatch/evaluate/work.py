"""The items of a run, ready to be scored under every model of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import torch

from lorabatch.config_trust import EvalConfig
from lorabatch.errors import UnavailableError
from lorabatch.evaluate.cautions import caution
from lorabatch.evaluate.figures import BASE
from lorabatch.evaluate.generation import ITEMS_A_PASS, Generator, chrf
from lorabatch.evaluate.items import GENERATION, Item, Task, digest
from lorabatch.evaluate.scoring import TokenItem, batches, score, tokenise_task
from lorabatch.infer.runners import load_for_runner
from lorabatch.machine.device import TYPE_NAMES, choose_device, choose_dtype, choose_threads
from lorabatch.machine.environment import gpu_description
from lorabatch.model import load
from lorabatch.model.hub import ModelSource
from lorabatch.model.load import Model
from lorabatch.model.lora import LoraWeights, load_adapter
from lorabatch.progress import Progress
from lorabatch.schema import Record


@dataclass(frozen=True)
class Work:
    """Everything that is scored, and what run.json says of it."""

    model: Model
    adapters: dict[str, LoraWeights | None]  # by name; None: the base alone, which comes first
    tasks: dict[str, list[TokenItem]]
    prompts: Mapping[str, Sequence[Item]]  # of the tasks that generate
    generator: Generator | None
    block_tokens: int
    keys_of: dict[tuple[str, str, str], str]  # (task, model, id) -> key of its line
    facts: Record
    warnings: list[Record]

    @property
    def keys(self) -> set[str]:
        return set(self.keys_of.values())

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 of each adapter's values."""
        return {name: w.digest() for name, w in self.adapters.items() if w is not None}

    def lines(self, done: Set[str]) -> Iterator[Record]:
        """Of items.jsonl, those whose key is not in ``done``. A batch is computed whole or not at
        all, so that what was done before changes no bit."""
        total = sum(map(len, self.tasks.values())) + sum(map(len, self.prompts.values()))
        progress = Progress(total, unit="item", description="eval")
        for task, items, scores in self._batches():
            keys = {self.keys_of[task, name, item.id] for name in self.adapters for item in items}
            if not keys <= done:
                for name, item, figures in scores:
                    line = self._line(task, name, item, figures)
                    if line["key"] not in done:
                        yield line
            progress.update(len(items))
        progress.close()

    def _batches(self) -> Iterator[tuple[str, list[Item], Iterator[tuple[str, Item, Record]]]]:
        """(task, items, their scores, which are computed when they are asked for)."""
        for task, scored in self.tasks.items():
            for batch in batches(scored, self.block_tokens):
                scores = score(self.model, self.adapters, batch, self.block_tokens)
                yield task, [item.item for item in batch], scores
        for task, items in self.prompts.items():
            assert self.generator is not None
            for start in range(0, len(items), ITEMS_A_PASS):
                some = list(items[start : start + ITEMS_A_PASS])
                yield task, some, self.generator.score(some)

    def _line(self, task: str, name: str, item: Item, figures: Record) -> Record:
        return {
            "task": task,
            "id": item.id,
            "group": item.group,
            **({} if item.domain is None else {"domain": item.domain}),
            "model": name,
            "content": item.content(),
            **figures,
            "key": self.keys_of[task, name, item.id],
        }


def load_work(
    config: EvalConfig, source: ModelSource, tasks: list[Task], folders: Mapping[str, Path]
) -> Work:
    """The base, the adapters checked against it, and the tokens of all items. DataError for what
    does not fit together."""
    device, threads = choose_device(no_cuda=config.no_cuda), choose_threads(config.threads)
    dtype = choose_dtype(config.dtype, device)
    model_config = load.load_config(source.path)
    tokenizer = load.load_tokenizer(source.path)
    model = load.load_model(
        source, model_config, backend=config.backend, dtype=dtype, device=device
    )
    model.train(False)
    adapters = _load_adapters(model, folders)
    max_len = min(config.max_len, model.max_positions)
    print(
        f"base {source.name} ({TYPE_NAMES[dtype]} on {device}, {threads} threads), "
        f"{len(folders)} adapters, unmerged"
    )
    tokenised = {
        task.name: tokenise_task(task, tokenizer, max_len=max_len, vocab=model.vocab_size)
        for task in tasks
        if task.kind != GENERATION
    }
    prompts = {task.name: task.items for task in tasks if task.kind == GENERATION}
    items = {name: [item.item for item in found] for name, found in tokenised.items()} | prompts
    new = f" {config.max_new_tokens}" if prompts else ""
    circumstances = (
        f"{model.identity} {model.backend} {TYPE_NAMES[dtype]} {max_len} {config.block_tokens}{new}"
    )
    return Work(
        model=model,
        adapters=adapters,
        tasks=tokenised,
        prompts=prompts,
        generator=_generator(config, source, device, dtype, adapters) if prompts else None,
        block_tokens=config.block_tokens,
        keys_of=_keys(items, adapters, circumstances),
        facts=_facts(source, model, device, dtype, threads),
        warnings=list(_lost(tasks, items)),
    )


def _load_adapters(model: Model, folders: Mapping[str, Path]) -> dict[str, LoraWeights | None]:
    """The base alone, and each adapter, by name."""
    shapes, base = model.linear_shapes, model.base_fingerprint
    return {BASE: None} | {
        name: load_adapter(folder, shapes, base_fingerprint=base)
        for name, folder in folders.items()
    }


def _lost(tasks: Sequence[Task], items: Mapping[str, Sequence[Item]]) -> Iterator[Record]:
    for task in tasks:
        if lost := len(task.items) - len(items[task.name]):
            yield caution("cut", task=task.name, items=len(task.items), count=lost)


def _facts(
    source: ModelSource, model: Model, device: torch.device, dtype: torch.dtype, threads: int
) -> Record:
    """What run.json says of where and with what the items were scored."""
    return {
        "model": {"name": source.name, "fingerprint": model.base_fingerprint},
        "device": str(device),
        "dtype": TYPE_NAMES[dtype],
        "threads": threads,
        "backend": model.backend,
        "gpu": gpu_description(),
    }


def _generator(
    config: EvalConfig,
    source: ModelSource,
    device: torch.device,
    dtype: torch.dtype,
    adapters: Mapping[str, LoraWeights | None],
) -> Generator:
    """UnavailableError without sacrebleu, or for adapters on the hf backend."""
    chrf()
    model_config = load.load_config(source.path)
    model = load_for_runner(
        source, model_config, backend=config.backend, dtype=dtype, device=device, quantize="none"
    )
    if model.backend == "hf" and len(adapters) > 1:
        raise UnavailableError(
            "adapters generate on the native backend only",
            where="--backend hf",
            fix="leave out the rows with a 'target', or the adapters",
        )
    tokenizer = load.load_tokenizer(source.path)
    eos_ids = load.end_tokens(source.path, model_config, tokenizer)
    return Generator(model, tokenizer, eos_ids, adapters, config.max_new_tokens)


def _keys(
    tasks: Mapping[str, Sequence[Item]],
    adapters: Mapping[str, LoraWeights | None],
    circumstances: str,
) -> dict[tuple[str, str, str], str]:
    """What each score depends on, as 16 hexadecimal digits."""
    weights = {name: w.digest() if w else BASE for name, w in adapters.items()}
    return {
        (task, name, item.id): digest(
            f"{circumstances} {weights[name]} {task} {item.id} {item.group} {item.domain} "
            f"{item.content()}"
        )
        for task, items in tasks.items()
        for name in adapters
        for item in items
    }
