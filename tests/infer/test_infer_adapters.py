"""Several adapters in one run: each request gets its own, the same as if it ran alone, and as if it
were merged."""

import shutil

import pytest
import torch
from support.commands import infer_flags, write_rows
from support.models import native, random, random_adapter, random_ids, tiny_model

from lorabatch import kernels
from lorabatch.cli import main
from lorabatch.infer.runners.eager import NativeRunner
from lorabatch.infer.runners.low_rank import RowGroups, Stack, attach_adapters
from lorabatch.infer.runners.recorded import ProgramRunner
from lorabatch.model.attention import Segment
from lorabatch.model.lora import CONFIG_FILE, save_adapter
from lorabatch.records import read_json, read_jsonl, write_json


@pytest.fixture(params=["kernels", "torch"])
def runner_type(request, monkeypatch):
    """The class that serves: the recorded program, or torch's operators as on a machine without the
    kernels."""
    if request.param == "torch":
        monkeypatch.setattr("lorabatch.infer.runners.program.library", lambda name: None)
        return NativeRunner
    if kernels.library("step") is None:
        pytest.skip("no CPU kernels on this machine")
    return ProgramRunner


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapter folders for ``tiny_llama_dir``."""
    folders = {}
    for seed, name in enumerate(("cardio", "onco")):
        model = native(tiny_model("llama"))
        adapter = random_adapter(model, r=4, seed=seed)
        folders[name] = tmp_path_factory.mktemp(name)
        save_adapter(
            folders[name],
            adapter,
            base_name="tiny",
            base_fingerprint=model.base_fingerprint,
            fan_in_fan_out=False,
        )
    return folders


def infer(model, rows, folder, *more):
    """Completions by id of one run over the given rows."""
    folder.mkdir(exist_ok=True)
    prompts = write_rows(folder / "prompts.jsonl", rows)
    fixed = ["--no_cuda", "--max_new_tokens", 12, "--ignore_eos"]
    assert main(infer_flags(model, prompts, folder / "out", *fixed, *more)) == 0
    return {record["id"]: record for record in read_jsonl(folder / "out" / "completions.jsonl")}


def rows_for(names):
    return [
        {
            "id": f"{name}-{i}",
            "prompt": f"The patient {i} has a fever",
            **({"adapter": name} if name else {}),
        }
        for i in range(3)
        for name in names
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_request_is_the_same_bits_beside_other_adapters(runner_type, name, dtype):
    """Prompts and single tokens of four adapters (other ranks, other layers) and of the base, in no
    order, in steps of any cut."""
    reference, options = tiny_model(name), {"dtype": dtype, "prepack": runner_type is NativeRunner}
    model = native(reference, **options)
    last = "down_proj" if name == "llama" else "mlp.c_proj"
    shapes = ((4, ("all-linear",)), (7, ("attn",)), (50, (last,)), (16, ("all-linear",)))
    bank = [
        random_adapter(model, r=r, targets=targets, seed=seed)
        for seed, (r, targets) in enumerate(shapes)
    ]
    lengths, chosen = (70, 9, 1, 33, 2, 12), (2, 0, -1, 3, 0, 1)
    prompts = [ids.tolist() for ids in random_ids(lengths)]
    sizes = {"num_slots": len(prompts), "capacity": 128}
    if runner_type is ProgramRunner:
        sizes["max_tokens"] = 40  # of 127: cut within a prompt
    together, alone = (
        runner_type(native(reference, **options), adapters=bank, **sizes) for _ in range(2)
    )
    for step in range(2):
        pieces = [
            Segment(
                slot,
                step * len(ids),
                ids if step == 0 else [7],
                adapter=a,
                num_logits=slot % 2 + (slot < 2) if step == 0 else 1,
            )
            for slot, (ids, a) in enumerate(zip(prompts, chosen, strict=True))
        ]
        hidden = together.forward(pieces)
        assert len(hidden) == sum(p.num_logits for p in pieces)
        assert torch.equal(hidden, torch.cat([alone.forward([p]) for p in pieces]))
    for row, (ids, adapter) in enumerate(zip(prompts, chosen, strict=True)):
        merged = native(reference, merge=bank[adapter].delta if adapter >= 0 else None, **options)
        expected = runner_type(merged, **sizes).forward([Segment(0, 0, [*ids, 7])])[0]
        assert (hidden[row] - expected).norm() < (
            1e-5 if dtype == torch.float32 else 0.05
        ) * expected.norm()


def test_a_bank_replaces_the_one_before(tiny_llama_dir):
    """A second runner over one model, as after an engine that ran out of memory: its adapters are
    added once."""
    model = native(tiny_model("llama"))
    bank = [random_adapter(model, r=4, seed=1)]
    segment = Segment(0, 0, random_ids([20])[0].tolist(), adapter=0)
    first, second = (
        NativeRunner(model, num_slots=1, capacity=64, adapters=bank).forward([segment])
        for _ in range(2)
    )
    assert torch.equal(first, second)


def test_every_request_gets_its_adapter(tiny_llama_dir, tmp_path, adapters, runner_type):
    bank = ["--adapters", *(f"{name}={folder}" for name, folder in adapters.items())]
    together = infer(
        tiny_llama_dir,
        [*rows_for(("cardio", None, "onco")), {"prompt": "x", "id": "bad", "adapter": "neuro"}],
        tmp_path / "all",
        *bank,
    )
    assert (
        together["bad"]["finish_reason"] == "error"
        and "unknown adapter 'neuro'" in together["bad"]["error"]
    )
    assert {r["adapter"] for r in together.values()} == {"cardio", "onco", None, "neuro"}
    for name in ("cardio", None, "onco"):
        alone = infer(
            tiny_llama_dir,
            rows_for((name,)),
            tmp_path / f"{name}-alone",
            *bank,
            "--batch_size",
            "1",
        )
        merged = infer(
            tiny_llama_dir,
            rows_for((None,)),
            tmp_path / f"{name}-merged",
            *(["--adapter_dir", str(adapters[name])] if name else []),
        )
        for i in range(3):
            text = together[f"{name}-{i}"]["text"]
            assert text == alone[f"{name}-{i}"]["text"] == merged[f"None-{i}"]["text"]
    assert len({together[f"{name}-0"]["text"] for name in ("cardio", None, "onco")}) == 3, (
        "the adapters change the text"
    )


def test_one_adapter_after_the_other_unless_asked(tiny_llama_dir, tmp_path, adapters):
    """A step then reads few of them; the texts do not depend on it."""
    bank, rows = (
        ["--adapters", *(f"{name}={folder}" for name, folder in adapters.items())],
        rows_for(("onco", "cardio")),
    )
    sorted_, arrival = (
        infer(tiny_llama_dir, rows, tmp_path / o, *bank, "--order", o, "--batch_size", "1")
        for o in ("auto", "arrival")
    )
    assert [r["adapter"] for r in sorted_.values()] == ["cardio"] * 3 + ["onco"] * 3
    assert [r["adapter"] for r in arrival.values()] == ["onco", "cardio"] * 3
    assert {k: r["text"] for k, r in sorted_.items()} == {k: r["text"] for k, r in arrival.items()}


def test_adapters_that_do_not_fit_in_memory_are_refused(
    tiny_llama_dir, tmp_path, adapters, monkeypatch, capsys
):
    monkeypatch.setattr("lorabatch.infer.passes.free_bytes", lambda device: 10_000)
    (tmp_path / "p.txt").write_text("a\n", encoding="utf-8")
    flags = infer_flags(tiny_llama_dir, tmp_path / "p.txt", tmp_path / "out")
    assert (
        main([*flags, "--adapters", *(f"{name}={folder}" for name, folder in adapters.items())])
        == 69
    )
    assert "2 adapters take" in (said := capsys.readouterr().err) and "--adapter_dir" in said


def test_what_cannot_be_is_said_in_one_line(tiny_llama_dir, tmp_path, adapters, capsys):
    folder = adapters["cardio"]
    (tmp_path / "p.txt").write_text("a\n", encoding="utf-8")
    flags = infer_flags(tiny_llama_dir, tmp_path / "p.txt", tmp_path / "out")
    for more, code, words in (
        (["--adapters", "cardio"], 64, "is not NAME=DIR"),
        (["--adapters", f"a={folder}", f"a={folder}"], 64, "twice"),
        (["--adapters", f"a={tmp_path / 'none'}"], 65, "no such folder"),
        (["--adapters", f"a={folder}", "--adapter_dir", str(folder)], 64, "not both"),
        (["--adapters", f"a={folder}", "--backend", "hf"], 69, "not on the hf backend"),
    ):
        assert main([*flags, *more, "--overwrite"]) == code
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ("--adapters",),
        ("--adapter_dir", "--backend=hf"),
    ],
    ids=["mixed", "hf"],
)
def test_another_alpha_is_another_adapter(tiny_llama_dir, tmp_path, adapters, flags):
    """It lies in adapter_config.json, beside weights that stay the same."""
    folder = tmp_path / "adapter"
    shutil.copytree(adapters["cardio"], folder)
    named = flags[0] == "--adapters"
    more = [flags[0], f"cardio={folder}" if named else str(folder), *flags[1:]]
    rows = rows_for(("cardio" if named else None,))
    infer(tiny_llama_dir, rows, tmp_path / "run", *more)
    figures = (tmp_path / "run" / "out" / "metrics.json").read_bytes()
    infer(tiny_llama_dir, rows, tmp_path / "run", *more, "--resume")
    assert (tmp_path / "run" / "out" / "metrics.json").read_bytes() == figures, (
        "nothing was left to do, nothing was measured"
    )
    config = read_json(folder / CONFIG_FILE)
    write_json(folder / CONFIG_FILE, config | {"lora_alpha": config["lora_alpha"] * 2})
    with pytest.raises(AssertionError, match="64"):
        infer(tiny_llama_dir, rows, tmp_path / "run", *more, "--resume")


def test_the_model_of_an_openai_line_names_the_adapter(tiny_llama_dir, tmp_path, adapters, capsys):
    bank = ["--adapters", *(f"{name}={folder}" for name, folder in adapters.items())]
    lines = [
        {"custom_id": m, "body": {"model": m, "prompt": "The patient 0 has a fever"}}
        for m in ("cardio", "gpt-any", "onco")
    ]
    found = infer(
        tiny_llama_dir,
        lines,
        tmp_path / "openai",
        *bank,
        "--order",
        "adapter",
        "--output_format",
        "openai",
    )
    assert "model 'gpt-any' (none of --adapters: the base answers)" in capsys.readouterr().out
    ours = infer(tiny_llama_dir, rows_for(("cardio", None, "onco")), tmp_path / "ours", *bank)
    assert {k: (r["adapter"], r["text"]) for k, r in found.items()} == {
        k: (name, ours[f"{name}-0"]["text"])
        for k, name in (("cardio", "cardio"), ("gpt-any", None), ("onco", "onco"))
    }
    written = read_jsonl(tmp_path / "openai" / "out" / "batch_output.jsonl")
    assert [line["response"]["body"]["model"] for line in written] == [
        "cardio",
        str(tiny_llama_dir),
        "onco",
    ]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_all_adapters_as_one_product_are_each_adapters_own(name):
    """What a GPU computes in four calls a layer, whatever the number of adapters."""
    model = native(tiny_model(name), prepack=False)
    shapes = ((4, ("all-linear",)), (7, ("attn",)), (16, ("all-linear",)))
    bank = [random_adapter(model, r=r, targets=t, seed=i) for i, (r, t) in enumerate(shapes)]
    groups = attach_adapters(model.decoder, bank)
    segments = [
        Segment(slot, 0, [5] * n, adapter=adapter)
        for slot, (n, adapter) in enumerate([(2, -1), (3, 0), (1, 1), (4, 2)])
    ]
    groups.set(segments, torch.device("cpu"))
    assert groups.of_row is None, "a CPU's products are cheap to call"
    of_row = torch.tensor([s.adapter for s in segments for _ in s.token_ids])[:, None]
    for layer in model.decoder.linears():
        x = random(10, layer.in_features, seed=layer.out_features)
        expected = layer.product.forward(x, layer.bias)
        base = layer.product.base.forward(x, layer.bias)
        stack = Stack(layer, bank, model.decoder.embedding)
        for number, part, a, b in stack.pairs:
            assert all(map(torch.equal, (a, b), bank[number].scaled(part.path)))
        got = stack.add(base.clone(), x, of_row)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(got[:2], base[:2]) and (got[2:5] - base[2:5]).abs().max() > 0.1


def test_one_product_serves_where_calls_cost_more_than_products():
    """On GPUs, unless each adapter has many rows; the meta device stands for one."""
    gpu, groups = torch.device("meta"), RowGroups(stacked=True)
    few = [Segment(0, 0, [1] * 3, adapter=0), Segment(1, 0, [1], adapter=2)]
    groups.set(few, gpu)
    assert groups.of_row.shape == (4, 1) and groups.spans == [(0, slice(0, 3)), (2, slice(3, 4))]
    groups.set([Segment(0, 0, [1] * 300, adapter=0), Segment(1, 0, [1] * 300, adapter=2)], gpu)
    assert groups.of_row is None
    groups.set([Segment(0, 0, [1] * 5)], gpu)
    assert groups.of_row is None and not groups.spans, "nobody has an adapter"
