"""Tiny random models of every native variant, and the few steps that most tests share.

Shapes: L tokens of one document, T tokens of a packed block, V vocabulary.
"""

import functools

import torch

from lorabatch.corpus.tokens import TokenCorpus, TokenDocument
from lorabatch.infer.engine import Engine
from lorabatch.infer.requests import Request, SamplingParams
from lorabatch.machine.device import cpu_has_bf16
from lorabatch.model.attention import PackedAttention
from lorabatch.model.lora import LoraSettings
from lorabatch.model.native import NativeModel
from lorabatch.model.spec import spec_from_config
from lorabatch.model.weights import build_decoder, fingerprint, normalised

# Types of the real model's tests: bf16 takes many times as long where it is emulated, and nobody
# gets it there without asking.
NATIVE_TYPES = ("fp32", "bf16") if cpu_has_bf16() else ("fp32",)
VOCAB = 300
EOS = "<|endoftext|>"
EOS_ID = 0
MAX_POSITIONS = 128
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
    + EOS
    + "\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOKENIZER_TEXTS = [
    "The patient has a fever, a cough and chest pain. What should the doctor ask first?",
    (
        "Question: what is the treatment of asthma? Answer: inhaled medicine, and the patient "
        "should rest."
    ),
    "O paciente tem febre e dor no peito; a pressão está alta.",
]

LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "rms_norm_eps": 1e-3,  # large enough for a wrong one to show
    "bos_token_id": None,
    "eos_token_id": EOS_ID,
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": MAX_POSITIONS,
    "layer_norm_epsilon": 1e-3,
    "bos_token_id": EOS_ID,
    "eos_token_id": EOS_ID,
}
# Documents of the training loop's tests, and where supervision begins in each.
LENGTHS = [12, 5, 20, 9, 16, 7, 30, 3]
TARGETS = [1, 2, 10, 1, 1, 4, 25, 1]
SCALED = {"rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}

NATIVE_VARIANTS = {
    "gpt2": ("GPT2Config", GPT2),
    "gpt2-gelu": ("GPT2Config", GPT2 | {"activation_function": "gelu", "n_inner": 96}),
    "gpt2-untied": ("GPT2Config", GPT2 | {"tie_word_embeddings": False}),
    "llama": (
        "LlamaConfig",
        LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
    "llama-biases-tied": (
        "LlamaConfig",
        LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama-rope-llama3": (
        "LlamaConfig",
        LLAMA
        | {
            "rope_parameters": SCALED
            | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        },
    ),
    "llama-rope-yarn": ("LlamaConfig", LLAMA | {"rope_parameters": SCALED | {"rope_type": "yarn"}}),
    "llama-rope-linear": (
        "LlamaConfig",
        LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
    ),
    "mistral-window": ("MistralConfig", LLAMA | {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", LLAMA),
    "qwen2-window": (
        "Qwen2Config",
        LLAMA | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", LLAMA | {"head_dim": 32, "tie_word_embeddings": True}),
}
OTHER_VARIANTS = {
    "distilgpt2": ("GPT2Config", {"n_layer": 6}),  # the published shape; slow
    "neox": (
        "GPTNeoXConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": MAX_POSITIONS,
            "bos_token_id": EOS_ID,
            "eos_token_id": EOS_ID,
        },
    ),
}


def variant_config(name, **changes):
    """The transformers configuration of a variant."""
    import transformers

    kind, values = (NATIVE_VARIANTS | OTHER_VARIANTS)[name]
    return getattr(transformers, kind)(**values | changes)


def tiny_model(name="llama", *, seed=0, **changes):
    """A random transformers model in eval mode; noise on every parameter, so that zero biases and
    unit norms hide nothing."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        variant_config(name, **changes), attn_implementation="eager"
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@functools.cache
def tiny_tokenizer(*, chat=True):
    """A byte-level BPE tokenizer of VOCAB entries: any text survives a round trip."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TOKENIZER_TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS)
    assert (len(tokenizer), tokenizer.eos_token_id) == (VOCAB, EOS_ID)
    tokenizer.chat_template = CHAT_TEMPLATE if chat else None
    return tokenizer


def save_model(model, folder, *, chat=True):
    """A model folder as ``--base_model`` takes it: config, safetensors, tokenizer."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.save_pretrained(folder)
    tiny_tokenizer(chat=chat).save_pretrained(folder)
    return folder


def native(model, *, dtype=torch.float32, prepack=True, merge=None):
    """Our backend with the weights of a transformers model."""
    spec = spec_from_config(model.config)
    tensors = {k: v.detach().clone() for k, v in model.state_dict().items()}
    decoder = build_decoder(spec, tensors, dtype=dtype, prepack=prepack, merge=merge)
    return NativeModel(spec, decoder, fingerprint(spec, normalised(spec, tensors)))


def random(*shape, seed=0, dtype=torch.float32, std=1.0):
    """Normally distributed numbers."""
    return (std * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def random_ids(lengths, *, seed=0, vocab=VOCAB):
    """One [L] tensor of random token ids per length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocab, (n,), generator=generator) for n in lengths]


def packed_logits(model, documents):
    """Logits [L, V] of each document, computed as one packed block by our decoder."""
    lengths = [len(ids) for ids in documents]
    positions = torch.cat([torch.arange(n) for n in lengths])
    with torch.no_grad():
        hidden = model.decoder(torch.cat(documents), positions, PackedAttention(lengths))
        return model.decoder.logits(hidden).split(lengths)


def reference_logits(model, ids):
    """Logits [L, V] of one document from a transformers or peft model."""
    with torch.no_grad():
        return model(input_ids=ids[None], use_cache=False).logits[0]


def assert_same_logits(model, reference, documents, *, atol=1e-4):
    for ours, ids in zip(packed_logits(model, documents), documents, strict=True):
        torch.testing.assert_close(ours, reference_logits(reference, ids), rtol=0, atol=atol)


def reference_greedy(model, ids, max_new_tokens):
    """New token ids of transformers' greedy search for one prompt; the end token does not end
    it."""
    prompt = ids[None]
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=EOS_ID,
    )
    return out[0, len(ids) :].tolist()


def engine_greedy(runner, prompts, max_new_tokens, *, num_slots, prefill_tokens=64, tokenizer=None):
    """New token ids per prompt from our batching engine; max_new_tokens: one number per prompt."""
    requests = [
        Request(
            str(i),
            i,
            "",
            SamplingParams(max_new_tokens=n, ignore_eos=True),
            token_ids=ids.tolist(),
            max_new_tokens=n,
        )
        for i, (ids, n) in enumerate(zip(prompts, max_new_tokens, strict=True))
    ]
    finished = []
    engine = Engine(
        runner,
        tokenizer or tiny_tokenizer(),
        [EOS_ID],
        max_running=num_slots,
        prefill_tokens=prefill_tokens,
    )
    engine.run(requests, finished.append)
    assert sorted(r.index for r in finished) == list(range(len(prompts)))
    return [r.output_ids for r in requests]


def randomise_b(adapters, *, std=0.1, seed=1):
    """Make every B non-zero, so that the adapters change the model."""
    generator = torch.Generator().manual_seed(seed)
    for _, b in adapters.pairs.values():
        b.data.copy_(std * torch.randn(b.shape, generator=generator))


def random_adapter(model, *, r, targets=("all-linear",), seed):
    """LoraWeights that change the model; nothing stays attached to it."""
    adapters = model.attach(LoraSettings(r=r, alpha=2.0 * r, target_modules=targets), seed=seed)
    randomise_b(adapters, seed=seed)
    for layer in model.decoder.linears():
        layer.adapters.clear()
    return adapters.weights()


def tiny_corpus(lengths, *, seed=0, first_targets=None, target_bytes=None):
    """Random documents, already tokenised; supervised from their second token on unless told
    otherwise."""
    first_targets = first_targets or [1] * len(lengths)
    documents = tuple(
        TokenDocument(ids.numpy(), first)
        for ids, first in zip(random_ids(lengths, seed=seed), first_targets, strict=True)
    )
    return TokenCorpus(documents, len(documents), 0, 0, 0, target_bytes)


def tiny_gguf(model, path, *, blocks=None):
    """A tiny Llama with the tiny tokenizer as llama.cpp's converter writes it; ``blocks``: what the
    header says instead of the truth."""
    import json

    import gguf

    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers if blocks is None else blocks)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    bpe = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].get))
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (VOCAB - 1)])
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_eos_token_id(EOS_ID)
    writer.add_bos_token_id(EOS_ID)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        for part, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if part in name:  # llama.cpp pairs the halves of a rotation side by side
                tensor = (
                    tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
                )
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.contiguous().numpy())
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
