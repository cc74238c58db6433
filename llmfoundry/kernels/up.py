"""The up projection of all experts with its activation, in one kernel: x, w1 -> h and a' = s * act(h).

Shapes: T tokens, D d_model, F ffn hidden size, E experts, M rows in expert order; w1 (E, 2F, D) gate rows then up rows,
or (E, F, D). s is each row's routing weight.
A tile's 256 rows of w1 are 128 gate rows and their 128 up rows, loaded by one TMA box per step, so that one wgmma of N
= 256 leaves both halves of a column pair in the same thread: the gated unit needs no data exchange.
Biases are (E, 2F) or (E, F). An adapter of w1 (rank R) acts as a few more columns of x and w1: its steps follow in the
same loop, with other descriptors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmfoundry.kernels.activations import activate
from llmfoundry.kernels.tiles import (
    TILE_ROWS,
    Beside,
    HopperConfig,
    Tiles,
    my_tiles,
    n_programs,
    place,
    plain,
    ragged,
    turns,
    unit_factors,
    value_and_slope,
    write_ragged,
    write_ragged_half,
)


class UpConfig(NamedTuple):
    """Tile sizes: `columns` of a, and `depth` of the inner dim per step."""

    columns: int = 128
    depth: int = 64
    group: int = 8
    num_warps: int = 8
    num_stages: int = 3
    flatten: bool = False


@triton.jit
def up_kernel(
    x_desc, w1_desc, h_desc, a_desc, u_desc, v_desc, bias_ptr, weights_ptr, row_slot_ptr,
    start_ptr, expert_ptr, row_ptr, count_ptr,
    D, F: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, TURNS: tl.constexpr, FLATTEN: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    HALVES: tl.constexpr = 2 if GATED else 1
    COLUMN_TILES: tl.constexpr = (F + BN - 1) // BN
    WIDE = (D + BK - 1) // BK * BK
    n_row_tiles = tl.load(count_ptr)
    first, end_tile = my_tiles(n_row_tiles * COLUMN_TILES, PROGRAMS, TURNS)
    for tile in tl.range(first, end_tile, PROGRAMS, flatten=FLATTEN):
        i, j = place(tile, n_row_tiles, COLUMN_TILES, GROUP)
        e = tl.load(expert_ptr + i)
        row = tl.load(row_ptr + i)
        acc = tl.zeros([BM, HALVES * BN], dtype=tl.float32)
        for k in tl.range(0, WIDE + RANK, BK):
            left, right, at = x_desc, w1_desc, k
            if RANK > 0:
                if k >= WIDE:  # the last steps are those of the adapter
                    left, right, at = u_desc, v_desc, k - WIDE
            x = left.load([row, at])
            w = right.load([e * HALVES, j * BN, at]).reshape([HALVES * BN, BK])
            acc = tl.dot(x, w.T, acc, input_precision="tf32x3")
        start = tl.load(start_ptr + e)
        size = tl.load(start_ptr + e + 1) - start
        rows = row + tl.arange(0, BM)
        slot = tl.load(row_slot_ptr + rows, mask=rows < start + size, other=0)
        s = tl.load(weights_ptr + slot)[:, None]
        dtype: tl.constexpr = a_desc.dtype
        columns = j * BN + tl.arange(0, BN)
        if GATED:
            gate, up = acc.reshape([BM, 2, BN]).permute(0, 2, 1).split()
            if bias_ptr is not None:
                bias = bias_ptr + e * 2 * F + columns
                gate += tl.load(bias, mask=columns < F, other=0.0).to(tl.float32)[None, :]
                up += tl.load(bias + F, mask=columns < F, other=0.0).to(tl.float32)[None, :]
            write_ragged_half(h_desc, start, size, row - start, 0, j * BN, gate.to(dtype))
            write_ragged_half(h_desc, start, size, row - start, 1, j * BN, up.to(dtype))
            value, _, factor = unit_factors(gate, up, ACTIVATION, LIMIT)
            write_ragged(a_desc, start, size, row - start, j * BN, (value * factor * s).to(dtype))
        else:
            if bias_ptr is not None:
                acc += tl.load(bias_ptr + e * F + columns, mask=columns < F, other=0.0).to(tl.float32)[None, :]
            write_ragged_half(h_desc, start, size, row - start, 0, j * BN, acc.to(dtype))
            value, _ = value_and_slope(acc, ACTIVATION)
            write_ragged(a_desc, start, size, row - start, j * BN, (value * s).to(dtype))


def up(
    x_rows: Tensor,
    weights: Tensor,
    row_slot: Tensor,
    tiles: Tiles,
    w1: Tensor,
    *,
    activation: str,
    gated: bool,
    limit: float | None = None,
    bias: Tensor | None = None,
    beside: Beside | None = None,
    config: UpConfig | HopperConfig = UpConfig(),
) -> tuple[Tensor, Tensor]:
    """Compute the pre-activations and weighted activations of every row.

    Args:
        x_rows: (M, D) in expert order.
        weights: (T, K) float32, looked up by slot.
        row_slot: (M,) int32.
        tiles: of the rows.
        w1: (E, 2F, D) or (E, F, D).
        activation: of the feed-forward block.
        gated: whether w1 holds a gate.
        limit: clamp of gate and up, or None.
        bias: (E, 2F) or (E, F), or None.
        beside: an adapter's product, with v (E, 2F, r) or (E, F, r), which is added to h.
        config: tile sizes.

    Returns:
        h (M, 2F) or (M, F), and a' (M, F). Rows after the last expert's are unset.
    """
    if isinstance(config, HopperConfig):
        from llmfoundry.kernels.hopper import up_hopper  # imported here because Gluon is experimental

        return up_hopper(x_rows, weights, row_slot, tiles, w1, activation=activation, limit=limit, config=config)
    n_rows, d_model = x_rows.shape
    n_experts = w1.shape[0]
    halves = 2 if gated else 1
    hidden = w1.shape[1] // halves
    c = config
    h = x_rows.new_empty(n_rows, halves * hidden)
    a = x_rows.new_empty(n_rows, hidden)
    rank = 0 if beside is None else beside.u.shape[1]
    programs = n_programs(x_rows.device)
    up_kernel[(programs * turns(),)](
        plain(x_rows, [TILE_ROWS, c.depth]),
        plain(w1.view(n_experts * halves, hidden, d_model), [halves, c.columns, c.depth]),
        ragged(h.view(-1, halves, hidden), [TILE_ROWS, 1, c.columns]),
        ragged(a, [TILE_ROWS, c.columns]),
        None if beside is None else plain(beside.u, [TILE_ROWS, c.depth]),
        None if beside is None else plain(beside.v.view(-1, hidden, rank), [halves, c.columns, c.depth]),
        bias, weights, row_slot, tiles.expert_start, tiles.expert, tiles.row, tiles.n_tiles,
        d_model, F=hidden, GATED=gated, ACTIVATION=activation, LIMIT=limit, BM=TILE_ROWS,
        BN=c.columns, BK=c.depth, GROUP=c.group, PROGRAMS=programs, TURNS=turns(), FLATTEN=c.flatten,
        RANK=rank,
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    return h, a


def up_reference(
    x_rows: Tensor,
    weights: Tensor,
    row_slot: Tensor,
    tiles: Tiles,
    w1: Tensor,
    *,
    activation: str,
    gated: bool,
    limit: float | None = None,
    bias: Tensor | None = None,
    beside: Beside | None = None,
) -> tuple[Tensor, Tensor]:
    """`up` in plain PyTorch, expert by expert."""
    start = tiles.expert_start.tolist()
    spans = list(zip(start[:-1], start[1:], strict=True))
    h = torch.cat([x_rows[a:b] @ w1[e].T for e, (a, b) in enumerate(spans)])
    if beside is not None:
        h = h + torch.cat([beside.u[a:b] @ beside.v[e].T for e, (a, b) in enumerate(spans)])
    if bias is not None:
        h = h + bias.repeat_interleave(tiles.expert_start.diff(), 0)
    s = weights.reshape(-1)[row_slot[: h.shape[0]].long()].unsqueeze(1)
    return h, (activate(h, activation, gated, limit) * s).to(x_rows.dtype)
