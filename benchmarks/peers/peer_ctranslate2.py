"""CTranslate2. exact: fp32, because it has no bf16 on CPUs; int8: weights and activations."""

import json

from protocol import converted, serve

COMPUTE = {"exact": "float32", "int8": "int8"}


def load(options):
    import ctranslate2

    compute = COMPUTE[options.mode]

    def convert(target):
        from ctranslate2.converters import TransformersConverter

        TransformersConverter(str(options.model)).convert(str(target), quantization=compute)

    folder = converted(options.cache / f"ctranslate2-{options.mode}", convert)
    generator = ctranslate2.Generator(
        str(folder),
        device="cpu",
        compute_type=compute,
        inter_threads=1,
        intra_threads=options.threads,
    )
    tokens = json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))

    def generate(prompts, max_new_tokens):
        results = generator.generate_batch(
            [[tokens[i] for i in ids] for ids in prompts],
            max_length=max_new_tokens,
            end_token=[],  # nothing ends a completion; min_length would forbid the token instead
            min_length=max_new_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return [result.sequences_ids[0] for result in results]

    return generate, "fp32" if options.mode == "exact" else "int8"


if __name__ == "__main__":
    serve(load, "ctranslate2")
