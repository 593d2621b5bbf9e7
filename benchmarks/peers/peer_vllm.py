"""vLLM's CPU build in one process; its cache of prompt prefixes is emptied between rounds."""

import os

from protocol import has_no_mode, serve


def load(options):
    if options.mode == "int8":
        has_no_mode("vLLM needs a checkpoint in its own int8 format")
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "4",  # GB
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, so that it can be stopped and its memory read
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{options.threads - 1}",
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM, SamplingParams

    engine = LLM(str(options.model), dtype="bfloat16", max_model_len=2048, max_num_seqs=256, skip_tokenizer_init=True)

    def generate(prompts, max_new_tokens):
        engine.reset_prefix_cache()
        parameters = SamplingParams(temperature=0, max_tokens=max_new_tokens, ignore_eos=True, detokenize=False)
        results = engine.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
        return [list(result.outputs[0].token_ids) for result in results]

    return generate, "bf16"


if __name__ == "__main__":
    serve(load, "vllm-cpu", "torch")
