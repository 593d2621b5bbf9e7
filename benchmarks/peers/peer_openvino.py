"""OpenVINO GenAI's continuous batching. exact: bf16 (fp32 where the processor has no bf16); int8:
weights by nncf, activations dynamic."""

from pathlib import Path

from protocol import converted, serve


def export(model: Path, target: Path, int8: bool) -> None:
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVModelForCausalLM
    from transformers import AutoTokenizer

    OVModelForCausalLM.from_pretrained(model, export=True, load_in_8bit=int8).save_pretrained(
        target
    )
    tokenizer, detokenizer = convert_tokenizer(
        AutoTokenizer.from_pretrained(model), with_detokenizer=True
    )
    openvino.save_model(tokenizer, target / "openvino_tokenizer.xml")
    openvino.save_model(detokenizer, target / "openvino_detokenizer.xml")


def load(options):
    import numpy
    import openvino
    import openvino_genai

    int8 = options.mode == "int8"
    folder = converted(
        options.cache / f"openvino-{options.mode}",
        lambda target: export(options.model, target, int8),
    )
    native_bf16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    precision = "bf16" if native_bf16 else "f32"
    properties = {"INFERENCE_NUM_THREADS": options.threads}
    if not int8:  # without these two, activations are quantised
        properties |= {
            "INFERENCE_PRECISION_HINT": precision,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        }
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 4  # GB
    scheduler.max_num_batched_tokens = 4096
    scheduler.max_num_seqs = 256
    scheduler.dynamic_split_fuse = False  # 2 % faster here than mixing prefill and decode
    pipeline = openvino_genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", properties)

    def generate(prompts, max_new_tokens):
        config = openvino_genai.GenerationConfig(
            max_new_tokens=max_new_tokens, ignore_eos=True, do_sample=False
        )
        inputs = [openvino.Tensor(numpy.array([ids], dtype=numpy.int64)) for ids in prompts]
        return [
            list(result.m_generation_ids[0])
            for result in pipeline.generate(inputs, [config] * len(inputs))
        ]

    return generate, "int8" if int8 else precision


if __name__ == "__main__":
    serve(load, "openvino", "openvino-genai", "optimum-intel", "nncf")
