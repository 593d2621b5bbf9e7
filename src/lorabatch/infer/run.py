"""``lorabatch infer``: read and check the prompts, load, generate, record each completion as it ends."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from lorabatch import hub
from lorabatch.config import InferConfig
from lorabatch.errors import DataError, InterruptedRun, LorabatchError, UsageError
from lorabatch.infer.requests import Request, completion_record, in_input_order, prepare, read_requests
from lorabatch.measure.environment import environment, gpu_description
from lorabatch.measure.statistics import percentile, rate, summary
from lorabatch.measure.system import SystemSampler, peak_memory_bytes
from lorabatch.progress import Progress
from lorabatch.records import JsonlWriter, RunFolder, dumps, read_jsonl, write_json
from lorabatch.signals import StopSignals


def default_output_dir(config: InferConfig) -> Path:
    model = Path(config.adapter_dir or config.base_model).name.removesuffix(".gguf")
    return Path("results") / f"infer-{model}-{datetime.now():%Y%m%d-%H%M%S}"


def run_inference(config: InferConfig, command: list[str]) -> int:
    """Returns the exit code; raises LorabatchError for what the user can mend."""
    hub.prepare_environment()
    if config.resume and not config.output_dir:
        raise UsageError("needs to know which run", where="--resume", fix="name it with --output_dir")
    requests, ignored = read_requests(Path(config.prompts), config)
    if ignored:
        print(f"ignored fields of the prompts: {', '.join(sorted(ignored))}")
    adapter_dir = Path(config.adapter_dir) if config.adapter_dir and config.adapter_dir != "none" else None
    if adapter_dir is not None and not adapter_dir.is_dir():
        raise DataError("no such folder", where=f"--adapter_dir {adapter_dir}", fix="train first, or leave the flag out for the base model")
    source = hub.find_model(config.base_model)
    output_dir = Path(config.output_dir) if config.output_dir else default_output_dir(config)
    run = RunFolder.create(
        output_dir,
        kind="infer",
        config=config.to_dict(),
        command=command,
        environment=environment(),
        folder_flag="--output_dir",
        overwrite=config.overwrite,
        resume=config.resume,
    )
    try:
        with StopSignals() as signals:
            failed, total = _infer(run, config, source, adapter_dir, requests, signals)
            if signals.received:
                raise InterruptedRun(
                    f"stopped by {signals.received.name}; finished requests are saved",
                    where=output_dir,
                    fix="run the same command with --resume and this --output_dir to go on",
                )
        if failed == total:
            raise DataError(f"all {total} requests failed", where=output_dir / "completions.jsonl", fix="see the 'error' of its lines")
        run.finish("completed", failed=failed)
        return 0
    except BaseException as error:
        status = "interrupted" if isinstance(error, (InterruptedRun, KeyboardInterrupt)) else "failed"
        run.finish(status, error=str(error) if isinstance(error, LorabatchError) else repr(error))
        raise


def _infer(
    run: RunFolder, config: InferConfig, source: hub.ModelSource, adapter_dir: Path | None, requests: list[Request], signals: StopSignals
) -> tuple[int, int]:
    """(failed, all) requests of this run, earlier finished ones included."""
    started = time.perf_counter()
    with SystemSampler(run.path / "system.jsonl") as sampler:
        from lorabatch.model import load
        from lorabatch.model.device import TYPE_NAMES, choose_device, choose_dtype, choose_threads

        device = choose_device(no_cuda=config.no_cuda)
        threads = choose_threads(config.threads)
        dtype = choose_dtype(config.dtype, device)
        tokenizer = load.load_tokenizer(source.path)
        model_config = load.load_config(source.path)
        model = load.load_model(source, model_config, backend=config.backend, dtype=dtype, device=device, adapter_dir=adapter_dir)
        limit = min(model.max_positions, config.max_len or model.max_positions)
        prepare(requests, tokenizer, limit=limit, long_prompt=config.long_prompt)
        model_key = f"{source.name} {model.base_fingerprint or source.revision} {_adapter_key(model, adapter_dir)} {TYPE_NAMES[dtype]}"
        keys = {r.id: r.key(model_key) for r in requests}
        done = _finished(run.path / "completions.jsonl", keys, overwrite=config.overwrite)
        work = [r for r in requests if r.error is None and r.id not in done]
        adapter_name = str(adapter_dir) if adapter_dir else None
        run.save(
            model={"name": source.name, "revision": source.revision, "fingerprint": model.base_fingerprint, "adapter": adapter_name},
            device=str(device),
            dtype=TYPE_NAMES[dtype],
            threads=threads,
            backend=model.backend,
            gpu=gpu_description(),
        )
        engine, num_slots = _engine(model, tokenizer, load.end_tokens(source.path, model_config, tokenizer), config, work)
        print(
            f"base {source.name} ({TYPE_NAMES[dtype]} on {device}, {threads} threads), "
            f"adapter {adapter_name or 'none'}{' merged' if adapter_name else ''}; {len(work)} requests, {num_slots} at once"
            + (f", {len(done)} finished earlier" if done else "")
        )
        if config.iters > 1 and work:
            _warm_up(engine, work, num_slots)
        startup_s = time.perf_counter() - started
        progress = Progress(len(requests) * config.iters, unit="request", description="infer", done=len(done))
        with run.jsonl("completions.jsonl") as sink:
            for request in requests:
                if request.error is not None and request.id not in done:
                    sink.write(completion_record(request, key=keys[request.id], adapter=adapter_name))
                    progress.update()
            passes = _passes(engine, work, config, sink, keys, adapter_name, progress, signals)
        progress.close()
    if config.output_order == "input":
        _sort_file(run.path / "completions.jsonl")
    failed = sum(r.error is not None for r in requests)
    metrics = (
        _metrics(passes, model, failed=failed, startup_s=startup_s, config=config, device=device, dtype=dtype, slots=num_slots)
        | sampler.summary()
    )
    write_json(run.path / "metrics.json", metrics)
    _print_table(metrics, run.path, failed, len(requests))
    return failed, len(requests)


def _adapter_key(model: Any, adapter_dir: Path | None) -> str:
    """Identity of the adapter by content."""
    if adapter_dir is None:
        return "base"
    if model.adapter is not None:
        return str(model.adapter.digest())
    return hub.file_sha256(adapter_dir / "adapter_model.safetensors")


def _finished(path: Path, keys: Mapping[str, str], *, overwrite: bool) -> set[str]:
    """Ids of the requests that an earlier run of the same work has finished. UsageError if it was other work."""
    if overwrite:
        return set()
    done = set()
    for record in read_jsonl(path):
        if keys.get(record["id"]) != record["key"]:
            raise UsageError(
                f"completion '{record['id']}' was made with another prompt, parameters, model or adapter",
                where=path,
                fix="choose another --output_dir, or --overwrite",
            )
        done.add(record["id"])
    return done


def _engine(model: Any, tokenizer: Any, eos_ids: frozenset[int], config: InferConfig, work: Sequence[Request]) -> tuple[Any, int]:
    """The engine, and how many requests it runs at once (fewer than asked where the cache would not fit)."""
    from lorabatch.infer.engine import Engine

    num_slots = max(1, min(config.batch_size, len(work)))
    capacity = max((len(r.token_ids) + r.max_new_tokens for r in work), default=1)
    if model.backend == "hf":
        runner = model.runner(num_slots=num_slots, capacity=capacity)
    else:
        from lorabatch.infer.runner import NativeRunner

        slot_bytes = capacity * model.spec.kv_elements_per_token * model.decoder.embedding.element_size()
        while num_slots > 1 and num_slots * slot_bytes > 0.7 * _free_bytes(model.decoder.device):
            num_slots = (num_slots + 1) // 2
            print(f"the KV cache of that many requests does not fit in memory: {num_slots} at once")
        runner = NativeRunner(model, num_slots=num_slots, capacity=capacity)
    return Engine(runner, tokenizer, eos_ids, max_running=num_slots, prefill_tokens=config.prefill_tokens), num_slots


def _free_bytes(device: Any) -> int:
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def _warm_up(engine: Any, work: Sequence[Request], num_slots: int) -> None:
    """A short pass that is not measured: packed weights, allocator and caches are warm afterwards."""
    requests = [r.restarted() for r in work[:num_slots]]
    for request in requests:
        request.max_new_tokens = min(4, request.max_new_tokens)
    engine.run(requests, lambda request: None)


def _passes(
    engine: Any,
    work: Sequence[Request],
    config: InferConfig,
    sink: JsonlWriter,
    keys: Mapping[str, str],
    adapter: str | None,
    progress: Progress,
    signals: StopSignals,
) -> list[tuple[Any, list[Request]]]:
    """All measured repetitions as (stats, finished requests). The first one writes the completions."""
    passes: list[tuple[Any, list[Request]]] = []
    for repetition in range(config.iters):
        finished: list[Request] = []
        tokens, start = 0, time.perf_counter()

        def on_finish(request: Request, first: bool = repetition == 0, finished: list[Request] = finished, start: float = start) -> None:
            nonlocal tokens
            finished.append(request)
            tokens += len(request.output_ids)
            if first:
                sink.write(completion_record(request, key=keys[request.id], adapter=adapter))
            progress.update(tokens_per_s=f"{tokens / (time.perf_counter() - start):.0f}")

        stats = engine.run([r.restarted() for r in work], on_finish, stop_requested=lambda: bool(signals))
        passes.append((stats, finished))
        if signals:
            break
    return passes


def _sort_file(path: Path) -> None:
    temporary = path.with_name(f".{path.name}.sorted")
    temporary.write_text("".join(dumps(r) + "\n" for r in in_input_order(read_jsonl(path))), encoding="utf-8")
    temporary.replace(path)


def _metrics(
    passes: Sequence[tuple[Any, list[Request]]],
    model: Any,
    *,
    failed: int,
    startup_s: float,
    config: InferConfig,
    device: Any,
    dtype: Any,
    slots: int,
) -> dict[str, Any]:
    """``metrics.json``: counts and times are sums over all measured repetitions, latencies are pooled."""
    finished = [r for _, requests in passes for r in requests]
    duration = sum(stats.duration_s for stats, _ in passes)
    total_in, total_out = sum(len(r.token_ids) for r in finished), sum(len(r.output_ids) for r in finished)
    e2el = [(r.last_token_s - r.submitted_s) * 1e3 for r in finished]
    ttft = [(r.first_token_s - r.submitted_s) * 1e3 for r in finished]
    tpot = [(r.last_token_s - r.first_token_s) * 1e3 / (len(r.output_ids) - 1) for r in finished if len(r.output_ids) > 1]
    batches = max(1, -(-len(passes[0][1]) // config.batch_size)) if passes else 1
    batch_ms = [stats.duration_s * 1e3 / batches for stats, requests in passes if requests]
    mbu, ceiling = _mbu(passes, model, device, dtype)
    decode_steps = sum(stats.decode_steps for stats, _ in passes)
    decode_tokens = sum(stats.decode_tokens for stats, _ in passes)
    return {
        "schema_version": 1,
        "kind": "infer",
        "iterations": len(passes),
        "duration_s": duration,
        "startup_s": startup_s,
        "completed": len(finished),
        "failed": failed,
        "total_input_tokens": total_in,
        "total_output_tokens": total_out,
        "request_throughput": rate(len(finished), duration),
        "output_throughput": rate(total_out, duration),
        "total_token_throughput": rate(total_in + total_out, duration),
        "tokens_per_s": rate(total_out, duration),
        "tokens_per_s_including_startup": rate(total_out, duration + startup_s),
        **summary("queue_ms", [(r.started_s - r.submitted_s) * 1e3 for r in finished]),
        **summary("ttft_ms", ttft),
        **summary("tpot_ms", tpot),
        **summary("itl_ms", [gap * 1e3 for stats, _ in passes for gap in stats.gaps_s]),
        **summary("e2el_ms", e2el),
        "batch_latency_p50_ms": percentile(batch_ms, 50),
        "batch_latency_p95_ms": percentile(batch_ms, 95),
        "max_running": slots,
        "mean_running": rate(decode_tokens, decode_steps),
        "prefill_s": sum(stats.prefill_s for stats, _ in passes),
        "decode_s": sum(stats.decode_s for stats, _ in passes),
        "prefill_tokens_per_s": rate(sum(s.prefill_tokens for s, _ in passes), sum(s.prefill_s for s, _ in passes)),
        "decode_tokens_per_s": rate(decode_tokens, sum(s.decode_s for s, _ in passes)),
        "decode_steps": decode_steps,
        "mbu": mbu,
        "measured_bytes_per_s": ceiling,
        "peak_memory_bytes": peak_memory_bytes() if device.type == "cpu" else _gpu_peak_bytes(),
    }


def _gpu_peak_bytes() -> int:
    import torch

    return int(torch.cuda.max_memory_allocated())


def _mbu(passes: Sequence[tuple[Any, list[Request]]], model: Any, device: Any, dtype: Any) -> tuple[float | None, float | None]:
    """Bytes that decoding had to read, over what memory could have delivered in that time."""
    seconds = sum(stats.decode_s for stats, _ in passes)
    if model.spec is None or not seconds:
        return None, None
    from lorabatch.measure.machine import measured_bytes_per_s
    from lorabatch.measure.roofline import decode_bytes

    needed = decode_bytes(
        model.spec,
        steps=sum(s.decode_steps for s, _ in passes),
        kv_tokens=sum(s.decode_kv_tokens for s, _ in passes),
        element_bytes=dtype.itemsize,
    )
    ceiling = measured_bytes_per_s(device)
    return needed / seconds / ceiling, ceiling


def _print_table(metrics: Mapping[str, Any], path: Path, failed: int, total: int) -> None:
    def shown(name: str, form: str = "{:.1f}") -> str:
        return "not measured" if metrics[name] is None else form.format(metrics[name])

    rows = [
        ("requests", f"{metrics['completed']} completed, {failed} failed of {total}"),
        (
            "output tokens/s",
            f"{shown('tokens_per_s', '{:.0f}')}  ({shown('tokens_per_s_including_startup', '{:.0f}')} with {metrics['startup_s']:.1f} s of start-up)",
        ),
        ("time to first token p50 / p95", f"{shown('p50_ttft_ms')} / {shown('p95_ttft_ms')} ms (queue included)"),
        ("time per output token p50 / p95", f"{shown('p50_tpot_ms')} / {shown('p95_tpot_ms')} ms"),
        (
            "batch latency p50 / p95",
            f"{shown('batch_latency_p50_ms')} / {shown('batch_latency_p95_ms')} ms over {metrics['iterations']} repetitions",
        ),
        ("peak memory", f"{metrics['peak_memory_bytes'] / 2**30:.2f} GiB"),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"  {name:<{width}}  {value}" for name, value in rows))
    print(f"completions: {path / 'completions.jsonl'}")
