"""This project's own engine, through the same pipe as the others."""

from protocol import has_no_mode, serve


def load(options):
    import torch

    from lorabatch.hub import ModelSource
    from lorabatch.infer.engine import Engine
    from lorabatch.infer.requests import Request, SamplingParams
    from lorabatch.infer.runner import NativeRunner
    from lorabatch.model.device import TYPE_NAMES, choose_dtype, choose_threads
    from lorabatch.model.load import load_config, load_model, load_tokenizer

    if options.mode == "int8":
        has_no_mode("no int8 yet")
    device = torch.device("cpu")
    dtype = choose_dtype("auto", device)
    choose_threads(options.threads)
    model = load_model(ModelSource("", options.model), load_config(options.model), backend="native", dtype=dtype, device=device)
    tokenizer = load_tokenizer(options.model)

    def generate(prompts, max_new_tokens):
        params = SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True)
        requests = [Request(str(i), i, "", params, token_ids=ids, max_new_tokens=max_new_tokens) for i, ids in enumerate(prompts)]
        runner = NativeRunner(model, num_slots=len(prompts), capacity=max(map(len, prompts)) + max_new_tokens)
        Engine(runner, tokenizer, (), max_running=len(prompts), prefill_tokens=4096).run(requests, lambda request: None)
        return [request.output_ids for request in requests]

    return generate, TYPE_NAMES[dtype]


if __name__ == "__main__":
    serve(load, "lorabatch", "torch")
