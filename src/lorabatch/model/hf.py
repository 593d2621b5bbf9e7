"""The hf backend: any ``AutoModelForCausalLM`` through transformers and peft, behind the native backend's methods.

Slower and complete: padded batches, full logits, peft's own adapter layers. It is chosen for
architectures that the native decoder does not know, or with ``--backend hf``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorabatch.errors import DataError, UnavailableError, UsageError
from lorabatch.model.attention import Segment
from lorabatch.model.functional import likeliest
from lorabatch.model.lora import KEY_PREFIX, AdapterSet, LoraWeights, load_adapter
from lorabatch.model.lora_settings import LoraSettings
from lorabatch.model.loss import LossTerms
from lorabatch.model.spec import ModelSpec
from lorabatch.model.tensorfiles import is_finite
from lorabatch.model.weights import checked, fingerprint, read_checkpoint

ATTENTION_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "query_key_value", "dense", "c_attn", "qkv_proj", "Wqkv")


class HfModel:
    backend = "hf"
    spec = None
    identity = ""  # hash of the files that it was loaded from
    adapter: LoraWeights | None = None
    base_fingerprint: str | None = None

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        config: Any = model.config
        self.max_positions = int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048)
        self.vocab_size = int(model.get_input_embeddings().weight.shape[0])
        self.fan_in_fan_out = any(type(m).__name__ == "Conv1D" for m in model.modules())
        self.num_base_params = sum(p.numel() for p in model.parameters())
        self.base_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    @classmethod
    def load(
        cls, folder: Path, spec: ModelSpec | None = None, *, dtype: torch.dtype, device: torch.device, adapter_dir: Path | None = None
    ) -> HfModel:
        """Any causal model that transformers itself knows; ``spec`` where the native decoder knows it too: then its checks hold here as well."""
        tensors = read_checkpoint(folder)
        if spec is not None:
            tensors = checked(spec, tensors, where=folder)
        base = fingerprint(spec, tensors)
        del tensors
        # An adapter is merged in fp32 and cast once, as the native backend does.
        network, adapter = from_pretrained(folder, torch.float32 if adapter_dir else dtype), None
        if adapter_dir is not None:
            adapter = load_adapter(adapter_dir, _linear_shapes(network), base_fingerprint=base)
            _merge(network, adapter)
        model = cls(network.to(device=device, dtype=dtype).requires_grad_(False).eval(), device)
        model.adapter, model.base_fingerprint = adapter, base
        for name, parameter in model.model.named_parameters():
            if not is_finite(parameter):
                raise DataError(f"'{name}' holds values that are not finite in {dtype}", where=folder, fix="restore the weights")
        return model

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        return _linear_shapes(self.model)

    def configure(self, terms: LossTerms, checkpointing: str) -> None:
        """Settings of the training pass. UsageError for what only the native decoder does."""
        if terms != LossTerms() or checkpointing == "full":
            raise UsageError(
                "only the native decoder has --label_smoothing, --z_loss and --checkpointing full",
                where="--backend hf",
                fix="leave them out, or use a model that the native decoder knows",
            )

    def attach(self, settings: LoraSettings, *, seed: int) -> AdapterSet:
        """Fresh peft adapters whose parameters live in one flat buffer."""
        peft = import_peft()
        torch.manual_seed(seed % 2**63)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.r,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            use_rslora=settings.use_rslora,
            target_modules=self._targets(settings.target_modules),
            fan_in_fan_out=self.fan_in_fan_out,
        )
        try:
            self.model = peft.get_peft_model(self.model, config)
        except ValueError as error:
            raise UsageError(
                f"peft refuses it ({str(error).splitlines()[0]})", where="--target_modules", fix="name linear layers of this model"
            ) from None
        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        pairs = {
            n[len(KEY_PREFIX) :].split(".lora_A.")[0]: (p, parameters[n.replace(".lora_A.", ".lora_B.")])
            for n, p in parameters.items()
            if ".lora_A." in n
        }
        return AdapterSet(settings, pairs)

    def detach(self) -> None:
        """Take the adapters of ``attach`` off again."""
        self.model = self.model.unload()

    def _targets(self, targets: tuple[str, ...]) -> str | list[str]:
        if targets == ("all-linear",):
            return "all-linear"
        present = {name.rsplit(".", 1)[-1] for name, _ in self.model.named_modules()}
        names = [n for t in targets for n in ([a for a in ATTENTION_NAMES if a in present] if t == "attn" else [t])]
        missing = [n for n in names if n.rsplit(".", 1)[-1] not in present]
        if missing or not names:
            raise UsageError(
                "matches no layer of this model",
                where=f"--target_modules {' '.join(missing or targets)}",
                fix="use all-linear or names of its layers",
            )
        return names

    def slower_paths(self) -> list[str]:
        """The whole pass is transformers' own; choosing the backend has said so."""
        return []

    def train(self, mode: bool = True) -> None:
        """Switches the adapters' dropout only: frozen layers run as they will at inference, as in the native backend."""
        for name, module in self.model.named_modules():
            if "lora_dropout" in name:
                module.train(mode)

    def loss_sum(self, token_ids: Sequence[Tensor], first_targets: Sequence[int]) -> Tensor:
        """As ``NativeModel.loss_sum``, with right padding that nothing attends to."""
        ids = nn.utils.rnn.pad_sequence(list(token_ids), batch_first=True).to(self.device)  # [B, L]
        lengths = torch.tensor([len(t) for t in token_ids], device=self.device)[:, None]
        places = torch.arange(ids.shape[1], device=self.device)[None, :]
        logits = self.model(input_ids=ids, attention_mask=(places < lengths).long(), use_cache=False).logits
        supervised = (places < lengths) & (places >= torch.tensor(list(first_targets), device=self.device)[:, None])
        return F.cross_entropy(logits[:, :-1][supervised[:, 1:]].float(), ids[:, 1:][supervised[:, 1:]], reduction="sum")

    def runner(self, *, num_slots: int, capacity: int) -> HfRunner:
        return HfRunner(self)


