"""`routing.sort_by_expert` in three small Triton kernels: a stable counting sort, with no atomics on results.

Shapes: M slots, E experts, NB = ceil(M / 128) blocks of slots.
First count each block's experts; then compute prefix sums over the blocks of each expert; then place each slot after
the earlier slots of its expert. Every program of the last kernel recomputes the experts' starts, because another launch
costs more. A radix sort of M keys reads and writes them several times; this reads them twice. `routing.local_routing`
is another kernel, with one launch.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmfoundry.kernels.routing import LocalRouting, Order
from llmfoundry.kernels.whole import cdiv, next_power_of_2

BLOCK = 128


@triton.jit
def _count_kernel(experts_ptr, counts_ptr, n_slots, n_blocks, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """counts[e, block]: slots of expert e in a block; row E counts those without an expert."""
    block = tl.program_id(0)
    slot = block * BLOCK + tl.arange(0, BLOCK)
    e = tl.load(experts_ptr + slot, mask=slot < n_slots, other=EXPERTS - 1).to(tl.int32)
    counts = tl.histogram(e, EXPERTS)
    tl.store(counts_ptr + tl.arange(0, EXPERTS).to(tl.int64) * n_blocks + block, counts)


@triton.jit
def _prefix_kernel(counts_ptr, totals_ptr, n_blocks, CHUNK: tl.constexpr):
    """Turn each expert's counts into the number of its slots in earlier blocks."""
    e = tl.program_id(0).to(tl.int64)
    carry = tl.zeros([1], dtype=tl.int32)
    for begin in tl.range(0, n_blocks, CHUNK):
        block = begin + tl.arange(0, CHUNK)
        counts = tl.load(counts_ptr + e * n_blocks + block, mask=block < n_blocks, other=0)
        tl.store(counts_ptr + e * n_blocks + block, tl.cumsum(counts, 0) - counts + carry, mask=block < n_blocks)
        carry += tl.sum(counts)
    tl.store(totals_ptr + e + tl.arange(0, 1), carry)


@triton.jit
def _place_kernel(
    experts_ptr, earlier_ptr, totals_ptr, start_ptr, row_slot_ptr, slot_row_ptr, n_slots, n_blocks, n_experts,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute each slot's row: its expert's start, plus the expert's earlier slots, in other blocks and in this one."""
    block = tl.program_id(0)
    ids = tl.arange(0, EXPERTS)
    totals = tl.load(totals_ptr + ids, mask=ids <= n_experts, other=0)
    start = tl.cumsum(totals, 0) - totals
    if block == 0:
        tl.store(start_ptr + ids, start, mask=ids <= n_experts)
    lane = tl.arange(0, BLOCK)
    slot = block * BLOCK + lane
    valid = slot < n_slots
    e = tl.load(experts_ptr + slot, mask=valid, other=-1).to(tl.int32)
    other = tl.load(experts_ptr + slot, mask=valid, other=-2).to(tl.int32)
    ahead = (e[:, None] == other[None, :]) & (lane[None, :] < lane[:, None])
    row = tl.sum(ahead.to(tl.int32), axis=1)
    row += tl.gather(start, tl.maximum(e, 0), 0)
    row += tl.load(earlier_ptr + e.to(tl.int64) * n_blocks + block, mask=valid, other=0)
    tl.store(slot_row_ptr + slot, row, mask=valid)
    tl.store(row_slot_ptr + row, slot, mask=valid)


def sort_by_expert_triton(experts: Tensor, n_experts: int) -> Order:
    """`routing.sort_by_expert`, its reference, in Triton; arguments as there. (T, K) must not be empty."""
    n_slots = experts.numel()
    n_blocks = cdiv(n_slots, BLOCK)
    padded = next_power_of_2(n_experts + 2)  # includes "no expert" and the last block's padding
    empty = partial(torch.empty, dtype=torch.int32, device=experts.device)
    counts, totals = empty(padded, n_blocks), empty(n_experts + 1)
    order = Order(empty(n_experts + 1), empty(n_slots), empty(n_slots))
    _count_kernel[(n_blocks,)](experts, counts, n_slots, n_blocks, EXPERTS=padded, BLOCK=BLOCK, num_warps=4)
    _prefix_kernel[(n_experts + 1,)](counts, totals, n_blocks, CHUNK=1024, num_warps=4)
    _place_kernel[(n_blocks,)](
        experts, counts, totals, *order, n_slots, n_blocks, n_experts, EXPERTS=padded, BLOCK=BLOCK, num_warps=4
    )
    return order


@triton.jit
def _local_kernel(
    packed_ptr, weights_ptr, experts_ptr, total_ptr, n_slots, first, n_local, K: tl.constexpr, BLOCK: tl.constexpr
):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < n_slots
    at = packed_ptr + (slot // K).to(tl.int64) * 2 * K + slot % K
    tl.store(weights_ptr + slot, tl.load(at, mask=inside, other=0), mask=inside)
    local = tl.load(at + K, mask=inside, other=-1) - first
    held = inside & (local >= 0) & (local < n_local)
    tl.store(experts_ptr + slot, tl.where(held, local, n_local), mask=inside)
    tl.atomic_add(total_ptr, tl.sum(held.to(tl.int32)))  # integers, so the order does not matter


def local_routing_triton(packed: Tensor, first: int, n_local: int) -> LocalRouting:
    """`routing.local_routing`, its reference, in Triton, for float32 weights: (R, 2K). Needs at least one row."""
    rows, top_k = packed.shape[0], packed.shape[1] // 2
    empty = partial(torch.empty, rows, top_k, device=packed.device)
    found = LocalRouting(empty(dtype=torch.float32), empty(dtype=torch.int32), packed.new_zeros(1))
    _local_kernel[(cdiv(rows * top_k, 1024),)](
        packed, found.weights.view(torch.int32), found.experts, found.n_slots, rows * top_k, first, n_local,
        K=top_k, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return found
