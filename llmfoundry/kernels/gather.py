"""Moves rows to expert order and back: copies each token to its rows, and sums rows per token or per expert.

Shapes: T tokens, D d_model, E experts, K top_k, M rows in expert order.
All of these are memory-bound. Sums run over a token's slots or an expert's rows in order, without atomics, so they are
deterministic. The bias of the down projection (E, D) is not added to the experts' rows: it is added to the sum of a
token's rows. Its dot product with a token's gradient, which the gradient of the routing weights needs, is computed
where that gradient is copied to rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmfoundry.kernels.routing import Order
from llmfoundry.kernels.whole import cdiv, next_power_of_2


class Biases(NamedTuple):
    """The biases of the down projection, and the tokens to which they are added."""

    bias: Tensor  # (E, D)
    experts: Tensor  # (T, K); E means no expert
    weights: Tensor  # (T, K) float32


@triton.jit
def spread_kernel(
    x_ptr, out_ptr, slot_row_ptr, end_ptr, bias_ptr, experts_ptr, dots_ptr, E, n_slots,
    D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(end_ptr)
    value = tl.load(x_ptr + token * D + d, mask=d < D)
    for j in tl.static_range(K):
        row = tl.load(slot_row_ptr + token * K + j)
        tl.store(out_ptr + row.to(tl.int64) * D + d, value, mask=(d < D) & (row < end))
        if bias_ptr is not None:
            e = tl.load(experts_ptr + token * K + j)
            bias = tl.load(bias_ptr + e * D + d, mask=(d < D) & (e < E), other=0.0).to(tl.float32)
            dot = tl.sum(tl.where(d < D, value.to(tl.float32) * bias, 0.0))
            tl.store(dots_ptr + tl.program_id(1).to(tl.int64) * n_slots + token * K + j, dot)


def gather(x: Tensor, order: Order, n_rows: int) -> Tensor:
    """Copy x (T, D) to (M, D) rows in expert order; rows after the last expert's are unset."""
    return gather_and_dots(x, order, n_rows, None)[0]


def gather_and_dots(x: Tensor, order: Order, n_rows: int, biases: Biases | None) -> tuple[Tensor, Tensor | None]:
    """`gather`, and if there are biases, (P, T*K) float32 partial dot products of x with the bias of each slot's
    expert.

    The grid is over tokens, not rows: each token is read once and written K times. A grid over rows would read most
    tokens K times from memory, because x is larger than the L2 cache.
    """
    n_tokens, d_model = x.shape
    out = x.new_empty(n_rows, d_model)
    block, n_slots = min(2048, next_power_of_2(d_model)), order.slot_row.numel()
    parts = cdiv(d_model, block)
    dots = None if biases is None else torch.empty(parts, n_slots, dtype=torch.float32, device=x.device)
    bias, experts = (None, None) if biases is None else biases[:2]
    spread_kernel[(n_tokens, parts)](
        x, out, order.slot_row, order.expert_start[-1:], bias, experts, dots, order.expert_start.numel() - 1, n_slots,
        D=d_model, K=n_slots // n_tokens, BLOCK=block, num_warps=max(1, min(8, block // 256)),
    )  # fmt: skip
    return out, dots


def dots_reference(x: Tensor, biases: Biases) -> Tensor:
    """Compute the sum of the partial products of `gather_and_dots` in plain PyTorch: (T*K,)."""
    bias, experts, _ = biases
    return (x.float().unsqueeze(1) * _bias_of_slots(bias, experts)).sum(-1).reshape(-1)


def _bias_of_slots(bias: Tensor, experts: Tensor) -> Tensor:
    """Return the bias of each slot, (T, K, D), in float32 or wider; zero for slots without an expert."""
    padded = torch.cat([bias, bias.new_zeros(1, bias.shape[1])])
    return padded.to(torch.promote_types(bias.dtype, torch.float32))[experts.long()]


