"""The hf backend: any ``AutoModelForCausalLM`` through transformers and peft, behind the native
backend's methods.

Slower and complete: padded batches, full logits, peft's own adapter layers. It is chosen for
architectures that the native decoder does not know, or with ``--backend hf``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorabatch.corpus.tokens import Targets, num_targets, spans_of
from lorabatch.errors import DataError, UnavailableError, UsageError
from lorabatch.model.lora import KEY_PREFIX, AdapterSet, LoraWeights, load_adapter
from lorabatch.model.lora_settings import LoraSettings
from lorabatch.model.loss import LossTerms
from lorabatch.model.spec import ModelSpec
from lorabatch.model.tensorfiles import is_finite
from lorabatch.model.weights import checked, fingerprint, read_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION_NAMES = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "out_proj",
    "query_key_value",
    "dense",
    "c_attn",
    "qkv_proj",
    "Wqkv",
)


class HfModel:
    backend = "hf"
    spec = None
    identity = ""  # hash of the files that it was loaded from
    adapter: LoraWeights | None = None
    base_fingerprint: str | None = None

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self.model, self.device = model, device
        config = model.config
        self.max_positions = int(
            getattr(config, "max_position_embeddings", None)
            or getattr(config, "n_positions", None)
            or 2048
        )
        self.vocab_size = int(model.get_input_embeddings().weight.shape[0])
        self.fan_in_fan_out = any(type(m).__name__ == "Conv1D" for m in model.modules())
        self.num_base_params = sum(p.numel() for p in model.parameters())
        self.base_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        taken = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in taken
        self._takes_few_logits = "logits_to_keep" in taken

    @classmethod
    def load(
        cls,
        folder: Path,
        spec: ModelSpec | None = None,
        *,
        dtype: torch.dtype,
        device: torch.device,
        adapter_dir: Path | None = None,
    ) -> HfModel:
        """Any causal model that transformers itself knows; ``spec`` where the native decoder knows
        it too: then its checks hold here as well."""
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
        _check_finite(model.model, dtype, folder)
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
                f"peft refuses it ({str(error).splitlines()[0]})",
                where="--target_modules",
                fix="name linear layers of this model",
            ) from None
        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        pairs = {
            n[len(KEY_PREFIX) :].split(".lora_A.")[0]: (
                p,
                parameters[n.replace(".lora_A.", ".lora_B.")],
            )
            for n, p in parameters.items()
            if ".lora_A." in n
        }
        return AdapterSet(settings, pairs)

    def detach(self) -> None:
        """Take the adapters of ``attach`` off again."""
        self.model = self.model.unload()

    @contextmanager
    def wearing(self, weights: LoraWeights | None) -> Iterator[None]:
        """As ``NativeModel.wearing``."""
        hooks = []
        for path, layer in self.model.named_modules():
            if weights is not None and path in weights.pairs:
                a, b = (half.to(layer.weight) for half in weights.scaled(path))
                hooks.append(layer.register_forward_hook(partial(_add_low_rank, a, b)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _targets(self, targets: tuple[str, ...]) -> str | list[str]:
        if targets == ("all-linear",):
            return "all-linear"
        present = {name.rsplit(".", 1)[-1] for name, _ in self.model.named_modules()}
        names = [
            n
            for t in targets
            for n in ([a for a in ATTENTION_NAMES if a in present] if t == "attn" else [t])
        ]
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
        """Switches the adapters' dropout only: frozen layers run as they will at inference, as in
        the native backend."""
        for name, module in self.model.named_modules():
            if "lora_dropout" in name:
                module.train(mode)

    def loss_sum(self, token_ids: Sequence[Tensor], targets: Sequence[Targets]) -> Tensor:
        """As ``NativeModel.loss_sum``, with right padding that nothing attends to."""
        return F.cross_entropy(*self._supervised(token_ids, targets), reduction="sum")

    @torch.no_grad()
    def token_nll(self, token_ids: Sequence[Tensor], targets: Sequence[Targets]) -> list[Tensor]:
        """As ``Backend.token_nll``."""
        each = F.cross_entropy(*self._supervised(token_ids, targets), reduction="none")
        counts = [
            num_targets(wanted, len(ids)) for ids, wanted in zip(token_ids, targets, strict=True)
        ]
        return list(each.split(counts))

    def _supervised(
        self, token_ids: Sequence[Tensor], targets: Sequence[Targets]
    ) -> tuple[Tensor, Tensor]:
        """(fp32 logits that predict the supervised tokens [n, V], these tokens [n])."""
        ids = nn.utils.rnn.pad_sequence(list(token_ids), batch_first=True)  # [B, L]
        mask, document, place = _supervised(token_ids, targets)
        # logits of places that predict a supervised token in some row: all exist at once
        asked, at = torch.unique(place - 1, return_inverse=True)
        ids, mask, document, place, asked, at = (
            t.to(self.device) for t in (ids, mask, document, place, asked, at)
        )
        keep, column = (
            ({"logits_to_keep": asked}, at) if self._takes_few_logits else ({}, place - 1)
        )
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **keep).logits
        return logits[document, column].float(), ids[document, place]


def _supervised(
    token_ids: Sequence[Tensor], targets: Sequence[Targets]
) -> tuple[Tensor, Tensor, Tensor]:
    """(mask [B, L] of what is no padding, document [n] and place in it [n] of each supervised
    token). Found on the CPU: for a mask on a GPU the host would wait for the number of rows."""
    lengths = torch.tensor([len(t) for t in token_ids])[:, None]
    present = torch.arange(int(lengths.max()))[None, :] < lengths
    supervised = torch.zeros_like(present)
    for row, wanted, ids in zip(supervised, targets, token_ids, strict=True):
        for a, b in spans_of(wanted, len(ids)):
            row[a:b] = True
    document, place = supervised.nonzero(as_tuple=True)
    return present.long(), document, place


def _check_finite(network: PreTrainedModel, dtype: torch.dtype, folder: Path) -> None:
    for name, parameter in network.named_parameters():
        if not is_finite(parameter):
            raise DataError(
                f"'{name}' holds values that are not finite in {dtype}",
                where=folder,
                fix="restore the weights",
            )


def import_peft() -> ModuleType:
    try:
        import peft
    except ImportError:
        raise UnavailableError(
            "the hf backend needs the package peft for adapters", fix="run: pip install peft"
        ) from None
    return peft


def _linears(network: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(path, weight [O, I]) of every layer that can carry an adapter: not a head that is the
    embedding's own weight. Of a Conv1D, a view."""
    embedding = network.get_input_embeddings().weight
    for path, module in network.named_modules():
        if isinstance(module, nn.Linear) and module.weight is not embedding:
            yield path, module.weight
        elif type(module).__name__ == "Conv1D":
            yield path, module.weight.t()


