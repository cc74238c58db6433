"""Products of e4m3 rows with their expert's matrix, and the matrices' gradients; scales are applied at the end.

Shapes: M rows in expert order, N output width, J inner width, P rows of a gradient, E experts.
Like grouped.py and weight_grad.py, with twice the depth: a step of 128 8-bit values loads as many bytes. Both operands
are read along the inner dim, as Hopper's tensor cores require for 8-bit operands. They accumulate with about 14 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmfoundry.kernels.e4m3 import Scaled, rescaled_reference
from llmfoundry.kernels.grouped import GroupedConfig
from llmfoundry.kernels.tiles import (
    TILE_ROWS,
    Tiles,
    my_tiles,
    n_programs,
    place,
    plain,
    ragged,
    turns,
    write_matrix,
    write_rows,
)
from llmfoundry.kernels.tune import holds_large
from llmfoundry.kernels.weight_grad import WeightGradConfig

# Four stages of 48 KB and half an accumulator fit in Hopper's shared memory; the second config is for GPUs with less.
PRODUCT = (
    GroupedConfig(depth=128, pieces=2, num_stages=4, group=8, flatten=True),
    GroupedConfig(columns=64, depth=64, num_warps=4, num_stages=2),
)
WEIGHT_GRAD = (
    WeightGradConfig(pieces=2, num_stages=4, group=4, flatten=True),
    WeightGradConfig(height=64, width=64, num_warps=4, num_stages=2),
)


@triton.jit
def scaled_grouped_kernel(
    rows_desc, w_desc, out_desc, row_scale_ptr, w_scale_ptr, start_ptr, expert_ptr, row_ptr, count_ptr,
    J, N: tl.constexpr, PER_CHANNEL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, PROGRAMS: tl.constexpr, TURNS: tl.constexpr, FLATTEN: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    COLUMN_TILES: tl.constexpr = (N + BN - 1) // BN
    n_row_tiles = tl.load(count_ptr)
    first, end_tile = my_tiles(n_row_tiles * COLUMN_TILES, PROGRAMS, TURNS)
    for tile in tl.range(first, end_tile, PROGRAMS, flatten=FLATTEN):
        i, j = place(tile, n_row_tiles, COLUMN_TILES, GROUP)
        e = tl.load(expert_ptr + i)
        row = tl.load(row_ptr + i)
        acc = tl.zeros([BM, BN], dtype=tl.float32)
        for k in tl.range(0, J, BK):
            a = rows_desc.load([row, k])
            w = w_desc.load([e, j * BN, k]).reshape([BN, BK])
            acc = tl.dot(a, w.T, acc)
        start = tl.load(start_ptr + e)
        size = tl.load(start_ptr + e + 1) - start
        rows = row + tl.arange(0, BM)
        scale = tl.load(row_scale_ptr + rows, mask=rows < start + size, other=0.0)
        if PER_CHANNEL:
            columns = j * BN + tl.arange(0, BN)
            acc = acc * scale[:, None] * tl.load(w_scale_ptr + e * N + columns, mask=columns < N, other=0.0)[None, :]
        else:
            acc = acc * (scale * tl.load(w_scale_ptr + e))[:, None]
        write_rows(out_desc, start, size, row - start, j * BN, acc, PIECES)


def scaled_grouped(
    rows: Scaled, w: Scaled, tiles: Tiles, dtype: torch.dtype, *, config: GroupedConfig | None = None
) -> Tensor:
    """Multiply each row by its expert's matrix.

    Args:
        rows: (M, J) in expert order, with one scale per row.
        w: (E, N, J), applied as `rows @ w[e].T`, with one scale per row of each expert, or one per expert.
        tiles: of the rows.
        dtype: of the result.
        config: tile sizes.

    Returns:
        (M, N); rows after the last expert's are unset.
    """
    (n_rows, inner), width = rows.values.shape, w.values.shape[1]
    c = config or PRODUCT[0 if holds_large(rows.scale.device) else 1]
    columns = min(c.columns, max(16, triton.next_power_of_2(width)))
    out = torch.empty(n_rows, width, dtype=dtype, device=rows.scale.device)
    programs = n_programs(out.device)
    scaled_grouped_kernel[(programs * turns(),)](
        plain(rows.values, [TILE_ROWS, c.depth]),
        plain(w.values, [1, columns, c.depth]),
        ragged(out, [TILE_ROWS, columns // c.pieces]),
        rows.scale, w.scale, tiles.expert_start, tiles.expert, tiles.row, tiles.n_tiles,
        inner, N=width, PER_CHANNEL=w.scale.ndim == 2, BM=TILE_ROWS, BN=columns, BK=c.depth, GROUP=c.group,
        PROGRAMS=programs, TURNS=turns(), FLATTEN=c.flatten, PIECES=c.pieces,
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    return out


def scaled_grouped_reference(rows: Scaled, w: Scaled, tiles: Tiles, dtype: torch.dtype) -> Tensor:
    """`scaled_grouped` in plain PyTorch, expert by expert, in float32."""
    start, scale = tiles.expert_start.tolist(), w.scale if w.scale.ndim == 2 else w.scale[:, None]
    x, matrices = (rows.values.float() * rows.scale[:, None]), w.values.float() * scale[:, :, None]
    out = torch.zeros(x.shape[0], matrices.shape[1], dtype=dtype, device=x.device)
    for e, (a, b) in enumerate(zip(start[:-1], start[1:], strict=True)):
        out[a:b] = x[a:b] @ matrices[e].T
    return out


@triton.jit
def scaled_weight_grad_kernel(
    left_desc, right_desc, out_desc, left_scale_ptr, right_scale_ptr, start_ptr, by_load_ptr, first_ptr,
    E, P: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr, TURNS: tl.constexpr, FLATTEN: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    ROW_TILES: tl.constexpr = (P + BM - 1) // BM
    COLUMN_TILES: tl.constexpr = (N + BN - 1) // BN
    TILES: tl.constexpr = ROW_TILES * COLUMN_TILES
    first_tile, end_tile = my_tiles(E * TILES, PROGRAMS, TURNS)
    for tile in tl.range(first_tile, end_tile, PROGRAMS, flatten=FLATTEN):
        e = tl.load(by_load_ptr + tile // TILES)
        i, j = place(tile % TILES, ROW_TILES, COLUMN_TILES, GROUP)
        first = tl.load(first_ptr + e)
        size = tl.load(start_ptr + e + 1) - tl.load(start_ptr + e)
        acc = tl.zeros([BM, BN], dtype=tl.float32)
        for k in tl.range(first, first + (size + BK - 1) // BK):
            left = left_desc.load([k, i * BM, 0]).reshape([BM, BK])
            right = right_desc.load([k, j * BN, 0]).reshape([BN, BK])
            acc = tl.dot(left, right.T, acc)
        acc = acc * (tl.load(left_scale_ptr + e) * tl.load(right_scale_ptr + e))
        write_matrix(out_desc, e, i * BM, j * BN, acc, PIECES)


def scaled_weight_grad(
    left: Scaled, right: Scaled, tiles: Tiles, dtype: torch.dtype, *, config: WeightGradConfig | None = None
) -> Tensor:
    """Compute `left[rows of e].T @ right[rows of e]` for each expert e, from transposed row tiles.

    Args:
        left: (N_TILES, P, 128), from `transpose_rows`.
        right: (N_TILES, N, 128).
        tiles: of the rows.
        dtype: of the result.
        config: tile sizes.

    Returns:
        (E, P, N); zero for an expert without rows.
    """
    n_experts, height, n_columns = tiles.expert_start.numel() - 1, left.values.shape[1], right.values.shape[1]
    c = config or WEIGHT_GRAD[0 if holds_large(left.scale.device) else 1]
    width = min(c.width, max(16, triton.next_power_of_2(n_columns)))
    out = torch.empty(n_experts, height, n_columns, dtype=dtype, device=left.scale.device)
    programs = n_programs(out.device)
    scaled_weight_grad_kernel[(programs * turns(),)](
        plain(left.values, [1, c.height, TILE_ROWS]),
        plain(right.values, [1, width, TILE_ROWS]),
        plain(out, [1, c.height, width // c.pieces]),
        left.scale, right.scale, tiles.expert_start, tiles.by_load, tiles.first,
        n_experts, P=height, N=n_columns, BM=c.height, BN=width, BK=TILE_ROWS, GROUP=c.group,
        PROGRAMS=programs, TURNS=turns(), FLATTEN=c.flatten, PIECES=c.pieces,
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    return out


def scaled_weight_grad_reference(left: Scaled, right: Scaled, tiles: Tiles, dtype: torch.dtype) -> Tensor:
    """`scaled_weight_grad` in plain PyTorch, for (M, P) and (M, N) rows: the operands before `transpose_rows`."""
    start = tiles.expert_start.tolist()
    spans = list(zip(start[:-1], start[1:], strict=True))
    a, b = (rescaled_reference(side, spans) for side in (left, right))
    return torch.stack([a[i:j].T @ b[i:j] for i, j in spans]).to(dtype)