def gather_reference(x: Tensor, order: Order, n_rows: int) -> Tensor:
    """`gather` in plain PyTorch."""
    return x[order.row_slot[:n_rows].long() // (order.slot_row.numel() // x.shape[0])]


@triton.jit
def sum_rows_kernel(
    rows_ptr, out_ptr, slot_row_ptr, end_ptr, bias_ptr, experts_ptr, weights_ptr, E,
    D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(end_ptr)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for j in tl.static_range(K):
        row = tl.load(slot_row_ptr + token * K + j)
        value = tl.load(rows_ptr + row.to(tl.int64) * D + d, mask=(d < D) & (row < end), other=0.0)
        total += value.to(tl.float32)
        if bias_ptr is not None:
            e = tl.load(experts_ptr + token * K + j)
            bias = tl.load(bias_ptr + e * D + d, mask=(d < D) & (e < E), other=0.0)
            total += bias.to(tl.float32) * tl.load(weights_ptr + token * K + j)
    tl.store(out_ptr + token * D + d, total, mask=d < D)


def sum_rows(rows: Tensor, order: Order, top_k: int, biases: Biases | None = None) -> Tensor:
    """Sum each token's rows and biases in float32, slot by slot: (M, D) in expert order -> (T, D)."""
    n_tokens, d_model = order.slot_row.numel() // top_k, rows.shape[1]
    out = rows.new_empty(n_tokens, d_model)
    block = min(2048, next_power_of_2(d_model))
    sum_rows_kernel[(n_tokens, cdiv(d_model, block))](
        rows, out, order.slot_row, order.expert_start[-1:], *(biases or (None, None, None)),
        order.expert_start.numel() - 1, D=d_model, K=top_k, BLOCK=block,
        num_warps=max(1, min(8, block // 256)),
    )  # fmt: skip
    return out


def sum_rows_reference(rows: Tensor, order: Order, top_k: int, biases: Biases | None = None) -> Tensor:
    """`sum_rows` in plain PyTorch."""
    row = order.slot_row.long().clamp(max=rows.shape[0] - 1)
    kept = (order.slot_row < order.expert_start[-1]).unsqueeze(1)
    total = torch.where(kept, rows[row].float(), 0).view(-1, top_k, rows.shape[1]).sum(1)
    if biases is not None:
        total += (_bias_of_slots(biases.bias, biases.experts) * biases.weights.unsqueeze(-1)).sum(1)
    return total.to(rows.dtype)


@triton.jit
def slot_sums_kernel(
    parts_ptr, of_slot_ptr, out_ptr, slot_row_ptr, end_ptr, n_slots, M,
    PARTS: tl.constexpr, OF_SLOT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(end_ptr)
    row = tl.load(slot_row_ptr + slot, mask=slot < n_slots, other=0)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for p in tl.range(PARTS):
        total += tl.load(parts_ptr + tl.cast(M, tl.int64) * p + row, mask=(slot < n_slots) & (row < end), other=0.0)
    if of_slot_ptr is not None:
        for p in tl.range(OF_SLOT):
            total += tl.load(of_slot_ptr + tl.cast(n_slots, tl.int64) * p + slot, mask=slot < n_slots, other=0.0)
    tl.store(out_ptr + slot, total, mask=slot < n_slots)


def slot_sums(parts: Tensor, order: Order, of_slot: Tensor | None = None) -> Tensor:
    """Sum the partial values of each slot's row, in order: (P, M) float32 in expert order -> (T*K,).

    Args:
        parts: (P, M).
        order: of the rows.
        of_slot: (Q, T*K), further partial values in slot order.
    """
    n_slots = order.slot_row.numel()
    out = torch.empty(n_slots, dtype=torch.float32, device=parts.device)
    slot_sums_kernel[(cdiv(n_slots, 256),)](
        parts, of_slot, out, order.slot_row, order.expert_start[-1:], n_slots, parts.shape[1], PARTS=parts.shape[0],
        OF_SLOT=0 if of_slot is None else of_slot.shape[0], BLOCK=256,
    )  # fmt: skip
    return out


def slot_sums_reference(parts: Tensor, order: Order) -> Tensor:
    """`slot_sums` in plain PyTorch."""
    row = order.slot_row.long().clamp(max=parts.shape[1] - 1)
    return torch.where(order.slot_row < order.expert_start[-1], parts.sum(0)[row], 0)


@triton.jit
def expert_sums_kernel(
    rows_ptr, out_ptr, start_ptr, weights_ptr, row_slot_ptr, N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    e = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    end = tl.load(start_ptr + e + 1)
    total = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for begin in tl.range(tl.load(start_ptr + e), end, ROWS):
        row = begin + tl.arange(0, ROWS)[:, None]
        value = tl.load(rows_ptr + row.to(tl.int64) * N + n, mask=(row < end) & (n < N), other=0.0).to(tl.float32)
        if weights_ptr is not None:
            slot = tl.load(row_slot_ptr + row, mask=row < end, other=0)
            value *= tl.load(weights_ptr + slot)
        total += value
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + e.to(tl.int64) * N + at, tl.sum(total, 0), mask=at < N)


def expert_sums(rows: Tensor, order: Order, weights: Tensor | None = None) -> Tensor:
    """Sum rows per expert in float32, optionally weighted: (M, N) in expert order -> (E, N) in their dtype.

    Args:
        rows: (M, N).
        order: of the rows.
        weights: (T, K) float32, looked up by slot.
    """
    n_experts, width = order.expert_start.numel() - 1, rows.shape[1]
    out = rows.new_empty(n_experts, width)
    expert_sums_kernel[(n_experts, cdiv(width, 128))](
        rows, out, order.expert_start, weights, order.row_slot, N=width, ROWS=64, BLOCK=128, num_warps=8
    )
    return out


def expert_sums_reference(rows: Tensor, order: Order, weights: Tensor | None = None) -> Tensor:
    """`expert_sums` in plain PyTorch, expert by expert."""
    start = order.expert_start.tolist()
    if weights is not None:
        rows = rows * weights.reshape(-1)[order.row_slot[: len(rows)].long()].unsqueeze(1)
    return torch.stack([rows[a:b].sum(0) for a, b in zip(start[:-1], start[1:], strict=True)])
