"""Gathers row-sharded matrices, each on one rank, for a computation on whole matrices.

Each rank owns some of the matrices: one all-to-all sends their rows to it, and another one returns the results. An
all-gather would send every matrix to every rank, and all ranks would repeat the same computation.

Shapes: N matrices of R rows and C columns; each rank has some of the rows of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def rows_of_ranks(rows: int, ranks: int, start: int, stop: int) -> list[int]:
    """Return how many of the rows [start, stop) each rank has, of a tensor of `rows` split as by `torch.chunk`."""
    chunk = -(-rows // ranks)
    return [max(0, min(stop, (rank + 1) * chunk) - max(start, rank * chunk)) for rank in range(ranks)]


def on_owners(
    parts: Sequence[Tensor],
    counts: Sequence[Sequence[int]],
    first: int,
    group: ProcessGroup,
    compute: Callable[[Tensor], Tensor],
) -> list[Tensor]:
    """Compute a function of each matrix on its owner, and return each rank its rows of the results. A collective.

    Args:
        parts: this rank's rows of each matrix, (rows of this rank, C), all of the same dtype.
        counts: for each matrix, how many of its R rows each rank has.
        first: the rank that owns the first matrix; the next rank owns the next, and so on.
        group: the ranks.
        compute: (n, R, C) -> (n, R, C), for the matrices that this rank owns; only called if there are any.

    Returns:
        This rank's rows of each result, in the order of `parts`.
    """
    ranks, me = group.size(), group.rank()
    owned = [[i for i in range(len(parts)) if (first + i) % ranks == rank] for rank in range(ranks)]
    order = [i for each in owned for i in each]
    there = [sum(counts[i][me] for i in each) for each in owned]  # number of rows that this rank sends to each owner
    here = [sum(counts[i][rank] for i in owned[me]) for rank in range(ranks)]  # rows that it receives as an owner
    columns = parts[0].shape[1]

    received = parts[0].new_empty(sum(here), columns)
    dist.all_to_all_single(received, torch.cat([parts[i] for i in order]), here, there, group=group)
    pieces = received.split([counts[i][rank] for rank in range(ranks) for i in owned[me]])
    n = len(owned[me])
    if n:
        whole = compute(torch.stack([torch.cat(pieces[j::n]) for j in range(n)]))  # (n, R, C)
        by_rank = zip(*(matrix.split(list(counts[i])) for i, matrix in zip(owned[me], whole, strict=True)), strict=True)
        received = torch.cat([piece for pieces_of_rank in by_rank for piece in pieces_of_rank])
    sent_back = parts[0].new_empty(sum(there), columns)
    dist.all_to_all_single(sent_back, received, there, here, group=group)
    results: list[Tensor] = [received] * len(parts)
    for i, rows in zip(order, sent_back.split([counts[i][me] for i in order]), strict=True):
        results[i] = rows
    return results
