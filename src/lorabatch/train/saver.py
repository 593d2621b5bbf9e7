"""When a run saves and what it resumes from: checkpoints for itself, adapter folders for everybody
else."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lorabatch.config import TrainConfig
from lorabatch.corpus.packing import epoch_order
from lorabatch.corpus.tokens import TokenCorpus
from lorabatch.errors import UsageError
from lorabatch.metrics.statistics import summary
from lorabatch.model.backend import Backend
from lorabatch.model.lora import save_adapter
from lorabatch.records import JsonlWriter
from lorabatch.runs import RunFolder
from lorabatch.schema import Fields, Record
from lorabatch.spans import spanned
from lorabatch.train import checkpoint
from lorabatch.train.batches import blocks_of
from lorabatch.train.state import Trainable, TrainState

SAVE_EVERY_S = 300.0  # without --save_every_steps
LAST_WORDS_S = 2.0  # adapter files and records at the end of a run, over the measured save


def identity_of(
    config: TrainConfig,
    corpus: TokenCorpus,
    validation: TokenCorpus | None,
    *,
    base: str,
    machine: Fields,
    here: Fields,
) -> dict[str, Record]:
    """What must be equal for a run to resume as if it had not stopped: settings and content.

    A difference of circumstances may change the last bits, not the meaning. ``here``: the
    environment block of run.json.
    """
    content = {
        "base": base,
        "training data": _corpus_digest(corpus),
        "validation data": _corpus_digest(validation) if validation else None,
        "packing plan": _plan_digest(corpus, config),
        "dtype": machine["dtype"],
        "backend": machine["backend"],
    }
    device = machine["device"].split(":")[0]
    circumstances = {
        "threads": machine["threads"],
        "ranks": machine["ranks"],
        "device": device,
        "cpu": here["cpu"],
    }
    circumstances |= {"kernels": machine["kernel_variant"] or "none"}
    return {
        "settings": config.fixed(),
        "content": content,
        "circumstances": circumstances | here["packages"],
    }


def _corpus_digest(corpus: TokenCorpus) -> str:
    digest = hashlib.sha256()
    for document in corpus.documents:
        digest.update(f"{document.num_tokens} {document.targets} ".encode())
        digest.update(document.token_ids.tobytes())
    digest.update(repr(corpus.parts).encode() if corpus.parts else b"")
    return digest.hexdigest()


def _plan_digest(corpus: TokenCorpus, config: TrainConfig) -> str:
    """The first epoch's order and the blocks of its first steps: what would differ if the code that
    plans had changed."""
    order = epoch_order(len(corpus.documents), seed=config.seed, epoch=0, parts=corpus.parts)
    per_step = config.batch_size * config.grad_accum_steps
    first = [corpus.documents[i] for i in order[: 8 * per_step]]
    steps = [first[i : i + per_step] for i in range(0, len(first), per_step)]
    blocks = [
        [[len(ids) for ids in token_ids] for token_ids, _ in blocks_of(step, config.block_tokens)]
        for step in steps
    ]
    return hashlib.sha256(json.dumps([order, blocks]).encode()).hexdigest()


def check_same_run(
    found: checkpoint.Checkpoint, identity: Mapping[str, Fields], *, anyway: bool
) -> None:
    """UsageError if the checkpoint is of another run, unless it is to be resumed ``anyway``; says
    what else has changed since."""
    saved = found.state["identity"]
    changes = [
        d
        for part in ("content", "settings")
        for d in checkpoint.differences(saved[part], identity[part])
    ]
    if changes and not anyway:
        raise UsageError(
            f"was saved by a run with other settings ({'; '.join(changes)})",
            where=found.path,
            fix=(
                "use the same ones, restart with --overwrite, or add --resume_anyway to continue "
                "with the new ones"
            ),
        )
    if changes:
        print(
            f"resuming anyway: {'; '.join(changes)}: the result is not that of one "
            "uninterrupted run",
            file=sys.stderr,
        )
    for change in checkpoint.differences(saved["circumstances"], identity["circumstances"]):
        print(
            f"note: {change} since the checkpoint: the last bits of the result may differ",
            file=sys.stderr,
        )


class Saver:
    """Writes checkpoints when they are due, ``last/`` and ``best/``, and at the root the best
    adapter (the last one without evaluation)."""

    def __init__(
        self,
        run: RunFolder,
        config: TrainConfig,
        identity: Fields,
        trainable: Trainable,
        model: Backend,
        base_name: str,
        *,
        writes: bool,
    ) -> None:
        self._run, self._config, self._identity, self._trainable = run, config, identity, trainable
        self._writes = writes  # the first rank does
        self._model, self._base_name = model, base_name
        self._folder = run.path / "checkpoints"
        self.events: JsonlWriter | None = None
        self.root = "last"
        self.seconds = 0.0  # in all kinds of saves
        self._saves: list[checkpoint.Saved] = []
        self._saved_step: int | None = None
        self._saved_at_s = time.perf_counter()
        self._resumed_step: int | None = None

    # Resuming

    def resume(self, found: checkpoint.Checkpoint | None) -> None:
        """Put the run where the checkpoint was, which ``check_same_run`` has passed."""
        if found is None:
            if self._config.resume:
                print("no checkpoint yet: starting at step 0")
            (self._run.path / "events.jsonl").unlink(missing_ok=True)
            return
        self._trainable.restore(found.state["learner"], found.tensors)
        state = self._trainable.state
        ours = found.path.resolve().parent == self._folder.resolve()
        if ours:
            checkpoint.discard_after(self._folder, found.step)
            self._rewind_events(int(found.state["events_bytes"]))
            self._saved_step = found.step
        if state.best_weights is not None:  # best/ may be of a step that is to be done again
            self.save_adapter(best=True, flat=state.best_weights)
        else:
            shutil.rmtree(self._run.path / "best", ignore_errors=True)
        self._resumed_step = found.step
        self._run.save(
            resumed=[
                *self._run.record.get("resumed", []),
                {"step": found.step, "from": str(found.path)},
            ]
        )
        loss = "" if state.last_loss is None else f", last loss {state.last_loss:.4f}"
        print(f"resuming from {found.path} (step {found.step}{loss})")

    def _rewind_events(self, num_bytes: int) -> None:
        """Cut the records of steps that will be done again, so that each step is recorded once."""
        path = self._run.path / "events.jsonl"
        size = path.stat().st_size if path.exists() else 0
        if size < num_bytes:
            print(
                f"warning: {path} has lost records of steps before the checkpoint", file=sys.stderr
            )
        elif size > num_bytes:
            with path.open("rb+") as file:
                file.truncate(num_bytes)

    # Saving

    def at_boundary(self, state: TrainState, last: bool) -> None:
        """Save a checkpoint if one is due: at the start (a full disk shows before the work), by
        steps or minutes, at the end."""
        if not self._writes or not (last or self._is_due(state)):
            return
        assert self.events is not None
        content = {
            "learner": self._trainable.record(),
            "identity": self._identity,
            "events_bytes": self.events.sync(),
            "config": self._config.to_dict(),
            "run_id": self._run.record["run_id"],
        }
        saved = checkpoint.write(
            self._folder,
            state.step,
            content,
            self._trainable.tensors(),
            keep=self._config.keep_checkpoints,
        )
        self._saves.append(saved)
        self.seconds += saved.seconds
        self._saved_step, self._saved_at_s = state.step, time.perf_counter()
        self.events.write(
            {
                "event": "checkpoint",
                "step": state.step,
                "save_s": saved.seconds,
                "bytes": saved.num_bytes,
            }
        )

    def _is_due(self, state: TrainState) -> bool:
        if self._saved_step == state.step:
            return False
        every = self._config.save_every_steps
        if every:
            return state.step % every == 0
        late = time.perf_counter() - self._saved_at_s >= SAVE_EVERY_S
        return state.step == 0 or late or state.step == state.last_eval_step

    def needed_s(self) -> float:
        """Seconds before the end at which the loop must stop: two of the recent steps and saves,
        and the last words."""
        step_s = max(self._trainable.state.step_ms[-20:], default=0.0) / 1e3
        save_s = max((s.seconds for s in self._saves[-5:]), default=0.0)
        return 2 * (step_s + save_s) + LAST_WORDS_S

    @spanned("save")
    def save_adapter(self, *, best: bool, flat: Tensor | None = None) -> None:
        """Write the adapter as it is now, or as ``flat`` [num_params] has it, in peft's format."""
        start = time.perf_counter()
        if best:
            self.root = "best"
        if not self._writes:
            return
        folders = (
            ([] if flat is not None else ["last"])
            + (["best"] if best else [])
            + (["."] if best or self.root == "last" else [])
        )
        weights = self._trainable.adapters.weights(flat)
        for folder in folders:
            save_adapter(
                Path(self._run.path / folder),
                weights,
                base_name=self._base_name,
                base_fingerprint=self._model.base_fingerprint,
                fan_in_fan_out=self._model.fan_in_fan_out,
            )
        self.seconds += time.perf_counter() - start

    def figures(self) -> Record:
        """Fields of ``TrainMetrics``."""
        return {
            "checkpoints": len(self._saves),
            "checkpoint_bytes": self._saves[-1].num_bytes if self._saves else None,
            "checkpoint_s": summary(s.seconds for s in self._saves),
            "resumed_step": self._resumed_step,
        }