def _linear_shapes(network: PreTrainedModel) -> dict[str, tuple[int, int]]:
    return {path: (len(weight), weight.shape[1]) for path, weight in _linears(network)}


def _add_low_rank(
    a: Tensor, b: Tensor, layer: nn.Module, inputs: tuple[Tensor], output: Tensor
) -> Tensor:
    """What a forward hook returns in place of a layer's output. a [r, I], b [O, r] with its
    scale."""
    return output + (inputs[0] @ a.t()) @ b.t()


@torch.no_grad()
def _merge(network: PreTrainedModel, adapter: LoraWeights) -> None:
    for path, weight in _linears(network):
        delta = adapter.delta(path)
        if delta is not None:
            weight.add_(delta)


def from_pretrained(folder: Path, dtype: torch.dtype, **options: str) -> PreTrainedModel:
    """What transformers makes of a folder, if all of its weights and nothing else were in it.
    Raises DataError."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    model, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        **options,
    )
    # transformers would continue with random numbers for what is missing, and without what it does
    # not know
    for what, names in (
        ("the checkpoint lacks", report["missing_keys"]),
        (
            "the architecture has no place for",
            [n for n in report["unexpected_keys"] if n.endswith(".weight")],
        ),
    ):
        if names:
            raise DataError(
                f"{what} {len(names)} tensors ({min(names)})",
                where=folder,
                fix="copy or fetch the model again",
            )
    return model
