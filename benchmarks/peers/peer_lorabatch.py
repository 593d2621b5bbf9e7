"""This project's own engine with the defaults of `lorabatch infer`, through the same pipe as the
others."""

from protocol import has_no_mode, serve

# slots are made in multiples of this, so that the warm-up's serve the measured rounds too
SLOT_TOKENS = 256


def load(options):
    import torch

    from lorabatch.config import InferConfig
    from lorabatch.errors import UnavailableError
    from lorabatch.infer.engine import Engine
    from lorabatch.infer.requests import Request, SamplingParams
    from lorabatch.infer.runners import load_for_runner, make_runner
    from lorabatch.machine.device import TYPE_NAMES, choose_dtype, choose_threads
    from lorabatch.model.hub import ModelSource
    from lorabatch.model.load import load_config, load_tokenizer

    config = InferConfig(quantize={"exact": "none", "int8": "int8"}[options.mode])
    device = torch.device("cpu")
    dtype = choose_dtype(config.dtype, device)
    choose_threads(options.threads)
    where = {"backend": "native", "dtype": dtype, "device": device, "quantize": config.quantize}
    try:
        model = load_for_runner(ModelSource("", options.model), load_config(options.model), **where)
    except UnavailableError as error:
        has_no_mode(str(error))
    tokenizer = load_tokenizer(options.model)
    engine = size = None

    def generate(prompts, max_new_tokens):
        nonlocal engine, size
        num_slots, capacity = (
            len(prompts),
            -(-(max(map(len, prompts)) + max_new_tokens) // SLOT_TOKENS) * SLOT_TOKENS,
        )
        if size != (num_slots, capacity):  # in the warm-up
            size, max_tokens = (num_slots, capacity), config.prefill_tokens + num_slots
            runner = make_runner(
                model,
                num_slots=num_slots,
                capacity=capacity,
                max_tokens=max_tokens,
                quantize=config.quantize,
            )
            engine = Engine(
                runner, tokenizer, (), max_running=num_slots, prefill_tokens=config.prefill_tokens
            )
        params = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True)
        requests = [
            Request(str(i), i, "", params, token_ids=ids, max_new_tokens=max_new_tokens)
            for i, ids in enumerate(prompts)
        ]
        engine.run(requests, lambda request: None)
        return [request.output_ids for request in requests]

    return generate, TYPE_NAMES[dtype] if options.mode == "exact" else "int8"


if __name__ == "__main__":
    serve(load, "lorabatch", "torch")
