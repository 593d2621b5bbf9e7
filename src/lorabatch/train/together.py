"""Gradients of several runs over one frozen base: their blocks go through the model side by side.

Base products, norms and activations see the rows of all runs at once; each run's low-rank products, dropout and loss see its own.
Attention is per document. A row of a product does not depend on how many others there are (``model/linear.py``), and each run's
blocks are those it would have alone, in the same order: what it learns is what it would learn alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lorabatch.corpus.packing import share
from lorabatch.model.device import out_of_memory
from lorabatch.model.loss import LossTerms
from lorabatch.model.native import NativeModel, Share
from lorabatch.train.evaluate import blocks_of
from lorabatch.train.loop import Gradients, Lane
from lorabatch.train.planner import halved
from lorabatch.train.state import Learner


def together(model: NativeModel, terms: Mapping[Learner, LossTerms]) -> Gradients:
    """Gradients of all runs that ask. Passes are filled up to ``block_tokens`` of the learners, which all have the same."""
    dropout = {learner: torch.Generator(learner.adapters.flat.device) for learner in terms}

    def gradients(lanes: Sequence[Lane]) -> list[float]:
        model.train()
        while True:
            for lane in lanes:
                dropout[lane.learner].manual_seed(lane.learner.dropout_seed())
                lane.learner.adapters.zero_grad()
            try:
                return _loss_sums(lanes, model, terms, dropout)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                documents = [d for lane in lanes for d in lane.documents or ()]
                smaller = halved(lanes[0].learner.block_tokens, documents, error)
                for learner in terms:
                    learner.block_tokens = smaller

    return gradients


def _loss_sums(
    lanes: Sequence[Lane], model: NativeModel, terms: Mapping[Learner, LossTerms], dropout: Mapping[Learner, torch.Generator]
) -> list[float]:
    capacity = lanes[0].learner.block_tokens
    blocks = [list(blocks_of(lane.documents or (), capacity)) for lane in lanes]
    sums = [torch.zeros(()) for _ in lanes]
    for places in share([[sum(map(len, token_ids)) for token_ids, _ in each] for each in blocks], capacity):
        learners = [lanes[run].learner for run, _ in places]
        shares = [
            Share(*blocks[run][number], learner.adapters, terms[learner], dropout[learner])
            for (run, number), learner in zip(places, learners, strict=True)
        ]
        losses = model.shared_loss_sums(shares)
        torch.stack([loss * learner.scale for loss, learner in zip(losses, learners, strict=True)]).sum().backward()
        for (run, _), loss in zip(places, losses, strict=True):
            sums[run] = sums[run] + loss.detach().cpu()
    return [float(loss_sum) for loss_sum in sums]
