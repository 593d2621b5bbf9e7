"""A trained adapter as one GGUF file, which llama.cpp loads beside the base's GGUF (``--lora``)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from lorabatch.errors import UnavailableError
from lorabatch.model import hub, load
from lorabatch.model.lora import LoraWeights, load_adapter
from lorabatch.model.spec import ModelSpec, spec_from_config
from lorabatch.model.weights import checked, fingerprint, linear_shapes, read_checkpoint
from lorabatch.records import replacing

# In GGUF the rotary pairs of these models' heads lie beside each other, not half a head apart.
INTERLEAVED = ("llama", "mistral")
ARCHITECTURES = {"mistral": "llama"}  # GGUF's names, where they differ from transformers'


def export_gguf(adapter_dir: Path, base_model: str, output: Path) -> None:
    """Write the adapter of ``adapter_dir`` in fp32. DataError for an adapter of another base,
    UnavailableError for a base that only transformers runs."""
    hub.prepare_environment()
    source = hub.find_model(base_model)
    spec = spec_from_config(load.load_config(source.path))
    if spec is None:
        raise UnavailableError(
            "GGUF adapters are written for native architectures only",
            where=f"--base_model {base_model}",
            fix="use llama.cpp's own converter",
        )
    identity = fingerprint(spec, checked(spec, read_checkpoint(source.path), where=source.path))
    weights = load_adapter(adapter_dir, linear_shapes(spec), base_fingerprint=identity)
    _write(output, spec, weights)


def _write(path: Path, spec: ModelSpec, weights: LoraWeights) -> None:
    """llama.cpp multiplies every B A by alpha over the rank of its A; so B takes up what a layer's
    own scale differs from that."""
    import gguf

    architecture = ARCHITECTURES.get(spec.model_type, spec.model_type)
    (number,) = (n for n, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, spec.num_layers)
    alpha = float(weights.settings.alpha)
    with replacing(path) as file:
        writer = gguf.GGUFWriter(file.name, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for layer, (a, _) in weights.pairs.items():
            b = weights.scaled(layer)[1] * (len(a) / alpha)
            name = names.get_name(layer)
            writer.add_tensor(f"{name}.weight.lora_a", a.contiguous().numpy())
            writer.add_tensor(f"{name}.weight.lora_b", _rows(spec, layer, b).contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _rows(spec: ModelSpec, layer: str, b: Tensor) -> Tensor:
    """B [O, r] with its rows in the order that GGUF gives the layer's output features."""
    heads = {"q_proj": spec.num_heads, "k_proj": spec.num_kv_heads}.get(layer.rpartition(".")[2])
    if heads is None or spec.model_type not in INTERLEAVED:
        return b
    return b.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(b.shape)
