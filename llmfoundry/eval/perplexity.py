"""How well a model predicts held-out text: nats per token, bits per byte.

Shapes: B rows, S sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from llmfoundry import runtime
from llmfoundry.data.loader import Loader
from llmfoundry.data.rows import IGNORE
from llmfoundry.eval.generate import check_ids
from llmfoundry.model.transformer import CausalLM
from llmfoundry.progress import progress


class Perplexity(NamedTuple):
    """The cost of a text under a model."""

    nats_per_token: float  # end-of-text tokens included
    bits_per_byte: float | None  # over the UTF-8 bytes of the whole text; None if only a part was read
    tokens: int


@torch.no_grad()
def evaluate(
    model: CausalLM,
    loader: Loader,
    *,
    rows: int,
    device: torch.device,
    max_batches: int = -1,
    rank: int = 0,
    world: int = 1,
    stopped: Callable[[], bool] = lambda: False,
    bar: bool = False,
) -> Perplexity | None:
    """Cost of one pass over the loader's text.

    Args:
        model: sharded or not; every rank calls this.
        rows: rows of one forward on one rank.
        max_batches: read so many times `rows` rows, over all ranks together; -1 reads all.
        rank: this process's share of the rows, of `world`.
        stopped: asked before every batch, with the same answer on every rank; true ends the pass.
        bar: whether a terminal shows a bar.

    Returns:
        The same on every rank; None if it was stopped.

    Raises:
        ConfigError: a token of the text has no row in the embedding.
    """
    nats = torch.zeros((), dtype=torch.float64, device=device)
    tokens = torch.zeros((), dtype=torch.float64, device=device)
    n_rows = loader.n_rows if loader.limit is None else min(loader.n_rows, loader.limit)
    n_rows = n_rows if max_batches == -1 else min(n_rows, max_batches * rows)
    complete = n_rows == loader.n_rows
    with progress("evaluating", n_rows * loader.max_seq_len, "tokens", bar=bar) as advance:
        for batch in loader.one_pass(rows * world, rank, world, limit=n_rows):
            if stopped():
                return None
            check_ids(int(batch.tokens.max()), model.config.vocab_size)
            batch = batch.to(device)
            out = model(batch.tokens, batch.labels, sequence_ids=batch.sequence_ids, positions=batch.positions)
            nats += out.loss_sum
            tokens += (batch.labels != IGNORE).sum()
            advance(rows * world * loader.max_seq_len)
    runtime.all_reduce_sum(nats)
    runtime.all_reduce_sum(tokens)
    return Perplexity(
        nats_per_token=(nats / tokens).item(),
        bits_per_byte=nats.item() / math.log(2) / loader.n_bytes if complete and loader.n_bytes else None,
        tokens=int(tokens.item()),
    )
