"""Backward of the down projection and the activation, in one kernel: dy, h, w2 -> dh, a' and ds.

Shapes: D d_model, F ffn hidden size, E experts, M rows in expert order, s each row's routing weight.
With da' = dy @ w2 (M, F): a = act(h) is recomputed, ds = rowsum(da' * a), dh is computed from da = s * da', and a' = s
* a is needed for the gradient of w2. Neither a nor the experts' outputs were saved.
The epilogue processes the accumulator in column slices; as a whole, it would spill 1.2 KB per thread. It takes most of
a tile's time. Sixteen warps wait for h together, where eight would wait one after another.
An adapter of w2 (rank R) adds a few steps to the same loop, with other descriptors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmfoundry.kernels.activations import activate, activate_backward
from llmfoundry.kernels.tiles import (
    TILE_ROWS,
    Beside,
    Tiles,
    my_tiles,
    n_programs,
    place,
    plain,
    turns,
    unit_factors,
    value_and_slope,
)
from llmfoundry.kernels.whole import cdiv


class UpBackwardConfig(NamedTuple):
    """Tile sizes: `columns` of a, and `depth` of the inner dim per step."""

    columns: int = 128
    depth: int = 64
    group: int = 8
    num_warps: int = 8
    num_stages: int = 4
    flatten: bool = False
    slices: int = 4


@triton.jit
def _slice_backward(
    da, h_ptr, dh_ptr, a_ptr, s, inside, row, column, ds,
    F: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, BM: tl.constexpr,
    SLICE: tl.constexpr,
):  # fmt: skip
    """Process one column slice of a tile. Only the scalar base is int64: offsets in a tile fit int32 and registers."""
    H: tl.constexpr = 2 * F if GATED else F
    base = row.to(tl.int64)
    columns = column + tl.arange(0, SLICE)[None, :]
    mask = inside & (columns < F)
    at_h = tl.arange(0, BM)[:, None] * H + columns
    at_a = tl.arange(0, BM)[:, None] * F + columns
    dtype = a_ptr.dtype.element_ty
    gate = tl.load(h_ptr + base * H + at_h, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(h_ptr + base * H + F + at_h, mask=mask, other=0.0).to(tl.float32)
        value, slope, factor = unit_factors(gate, up, ACTIVATION, LIMIT)
        d_up = da * s * value
        if LIMIT is not None:
            d_up = tl.where(tl.abs(up) > LIMIT, 0.0, d_up)
        tl.store(dh_ptr + base * H + F + at_h, d_up.to(dtype), mask=mask)
        tl.store(dh_ptr + base * H + at_h, (da * s * factor * slope).to(dtype), mask=mask)
        value = value * factor
    else:
        value, slope = value_and_slope(gate, ACTIVATION)
        tl.store(dh_ptr + base * H + at_h, (da * s * slope).to(dtype), mask=mask)
    tl.store(a_ptr + base * F + at_a, (value * s).to(dtype), mask=mask)
    return ds + tl.sum(tl.where(mask, da * value, 0.0), axis=1)


@triton.jit
def _slices_backward(
    da, h_ptr, dh_ptr, a_ptr, s, inside, row, column, ds,
    F: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, BM: tl.constexpr,
    WIDTH: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """Process a tile's column slices in turn, by recursive halving, because a tensor can only be split in two."""
    if SLICES == 1:
        ds = _slice_backward(da, h_ptr, dh_ptr, a_ptr, s, inside, row, column, ds,
                             F, GATED, ACTIVATION, LIMIT, BM, WIDTH)  # fmt: skip
    else:
        HALF: tl.constexpr = WIDTH // 2
        left, right = da.reshape([BM, 2, HALF]).permute(0, 2, 1).split()
        ds = _slices_backward(left, h_ptr, dh_ptr, a_ptr, s, inside, row, column, ds,
                              F, GATED, ACTIVATION, LIMIT, BM, HALF, SLICES // 2)  # fmt: skip
        ds = _slices_backward(right, h_ptr, dh_ptr, a_ptr, s, inside, row, column + HALF, ds,
                              F, GATED, ACTIVATION, LIMIT, BM, HALF, SLICES // 2)  # fmt: skip
    return ds


@triton.jit
def up_backward_kernel(
    dy_desc, w2_desc, u_desc, v_desc, h_ptr, dh_ptr, a_ptr, ds_ptr, weights_ptr, row_slot_ptr,
    start_ptr, expert_ptr, row_ptr, count_ptr,
    D, M, F: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, TURNS: tl.constexpr, FLATTEN: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    COLUMN_TILES: tl.constexpr = (F + BN - 1) // BN
    WIDE = (D + BK - 1) // BK * BK
    n_row_tiles = tl.load(count_ptr)
    first, end_tile = my_tiles(n_row_tiles * COLUMN_TILES, PROGRAMS, TURNS)
    for tile in tl.range(first, end_tile, PROGRAMS, flatten=FLATTEN):
        i, j = place(tile, n_row_tiles, COLUMN_TILES, GROUP)
        e = tl.load(expert_ptr + i)
        row = tl.load(row_ptr + i)
        acc = tl.zeros([BM, BN], dtype=tl.float32)
        for k in tl.range(0, WIDE + RANK, BK):
            left, right, at = dy_desc, w2_desc, k
            if RANK > 0:
                if k >= WIDE:  # the last steps are those of the adapter
                    left, right, at = u_desc, v_desc, k - WIDE
            dy = left.load([row, at])
            w = right.load([e, at, j * BN]).reshape([BK, BN])
            acc = tl.dot(dy, w, acc, input_precision="tf32x3")
        end = tl.load(start_ptr + e + 1)
        rows = row + tl.arange(0, BM)
        slot = tl.load(row_slot_ptr + rows, mask=rows < end, other=0)
        s = tl.load(weights_ptr + slot)[:, None]
        inside = (rows < end)[:, None]
        ds = tl.zeros([BM], dtype=tl.float32)
        ds = _slices_backward(acc, h_ptr, dh_ptr, a_ptr, s, inside, row, j * BN, ds,
                              F, GATED, ACTIVATION, LIMIT, BM, BN, SLICES)  # fmt: skip
        tl.store(ds_ptr + tl.cast(M, tl.int64) * j + rows, ds, mask=rows < end)


def up_backward(
    dy_rows: Tensor,
    h: Tensor,
    weights: Tensor,
    row_slot: Tensor,
    tiles: Tiles,
    w2: Tensor,
    *,
    activation: str,
    gated: bool,
    limit: float | None = None,
    beside: Beside | None = None,
    config: UpBackwardConfig = UpBackwardConfig(),
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of the pre-activations and of the routing weights.

    Args:
        dy_rows: (M, D) in expert order.
        h: (M, 2F) or (M, F) pre-activations.
        weights: (T, K) float32, looked up by slot.
        row_slot: (M,) int32.
        tiles: of the rows.
        w2: (E, D, F).
        activation: of the feed-forward block.
        gated: whether h holds a gate.
        limit: clamp of gate and up, or None; the gradient is zero beyond it.
        beside: an adapter's product, with v (E, r, F), which is added to the gradient of a'.
        config: tile sizes.

    Returns:
        dh like `h`; a' (M, F); ds (column tiles, M) float32 partial sums, to be added in order. Rows after the last
        expert's are unset.
    """
    n_rows, d_model = dy_rows.shape
    hidden = w2.shape[2]
    c = config
    dh = torch.empty_like(h)
    a = dy_rows.new_empty(n_rows, hidden)
    ds = torch.empty(cdiv(hidden, c.columns), n_rows, dtype=torch.float32, device=h.device)
    rank = 0 if beside is None else beside.u.shape[1]
    programs = n_programs(h.device)
    up_backward_kernel[(programs * turns(),)](
        plain(dy_rows, [TILE_ROWS, c.depth]),
        plain(w2, [1, c.depth, c.columns]),
        None if beside is None else plain(beside.u, [TILE_ROWS, c.depth]),
        None if beside is None else plain(beside.v, [1, c.depth, c.columns]),
        h, dh, a, ds, weights, row_slot, tiles.expert_start, tiles.expert, tiles.row, tiles.n_tiles,
        d_model, n_rows, F=hidden, GATED=gated, ACTIVATION=activation, LIMIT=limit, BM=TILE_ROWS, BN=c.columns,
        BK=c.depth, SLICES=c.slices, GROUP=c.group, PROGRAMS=programs, TURNS=turns(), FLATTEN=c.flatten,
        RANK=rank,
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    return dh, a, ds


def up_backward_reference(
    dy_rows: Tensor,
    h: Tensor,
    weights: Tensor,
    row_slot: Tensor,
    tiles: Tiles,
    w2: Tensor,
    *,
    activation: str,
    gated: bool,
    limit: float | None = None,
    beside: Beside | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`up_backward` in plain PyTorch, expert by expert."""
    start = tiles.expert_start.tolist()
    spans = list(zip(start[:-1], start[1:], strict=True))
    da = torch.cat([dy_rows[a:b] @ w2[e] for e, (a, b) in enumerate(spans)]).float()
    if beside is not None:
        da = da + torch.cat([beside.u[a:b] @ beside.v[e] for e, (a, b) in enumerate(spans)])
    h = h[: da.shape[0]]
    s = weights.reshape(-1)[row_slot[: da.shape[0]].long()].unsqueeze(1)
    a = activate(h, activation, gated, limit)
    dh = activate_backward(da * s, h, activation, gated, limit)
    return dh, (a * s).to(h.dtype), (da * a).sum(1).unsqueeze(0)
