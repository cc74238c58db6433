"""The permutation to expert order: a stable sort of routed slots by expert, entirely on the device.

Shapes: T tokens, K top_k, M = T*K slots (slot t*K+j is token t's j-th choice), E experts.
Expert order holds expert 0's rows first, then expert 1's, and so on, each expert's in token order. No value is read on
the host, so a CUDA graph can capture it; there are no atomics, so it is bitwise deterministic.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Order(NamedTuple):
    """The permutation between slots (token order) and rows (expert order). All int32, on the device."""

    expert_start: Tensor  # (E+1,) first row of each expert; the last entry is the number of rows that have an expert
    row_slot: Tensor  # (M,) row -> slot; its token is slot // K
    slot_row: Tensor  # (M,) slot -> row


def sort_by_expert(experts: Tensor, n_experts: int) -> Order:
    """Sort the slots by expert, keeping token order within each expert.

    Args:
        experts: (T, K) int32 or int64 ids. The id `n_experts` means "no expert": such slots are sorted last, after
            `expert_start[E]`.
        n_experts: E.
    """
    n_slots = experts.numel()
    by_expert, row_slot = experts.reshape(-1).sort(stable=True)  # (M,)
    first = torch.arange(n_experts + 1, dtype=by_expert.dtype, device=experts.device)
    slot_row = torch.empty(n_slots, dtype=torch.int32, device=experts.device)
    slot_row[row_slot] = torch.arange(n_slots, dtype=torch.int32, device=experts.device)
    return Order(
        expert_start=torch.searchsorted(by_expert, first, out_int32=True),  # (E+1,)
        row_slot=row_slot.int(),
        slot_row=slot_row,
    )


def sum_rows_torch(rows: Tensor, of_token: Tensor) -> Tensor:
    """Sum rows per token, in a fixed order, accumulating in float32.

    `embedding_bag` computes exactly this sum, without the (T, K, D) intermediate of gather and sum.

    Args:
        rows: (R, D).
        of_token: (T, K) int32, the rows of each token.

    Returns:
        (T, D) in the dtype of `rows`.
    """
    if of_token.numel() == 0:
        return rows.new_zeros(of_token.shape[0], rows.shape[1])
    return F.embedding_bag(of_token, rows, mode="sum")


def has_kernels(x: Tensor) -> bool:
    """Return whether kernels can copy, order and sum rows like these; they support neither float64 nor zero rows."""
    return x.is_cuda and x.dtype != torch.float64 and x.numel() > 0 and _has_triton()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


class LocalRouting(NamedTuple):
    """The routing of R rows to this rank's experts."""

    weights: Tensor  # (R, K)
    experts: Tensor  # (R, K) int32, relative to this rank's first expert; n_local for experts on other ranks
    n_slots: Tensor  # (1,) int32, number of slots whose expert is on this rank


def packed_routing(weights: Tensor, experts: Tensor) -> Tensor:
    """Pack weights (T, K) and ids (T, K) as (T, X) int32: the bits of the weights, then the ids."""
    return torch.cat([weights.contiguous().view(torch.int32), experts.int()], dim=1)


def local_routing(packed: Tensor, top_k: int, dtype: torch.dtype, first: int, n_local: int) -> LocalRouting:
    """Unpack `packed_routing`, with ids relative to this rank's experts.

    Args:
        packed: (R, X).
        top_k: K.
        dtype: of the weights.
        first: this rank's first expert.
        n_local: number of experts on this rank.
    """
    local = packed[:, -top_k:] - first
    held = (local >= 0) & (local < n_local)
    weights = packed[:, :-top_k].reshape(-1).view(dtype).view(-1, top_k)
    return LocalRouting(weights, torch.where(held, local, n_local), held.sum(dtype=torch.int32).view(1))
