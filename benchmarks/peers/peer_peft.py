"""peft's ``adapter_names``: one padded batch of transformers' generate in which each row goes
through its own adapter.

Reads one job on stdin, {"model", "adapters": {name: folder}, "prompts": [[id, …], …], "names":
[name of each], "max_new_tokens", "threads"}, answers {"startup_s", "seconds", "outputs", "dtype",
"versions", "peak_rss_bytes"}. Adapters in the base's type: casts to fp32 would slow it.
"""

import json
import re
import sys
import time
from importlib import metadata
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

WARM_UP_TOKENS = 2


def peak_rss_bytes():
    """Of this process alone: ``ru_maxrss`` begins with what the parent held."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def main():
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    start = time.perf_counter()
    native_bf16 = (
        torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported()
    )
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=torch.bfloat16 if native_bf16 else torch.float32
    )
    (first, folder), *others = job["adapters"].items()
    how = {"autocast_adapter_dtype": False, "low_cpu_mem_usage": True}
    model = PeftModel.from_pretrained(model, folder, adapter_name=first, **how)
    for name, folder in others:
        model.load_adapter(folder, name, **how)
    model = model.to(model.dtype).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    longest = max(map(len, job["prompts"]))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in job["prompts"]])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in job["prompts"]])
    inputs = {
        "input_ids": ids,
        "attention_mask": mask,
        "adapter_names": job["names"],
        "do_sample": False,
    }
    with torch.inference_mode():
        model.generate(**inputs, max_new_tokens=WARM_UP_TOKENS)
        ready = time.perf_counter()
        outputs = model.generate(**inputs, max_new_tokens=job["max_new_tokens"])[
            :, longest:
        ].tolist()
    print(
        json.dumps(
            {
                "startup_s": ready - start,
                "seconds": time.perf_counter() - ready,
                "outputs": outputs,
                "dtype": "bf16" if native_bf16 else "fp32",
                "versions": {
                    name: metadata.version(name) for name in ("peft", "transformers", "torch")
                },
                "peak_rss_bytes": peak_rss_bytes(),
            }
        )
    )


if __name__ == "__main__":
    main()
