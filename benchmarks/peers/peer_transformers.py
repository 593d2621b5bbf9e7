"""transformers' generate: static batch, prompts padded on the left."""

from protocol import has_no_mode, serve


def load(options):
    import torch
    from transformers import AutoModelForCausalLM

    if options.mode == "int8":
        has_no_mode("transformers has no int8 for CPUs of its own")
    torch.set_num_threads(options.threads)
    native_bf16 = (
        torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported()
    )
    dtype = torch.bfloat16 if native_bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def generate(prompts, max_new_tokens):
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens
            )
        return out[:, longest:].tolist()

    return generate, "bf16" if native_bf16 else "fp32"


if __name__ == "__main__":
    serve(load, "transformers", "torch")
