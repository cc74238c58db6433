"""Rows to expert order and back: copy each token to its rows; sum each token's rows.

Shapes: T tokens, D d_model, K top_k, M rows in expert order.
Both move bytes and nothing else. The sum runs over a token's slots in order: no atomics, the same twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmfoundry.kernels.routing import Order


@triton.jit
def spread_kernel(x_ptr, out_ptr, slot_row_ptr, end_ptr, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(end_ptr)
    value = tl.load(x_ptr + token * D + d, mask=d < D)
    for j in tl.static_range(K):
        row = tl.load(slot_row_ptr + token * K + j)
        tl.store(out_ptr + row.to(tl.int64) * D + d, value, mask=(d < D) & (row < end))


def gather(x: Tensor, order: Order, n_rows: int) -> Tensor:
    """x (T, D) -> (M, D) rows in expert order; those behind the last expert are unset.

    By tokens, not by rows: each is read once and written K times, where rows would read most of them K times
    from memory, for x is larger than the L2 cache.
    """
    n_tokens, d_model = x.shape
    out = x.new_empty(n_rows, d_model)
    block = min(2048, triton.next_power_of_2(d_model))
    spread_kernel[(n_tokens, triton.cdiv(d_model, block))](
        x, out, order.slot_row, order.expert_start[-1:], D=d_model, K=order.slot_row.numel() // n_tokens, BLOCK=block,
        num_warps=max(1, min(8, block // 256)),
    )  # fmt: skip
    return out


def gather_reference(x: Tensor, order: Order, n_rows: int) -> Tensor:
    """`gather` in plain PyTorch."""
    return x[order.row_slot[:n_rows].long() // (order.slot_row.numel() // x.shape[0])]


@triton.jit
def sum_rows_kernel(rows_ptr, out_ptr, slot_row_ptr, end_ptr, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(end_ptr)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for j in tl.static_range(K):
        row = tl.load(slot_row_ptr + token * K + j)
        value = tl.load(rows_ptr + row.to(tl.int64) * D + d, mask=(d < D) & (row < end), other=0.0)
        total += value.to(tl.float32)
    tl.store(out_ptr + token * D + d, total, mask=d < D)


def sum_rows(rows: Tensor, order: Order, top_k: int) -> Tensor:
    """rows (M, D) in expert order -> (T, D): the float32 sum of each token's rows, slot by slot."""
    n_tokens, d_model = order.slot_row.numel() // top_k, rows.shape[1]
    out = rows.new_empty(n_tokens, d_model)
    block = min(2048, triton.next_power_of_2(d_model))
    sum_rows_kernel[(n_tokens, triton.cdiv(d_model, block))](
        rows, out, order.slot_row, order.expert_start[-1:], D=d_model, K=top_k, BLOCK=block,
        num_warps=max(1, min(8, block // 256)),
    )  # fmt: skip
    return out


def sum_rows_reference(rows: Tensor, order: Order, top_k: int) -> Tensor:
    """`sum_rows` in plain PyTorch."""
    row = order.slot_row.long().clamp(max=rows.shape[0] - 1)
    kept = (order.slot_row < order.expert_start[-1]).unsqueeze(1)
    return torch.where(kept, rows[row].float(), 0).view(-1, top_k, rows.shape[1]).sum(1).to(rows.dtype)


@triton.jit
def slot_sums_kernel(parts_ptr, out_ptr, slot_row_ptr, end_ptr, n_slots, M, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(end_ptr)
    row = tl.load(slot_row_ptr + slot, mask=slot < n_slots, other=0)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for p in tl.range(PARTS):
        total += tl.load(parts_ptr + tl.cast(M, tl.int64) * p + row, mask=(slot < n_slots) & (row < end), other=0.0)
    tl.store(out_ptr + slot, total, mask=slot < n_slots)


def slot_sums(parts: Tensor, order: Order) -> Tensor:
    """parts (P, M) float32 in expert order -> (T*K,): each slot's sum of its row's parts, in order."""
    n_slots = order.slot_row.numel()
    out = torch.empty(n_slots, dtype=torch.float32, device=parts.device)
    slot_sums_kernel[(triton.cdiv(n_slots, 256),)](
        parts, out, order.slot_row, order.expert_start[-1:], n_slots, parts.shape[1], PARTS=parts.shape[0],
        BLOCK=256,
    )  # fmt: skip
    return out


def slot_sums_reference(parts: Tensor, order: Order) -> Tensor:
    """`slot_sums` in plain PyTorch."""
    row = order.slot_row.long().clamp(max=parts.shape[1] - 1)
    return torch.where(order.slot_row < order.expert_start[-1], parts.sum(0)[row], 0)