class HfRunner:
    """Static, left-padded batches with transformers' own cache; a batch runs until all its requests are done."""

    static = True

    def __init__(self, model: HfModel) -> None:
        self._model = model
        self._row_of_slot: dict[int, int] = {}
        self._mask = torch.empty(0)  # [B, L] of the running batch

    @torch.inference_mode()
    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Whole prompts start a new batch; single tokens continue it. Logits [n, V], handed through as hidden states."""
        if segments[0].start == 0:
            return self._begin(segments)
        rows = [self._row_of_slot[s.slot] for s in segments]
        step = torch.zeros(self._mask.shape[0], 1, dtype=torch.long, device=self._model.device)  # finished rows read a zero
        step[rows, 0] = torch.tensor([s.token_ids[0] for s in segments], device=step.device)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(step), 1)], dim=1)
        return self._forward(step)[rows]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden

    def greedy(self, hidden: Tensor) -> list[int]:
        return likeliest(hidden)

    def copy(self, source: int, target: int, length: int) -> None:
        self._row_of_slot[target] = self._row_of_slot[source]

    def clear(self, slot: int) -> None:
        """Every batch has a new cache, and each of its rows reads its own part."""

    def _begin(self, segments: Sequence[Segment]) -> Tensor:
        longest = max(len(s.token_ids) for s in segments)
        missing = [longest - len(s.token_ids) for s in segments]
        padded = [[0] * n + list(s.token_ids) for n, s in zip(missing, segments, strict=True)]
        self._mask = torch.tensor([[0] * n + [1] * (longest - n) for n in missing], device=self._model.device)
        self._row_of_slot = {s.slot: row for row, s in enumerate(segments)}
        self._cache: Any = None
        return self._forward(torch.tensor(padded, device=self._model.device))

    def _forward(self, ids: Tensor) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": self._mask, "past_key_values": self._cache, "use_cache": True}
        if self._model._takes_positions:
            inputs["position_ids"] = (self._mask.cumsum(dim=1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self._model.model(**inputs)
        self._cache = output.past_key_values
        return output.logits[:, -1]


def import_peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UnavailableError("the hf backend needs the package peft for adapters", fix="run: pip install peft") from None
    return peft


def _linears(network: Any) -> Iterator[tuple[str, Tensor]]:
    """(path, weight [O, I]) of every layer that can carry an adapter: not a head that is the embedding's own weight. Of a Conv1D, a view."""
    embedding = network.get_input_embeddings().weight
    for path, module in network.named_modules():
        if isinstance(module, nn.Linear) and module.weight is not embedding:
            yield path, module.weight
        elif type(module).__name__ == "Conv1D":
            yield path, module.weight.t()


def _linear_shapes(network: Any) -> dict[str, tuple[int, int]]:
    return {path: (len(weight), weight.shape[1]) for path, weight in _linears(network)}


@torch.no_grad()
def _merge(network: Any, adapter: LoraWeights) -> None:
    for path, weight in _linears(network):
        delta = adapter.delta(path)
        if delta is not None:
            weight.add_(delta)


def from_pretrained(folder: Path, dtype: torch.dtype, **options: Any) -> Any:
    """What transformers makes of a folder, if all of its weights and nothing else were in it. Raises DataError."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True, **options
    )
    # transformers would go on with random numbers in place of what is missing, and without what it has no place for
    for what, names in (
        ("the checkpoint lacks", report["missing_keys"]),
        ("the architecture has no place for", [n for n in report["unexpected_keys"] if n.endswith(".weight")]),
    ):
        if names:
            raise DataError(f"{what} {len(names)} tensors ({min(names)})", where=folder, fix="copy or fetch the model again")
    return model
