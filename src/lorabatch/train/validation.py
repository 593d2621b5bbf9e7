"""Loss, perplexity and bits per byte as sums over tokens, each supervised token exactly once.

The figures do not depend on how documents are grouped: they are token sums, never means of
batch means.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lorabatch.corpus.tokens import TokenCorpus
from lorabatch.metrics.statistics import bits_per_byte, perplexity
from lorabatch.model.backend import Backend
from lorabatch.schema import Record
from lorabatch.spans import spanned
from lorabatch.train.batches import rank_blocks
from lorabatch.train.ranks import ALONE, Ranks


@dataclass(frozen=True)
class EvalResult:
    loss: float  # mean negative log-likelihood per supervised token, nats
    tokens: int
    seconds: float
    bits_per_byte: float | None

    def record(self) -> Record:
        return {
            "eval_loss": self.loss,
            "perplexity": perplexity(self.loss),
            "bits_per_byte": self.bits_per_byte,
            "eval_tokens": self.tokens,
            "eval_s": self.seconds,
        }


@torch.no_grad()
@spanned("evaluate")
def evaluate(
    model: Backend,
    corpus: TokenCorpus,
    *,
    block_tokens: int,
    stop_requested: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> EvalResult | None:
    """Score a corpus, each rank its share; None if a stop was requested before the end."""
    start = time.perf_counter()
    model.train(False)
    total, stopped = 0.0, False
    for token_ids, targets, counts in rank_blocks(corpus.documents, block_tokens, ranks):
        stopped = stop_requested() and not ranks.even
        if stopped:
            break
        loss = float(model.loss_sum(token_ids, targets))
        total += loss if counts else 0.0
    total, stops = ranks.sum_(torch.tensor([total, stopped], dtype=torch.float64)).tolist()
    if stops:
        return None
    bits = bits_per_byte(total, corpus.target_bytes) if corpus.target_bytes else None
    return EvalResult(
        total / corpus.num_targets, corpus.num_targets, time.perf_counter() - start, bits
    )
