"""What a profile means, in plain language: where the time went, how far from the machine's limit,
what to change first. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from lorabatch.schema import Fields

# start-up: a profile is short, so its share says nothing
ONCE = ("outside spans", "read data", "tokenise", "load")
# nor does the share of what a short training does as often as a long one
BESIDES = {"evaluate": "an evaluation", "save": "a save"}
# rows below which a product uses each weight too seldom (lorabatch bench machine shows the rates)
FEW_ROWS = 512
ENOUGH_AT_ONCE = 64  # requests whose decoding reads the weights seldom enough
WORTH_SAYING = 0.05  # of the work
REST = "torch and Python"

Seconds = Mapping[str, float]


@dataclass(frozen=True)
class Facts:
    """phases, calls: seconds and number of each span; inside: of a phase, seconds by kind of
    operation (empty where the kernels run asynchronously or are not ours); record, metrics:
    run.json and metrics.json; able: of bf16 and int8, what this processor has.
    """

    kind: str
    phases: Seconds
    calls: Mapping[str, int]
    inside: Mapping[str, Seconds]
    record: Fields
    metrics: Fields
    able: frozenset[str]

    @property
    def work(self) -> dict[str, float]:
        """Phases of the steps, largest first."""
        found = {
            name: s for name, s in self.phases.items() if name not in ONCE and name not in BESIDES
        }
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    @property
    def work_s(self) -> float:
        return sum(self.work.values())

    @property
    def tokens_per_step(self) -> float:
        return float(self.metrics.get("total_tokens") or 0) / (self.metrics.get("steps") or 1)

    def share(self, phase: str) -> float:
        return self.phases.get(phase, 0.0) / self.work_s

    def part(self, operation: str) -> float:
        """Share of one kind of operation in the work, all phases together."""
        return (
            sum(self.inside.get(phase, {}).get(operation, 0.0) for phase in self.work) / self.work_s
        )


def explain(facts: Facts) -> list[str]:
    steps = facts.calls.get("step", 0)
    if not steps or not facts.work_s:
        return ["no step was made: nothing to explain"]
    once = sum(facts.phases.get(name, 0.0) for name in ONCE)
    lines = [_headline(facts, steps)]
    lines += [_phase(facts, name) for name in facts.work if facts.share(name) >= 0.005]
    besides = [
        f"{what} {facts.phases[n] / facts.calls[n]:.2f} s ({facts.calls[n]} times)"
        for n, what in BESIDES.items()
        if facts.calls.get(n)
    ]
    lines += [f"besides: {', '.join(besides)}"] if besides else []
    lines.append(
        f"start-up{' and first steps' if facts.kind == 'train' else ''}: {once:.1f} s, paid once "
        "per process"
    )
    lines += _ceiling(facts)
    worth = sorted(
        (advice for advice in _advice(facts) if advice[0] >= WORTH_SAYING), reverse=True
    )[:2]
    if not worth:
        return [*lines, "what to change first: nothing in these figures asks for a change"]
    return [
        *lines,
        "what to change first:",
        *(f"  {i}. {text}" for i, (_, text) in enumerate(worth, 1)),
    ]


def _headline(facts: Facts, steps: int) -> str:
    record, config = facts.record, facts.record.get("config", {})
    precision = (
        record.get("dtype")
        if config.get("quantize", "none") == "none"
        else f"{config['quantize']} weights"
    )
    where = (
        f"{precision} on {record.get('device')}, {record.get('threads')} threads; profiling slows "
        "it"
    )
    if facts.kind == "train":
        return (
            f"{steps} optimiser steps of {facts.tokens_per_step:.0f} tokens, "
            f"{facts.work_s / steps:.2f} s each ({where}):"
        )
    return f"{steps} steps of the engine, {facts.work_s:.2f} s in all ({where}):"


def _phase(facts: Facts, name: str) -> str:
    """One phase with its share, and what inside it took the time."""
    seconds = facts.phases[name]
    line = f"  {name:13}{seconds:8.2f} s {facts.share(name):5.0%}"
    inside = dict(facts.inside.get(name, {}))
    if not inside:
        return line
    inside[REST] = max(0.0, seconds - sum(inside.values()))
    ordered = sorted(inside.items(), key=lambda item: -item[1])
    return (
        line
        + "   "
        + ", ".join(f"{what} {s / seconds:.0%}" for what, s in ordered if s >= 0.01 * seconds)
    )


def _ceiling(facts: Facts) -> list[str]:
    share, ceiling, what, unit = {
        "train": ("cold_share", "cold_flops_per_s", "arithmetic of the steps", "Gflop/s"),
        "infer": ("mbu", "measured_bytes_per_s", "memory reads of decode", "GB/s"),
    }[facts.kind]
    kind = " with cold weights" if facts.kind == "train" else ""
    reached, peak = facts.metrics.get(share), facts.metrics.get(ceiling)
    if reached is None or not peak:
        return []
    # the record is of all steps, the first ones too, which are slow
    if facts.kind == "train" and facts.metrics.get("train_s"):
        reached *= (
            facts.metrics["train_s"] / facts.metrics["steps"] / (facts.work_s / facts.calls["step"])
        )
    said = (
        f"{what}: {reached * peak / 1e9:.1f} of {peak / 1e9:.1f} {unit} measured on this machine"
        f"{kind} ({reached:.0%})"
    )
    return [said + (": the ceiling is too low, run lorabatch bench machine" if reached > 1 else "")]


def _advice(facts: Facts) -> Iterator[tuple[float, str]]:
    """(share of the work that it could save, at a rough guess; what to do and why)."""
    record, config = facts.record, facts.record.get("config", {})
    cores = (record.get("environment") or {}).get("usable_cores") or 0
    products = facts.part("products") if facts.inside else 1.0
    if record.get("device") == "cpu" and (record.get("threads") or cores) < cores:
        yield (
            1 - record["threads"] / cores,
            f"--threads {cores}: only {record['threads']} of {cores} usable cores worked",
        )
    if (
        record.get("dtype") == "fp32"
        and "bf16" in facts.able
        and config.get("quantize", "none") == "none"
    ):
        yield (
            products / 2,
            (
                f"--dtype bf16: products take {products:.0%}, and this processor multiplies bf16 "
                "natively"
            ),
        )
    yield from (_training if facts.kind == "train" else _inference)(facts, config, products)


def _training(facts: Facts, config: Fields, products: float) -> Iterator[tuple[float, str]]:
    rows = facts.tokens_per_step
    if rows < FEW_ROWS:
        text = (
            f"more documents per step (--batch_size): products of {rows:.0f} rows use each weight "
            "too seldom"
        )
        yield products * (1 - rows / FEW_ROWS) / 2, text
    elif (
        rows > 2 * config.get("block_tokens", 0) and config.get("block_tokens", FEW_ROWS) < FEW_ROWS
    ):
        yield (
            products / 4,
            (
                f"larger blocks (--block_tokens): products of {config['block_tokens']} rows use "
                "each weight too seldom"
            ),
        )
    adapters, attention = facts.part("adapters"), facts.part("attention")
    yield (
        adapters / 2,
        (
            f"the adapters take {adapters:.0%}: a smaller --lora_r, or fewer layers "
            "(--target_modules attn)"
        ),
    )
    yield (
        attention / 2,
        (
            f"attention takes {attention:.0%}: shorter documents (--max_len), since it grows with "
            "their squared length"
        ),
    )
    updates = facts.share("optimiser")
    yield (
        updates / 2,
        f"the optimiser takes {updates:.0%}: more documents per update (--grad_accum_steps)",
    )


def _inference(facts: Facts, config: Fields, products: float) -> Iterator[tuple[float, str]]:
    mean, slots = facts.metrics.get("mean_running") or 0.0, facts.metrics.get("max_running") or 1
    requests = facts.metrics.get("completed") or 0
    decode, prefill, chosen = (facts.share(name) for name in ("decode", "prefill", "choose token"))
    if 0 < mean < 0.7 * slots:
        yield (
            decode * (1 - mean / slots),
            (
                f"more prompts in one run: {mean:.1f} of {slots} places were taken on average, as "
                "a short file drains"
            ),
        )
    elif slots < ENOUGH_AT_ONCE and requests > slots:
        text = (
            f"more requests at once (--batch_size {2 * slots}): each step reads all weights, for "
            f"{mean:.1f} tokens (lorabatch bench infer)"
        )
        yield decode / 2, text
    if (
        config.get("quantize") == "none"
        and "int8" in facts.able
        and facts.record.get("device") == "cpu"
    ):
        yield (
            products * 0.4,
            (
                f"--quantize int8, nearly exact: products take {products:.0%}, on half the bytes "
                "(bench infer --quality)"
            ),
        )
    if prefill > 0.3:
        yield (
            prefill / 3,
            (
                f"prefill takes {prefill:.0%}: shorter prompts; what they begin with in common is "
                "read once"
            ),
        )
    if config.get("temperature"):
        yield (
            chosen / 2,
            (
                f"choosing tokens takes {chosen:.0%}: greedy (--temperature 0) or fewer filters "
                "cost less"
            ),
        )
