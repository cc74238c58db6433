"""Rows times their expert's matrix: the down projection, and the gradients of a' and x in backward.

Shapes: M rows in expert order, N output width, J inner width, E experts; w (E, N, J) or, transposed, (E, J, N).
An adapter of the matrices (rank R) adds a few steps to the same loop, with other descriptors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    write_rows,
)
from llmfoundry.kernels.whole import next_power_of_2


class GroupedConfig(NamedTuple):
    """Tile sizes: `columns` of the output, and `depth` of the inner dim per step."""

    columns: int = 256
    depth: int = 64
    group: int = 8
    num_warps: int = 8
    num_stages: int = 3
    flatten: bool = False
    pieces: int = 1  # column pieces in which the accumulator is stored: less staging memory, more stages


@triton.jit
def grouped_kernel(
    rows_desc, w_desc, out_desc, u_desc, v_desc, start_ptr, expert_ptr, row_ptr, count_ptr,
    J, N: tl.constexpr, TRANSPOSED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, PROGRAMS: tl.constexpr, TURNS: tl.constexpr, FLATTEN: tl.constexpr, PIECES: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    COLUMN_TILES: tl.constexpr = (N + BN - 1) // BN
    WIDE = (J + BK - 1) // BK * BK
    n_row_tiles = tl.load(count_ptr)
    first, end_tile = my_tiles(n_row_tiles * COLUMN_TILES, PROGRAMS, TURNS)
    for tile in tl.range(first, end_tile, PROGRAMS, flatten=FLATTEN):
        i, j = place(tile, n_row_tiles, COLUMN_TILES, GROUP)
        e = tl.load(expert_ptr + i)
        row = tl.load(row_ptr + i)
        acc = tl.zeros([BM, BN], dtype=tl.float32)
        for k in tl.range(0, WIDE + RANK, BK):
            left, right, at = rows_desc, w_desc, k
            if RANK > 0:
                if k >= WIDE:  # the last steps are those of the adapter
                    left, right, at = u_desc, v_desc, k - WIDE
            a = left.load([row, at])
            if TRANSPOSED:
                w = right.load([e, at, j * BN]).reshape([BK, BN])
            else:
                w = right.load([e, j * BN, at]).reshape([BN, BK]).T
            acc = tl.dot(a, w, acc, input_precision="tf32x3")
        start = tl.load(start_ptr + e)
        size = tl.load(start_ptr + e + 1) - start
        write_rows(out_desc, start, size, row - start, j * BN, acc, PIECES)


def grouped(
    rows: Tensor,
    w: Tensor,
    tiles: Tiles,
    *,
    transposed: bool = False,
    beside: Beside | None = None,
    config: GroupedConfig | HopperConfig = GroupedConfig(),
) -> Tensor:
    """Multiply each row by its expert's matrix.

    Args:
        rows: (M, J) in expert order.
        w: (E, N, J), applied as `rows @ w[e].T`; or `transposed` (E, J, N), as `rows @ w[e]`.
        tiles: of the rows.
        transposed: the layout of `w`.
        beside: an adapter's product, laid out like `w`, which is added.
        config: tile sizes.

    Returns:
        (M, N) in the dtype of `rows`; rows after the last expert's are unset.
    """
    if isinstance(config, HopperConfig):
        from llmfoundry.kernels.hopper import grouped_hopper  # imported here because Gluon is experimental

        return grouped_hopper(rows, w, tiles, transposed=transposed, config=config)
    n_rows, inner = rows.shape
    width = w.shape[2] if transposed else w.shape[1]
    c = config
    columns = min(c.columns, max(16, next_power_of_2(width)))
    out = rows.new_empty(n_rows, width)
    block = [columns, c.depth] if not transposed else [c.depth, columns]
    rank = 0 if beside is None else beside.u.shape[1]
    programs = n_programs(rows.device)
    grouped_kernel[(programs * turns(),)](
        plain(rows, [TILE_ROWS, c.depth]),
        plain(w, [1, *block]),
        ragged(out, [TILE_ROWS, columns // c.pieces]),
        None if beside is None else plain(beside.u, [TILE_ROWS, c.depth]),
        None if beside is None else plain(beside.v, [1, *block]),
        tiles.expert_start, tiles.expert, tiles.row, tiles.n_tiles,
        inner, N=width, TRANSPOSED=transposed, BM=TILE_ROWS, BN=columns, BK=c.depth, GROUP=c.group,
        PROGRAMS=programs, TURNS=turns(), FLATTEN=c.flatten, PIECES=c.pieces, RANK=rank,
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    return out


def grouped_reference(
    rows: Tensor, w: Tensor, tiles: Tiles, *, transposed: bool = False, beside: Beside | None = None
) -> Tensor:
    """`grouped` in plain PyTorch, expert by expert."""
    start = tiles.expert_start.tolist()
    spans = list(zip(start[:-1], start[1:], strict=True))
    out = torch.cat([rows[a:b] @ (w[e] if transposed else w[e].T) for e, (a, b) in enumerate(spans)])
    return out if beside is None else out + grouped_reference(beside.u, beside.v, tiles, transposed=transposed)
