"""``bench infer``: batch sizes against the ceiling, and the quality of int8."""

import json
import math

import pytest
import torch
from support.models import VOCAB, native, tiny_model, tiny_tokenizer, variant_config

from lorabatch.bench.infer import ceiling_seconds
from lorabatch.cli import main
from lorabatch.infer.runners.program import unsupported
from lorabatch.model.spec import spec_from_config


def test_bench_infer_holds_each_batch_size_against_the_ceiling(
    tiny_llama_dir, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("LORABATCH_CEILINGS", str(tmp_path))
    output = tmp_path / "new" / "bench.json"
    sizes = [
        "--batch_sizes",
        "1",
        "3",
        "--repeats",
        "2",
        "--input_tokens",
        "5",
        "--max_new_tokens",
        "4",
        "--dtype",
        "fp32",
    ]
    assert (
        main(
            ["bench", "infer", "--base_model", str(tiny_llama_dir), *sizes, "--output", str(output)]
        )
        == 0
    )
    record = json.loads(output.read_text())
    table = capsys.readouterr().out
    assert [point["batch_size"] for point in record["points"]] == [1, 3] and record["config"][
        "repeats"
    ] == 2
    assert (
        record["knee"] is None
        and "too few values" in record["no_conclusion"]
        and record["no_conclusion"] in table
    )
    for point in record["points"]:
        rates, times = point["tokens_per_s"]["values"], point["batch_latency_ms"]["values"]
        assert (
            rates == pytest.approx([point["batch_size"] * 4 / ms * 1e3 for ms in times])
            and len(rates) == 2
        )
        assert point["share_of_ceiling"] == pytest.approx(
            point["tokens_per_s"]["median"] / point["ceiling_tokens_per_s"]
        )
        assert f"{point['ceiling_tokens_per_s']:.0f}" in table
    assert (
        main(
            [
                "bench",
                "infer",
                "--base_model",
                str(tiny_llama_dir),
                *sizes,
                "--threads_sweep",
                "1",
                "2",
                "--output",
                str(output),
            ]
        )
        == 0
    )
    record = json.loads(output.read_text())
    assert [point["threads"] for point in record["points"]] == [1, 2] and record[
        "serial_share"
    ] is None
    assert torch.get_num_threads() == record["threads"], "as before"
    assert main(["report", str(output), "--output_dir", str(tmp_path / "report")]) == 0
    assert (
        main(["bench", "infer", "--base_model", str(tiny_llama_dir), "--input_tokens", "200"]) == 64
    )
    assert main(["bench", "infer", "--batch_sizes", "0"]) == 64


def test_ceiling_by_hand():
    spec = spec_from_config(variant_config("llama"))
    head, params, kv = 64 * VOCAB, spec.num_matmul_params, spec.kv_elements_per_token
    prefill = 2 * 10 * ((params - head) * 5 + head)
    # arithmetic is all that takes time
    seconds, bound = ceiling_seconds(spec, 10, 5, 3, (1.0, 1e12), (4, 2))
    assert (bound, seconds) == ("compute", pytest.approx(prefill + 2 * 2 * 10 * params))
    seconds, bound = ceiling_seconds(spec, 10, 5, 3, (1e15, 1.0), (4, 2))  # memory is
    assert (bound, seconds) == (
        "memory",
        pytest.approx(4 * params + 4 * 2 * params + 2 * 10 * (5 + 6) * kv),
    )


def test_quality_of_int8_is_measured_on_the_true_tokens(tiny_llama_dir, tmp_path, capsys):
    reference = native(tiny_model("llama"))
    if why := unsupported(reference.spec, torch.float32, torch.device("cpu")):
        pytest.skip(why)
    texts = ["The patient has a fever and a cough.", "O paciente tem febre; a pressão está alta."]
    (tmp_path / "d.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    command = [
        "bench",
        "infer",
        "--base_model",
        tiny_llama_dir,
        "--quality",
        tmp_path / "d.txt",
        "--dtype",
        "fp32",
    ]
    assert main([*map(str, command), "--output", str(tmp_path / "q.json")]) == 0
    record = json.loads((tmp_path / "q.json").read_text())
    ids = [torch.tensor(tiny_tokenizer()(text)["input_ids"]) for text in texts]
    with torch.no_grad():
        nll = float(reference.loss_sum(ids, [1, 1]))
    assert record["bits_per_byte"] == pytest.approx(nll / math.log(2) / record["bytes"], rel=1e-4)
    assert record["tokens"] == sum(len(i) - 1 for i in ids) and record["documents"] == 2
    assert 0 < abs(record["int8_bits_per_byte"] / record["bits_per_byte"] - 1) < 0.05
    assert (
        0.5 < record["greedy_agreement"] <= 1
        and f"{record['greedy_agreement']:.2%}" in capsys.readouterr().out
    )
