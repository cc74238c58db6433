"""How well a model predicts held-out text: nats a token, bits a byte.

Shapes: B rows, S sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from llmfoundry import runtime
from llmfoundry.data.loader import Loader
from llmfoundry.data.rows import IGNORE


class Perplexity(NamedTuple):
    """The cost of a text under a model."""

    nats_per_token: float  # end-of-text tokens included
    bits_per_byte: float | None  # over the UTF-8 bytes of the whole text; None if only a part was read
    tokens: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Loader,
    *,
    rows: int,
    device: torch.device,
    max_batches: int = -1,
    rank: int = 0,
    world: int = 1,
    stopped: Callable[[], bool] = lambda: False,
) -> Perplexity | None:
    """Cost of one pass over the loader's text.

    Args:
        model: a `CausalLM`, sharded or not; every rank calls this.
        rows: rows of one forward on one rank.
        max_batches: stop after so many; -1 reads all.
        rank: this process's share of the rows, of `world`.
        stopped: asked before every batch, with the same answer on every rank; true ends the pass.

    Returns:
        The same on every rank; None if it was stopped.
    """
    nats = torch.zeros((), dtype=torch.float64, device=device)
    tokens = torch.zeros((), dtype=torch.float64, device=device)
    complete = loader.limit is None or loader.limit >= loader.n_rows
    for i, batch in enumerate(loader.one_pass(rows * world, rank, world, limit=loader.limit)):
        if stopped():
            return None
        if i == max_batches:
            complete = False
            break
        batch = batch.to(device)
        nats += model(batch.tokens, batch.labels, sequence_ids=batch.sequence_ids, positions=batch.positions).loss_sum
        tokens += (batch.labels != IGNORE).sum()
    runtime.all_reduce_sum(nats)
    runtime.all_reduce_sum(tokens)
    return Perplexity(
        nats_per_token=(nats / tokens).item(),
        bits_per_byte=nats.item() / math.log(2) / loader.n_bytes if complete and loader.n_bytes else None,
        tokens=int(tokens.item()),
    )
