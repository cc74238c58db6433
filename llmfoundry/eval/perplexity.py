"""Evaluate a model on held-out text: nats per token and bits per byte.

Shapes: B rows, S sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from llmfoundry import runtime
from llmfoundry.data.loader import Loader
from llmfoundry.data.rows import IGNORE
from llmfoundry.eval.generate import check_ids
from llmfoundry.model.transformer import CausalLM
from llmfoundry.progress import progress


class Perplexity(NamedTuple):
    """The cost of a text under a model."""

    nats_per_token: float  # including end-of-text tokens
    bits_per_byte: float | None  # over the UTF-8 bytes of the whole text; None if only a part was read
    tokens: int
    position_nats: Tensor  # (S,) float64, label nats at each position, summed over rows
    position_tokens: Tensor  # (S,) float64, number of labels at each position

    def by_position(self, n_ranges: int) -> list[tuple[range, float]]:
        """Nats per token in ranges of positions of about equal size; ranges without labels are left out."""
        length = len(self.position_nats)
        bounds = [length * i // n_ranges for i in range(n_ranges + 1)]
        found = []
        for start, stop in pairwise(bounds):
            n = self.position_tokens[start:stop].sum().item()
            if n:
                found.append((range(start, stop), self.position_nats[start:stop].sum().item() / n))
        return found


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
    """Compute the loss over one pass of the loader's text.

    Args:
        model: sharded or not; every rank calls this.
        rows: rows per forward on one rank.
        max_batches: read this many times `rows` rows, over all ranks together; -1 reads all.
        rank: this process's share of the rows, of `world`.
        stopped: called before every batch, with the same answer on every rank; True ends the pass.
        bar: whether to show a progress bar on a terminal.

    Returns:
        The same on every rank; None if it was stopped.

    Raises:
        ConfigError: if a token of the text has no row in the embedding.
    """
    nats = torch.zeros((), dtype=torch.float64, device=device)
    tokens = torch.zeros((), dtype=torch.float64, device=device)
    places = torch.zeros(2, loader.max_seq_len, dtype=torch.float64, device=device)  # nats and labels per position
    n_rows = loader.n_rows if loader.limit is None else min(loader.n_rows, loader.limit)
    n_rows = n_rows if max_batches == -1 else min(n_rows, max_batches * rows)
    complete = n_rows == loader.n_rows
    left = n_rows
    with progress("evaluating", n_rows * loader.max_seq_len, "tokens", bar=bar) as advance:
        for batch in loader.one_pass(rows * world, rank, world, limit=n_rows):
            if stopped():
                return None
            check_ids(int(batch.tokens.max()), model.config.vocab_size)
            batch = batch.to(device)
            out = model(batch.tokens, batch.labels, sequence_ids=batch.sequence_ids, positions=batch.positions)
            nats += out.loss_sum
            counted = batch.labels != IGNORE  # (B, S)
            tokens += counted.sum()
            places += torch.stack([out.nats.double().sum(0), counted.sum(0)])
            read = min(left, rows * world)
            advance(read * loader.max_seq_len)
            left -= read
    runtime.all_reduce_sum(nats)
    runtime.all_reduce_sum(tokens)
    position_nats, position_tokens = runtime.all_reduce_sum(places).cpu()
    return Perplexity(
        nats_per_token=(nats / tokens).item(),
        bits_per_byte=nats.item() / math.log(2) / loader.n_bytes if complete and loader.n_bytes else None,
        tokens=int(tokens.item()),
        position_nats=position_nats,
        position_tokens=position_tokens,
    )
