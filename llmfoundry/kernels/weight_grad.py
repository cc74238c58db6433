"""Gradients of the experts' matrices: each expert's rows of one operand, transposed, times those of the other.

Shapes: M rows in expert order, P rows and N columns of a matrix, E experts: left (M, P), right (M, N) -> (E, P, N).
The sum runs over an expert's tokens. Ragged descriptors read zeros after its last row, so tails need no mask. The tiles
of an empty expert are written as the accumulator's initial zeros, so no buffer is cleared.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmfoundry.kernels.tiles import (
    HopperConfig,
    Tiles,
    my_tiles,
    n_programs,
    place,
    plain,
    ragged,
    read_ragged,
    turns,
    write_matrix,
)
from llmfoundry.kernels.whole import next_power_of_2


class WeightGradConfig(NamedTuple):
    """Tile sizes: `height` x `width` of the matrix, and `depth` tokens per step."""

    height: int = 128
    width: int = 256
    depth: int = 64
    group: int = 8
    num_warps: int = 8
    num_stages: int = 3
    flatten: bool = False
    pieces: int = 1  # column pieces in which the accumulator is stored: less staging memory, more stages


@triton.jit
def weight_grad_kernel(
    left_desc, right_desc, out_desc, start_ptr, by_load_ptr, E, P: tl.constexpr, N: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    TURNS: tl.constexpr, FLATTEN: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    ROW_TILES: tl.constexpr = (P + BM - 1) // BM
    COLUMN_TILES: tl.constexpr = (N + BN - 1) // BN
    TILES: tl.constexpr = ROW_TILES * COLUMN_TILES
    first, end_tile = my_tiles(E * TILES, PROGRAMS, TURNS)
    for tile in tl.range(first, end_tile, PROGRAMS, flatten=FLATTEN):
        e = tl.load(by_load_ptr + tile // TILES)
        i, j = place(tile % TILES, ROW_TILES, COLUMN_TILES, GROUP)
        start = tl.load(start_ptr + e)
        size = tl.load(start_ptr + e + 1) - start
        acc = tl.zeros([BM, BN], dtype=tl.float32)
        for k in tl.range(0, size, BK):
            left = read_ragged(left_desc, start, size, k, i * BM)
            right = read_ragged(right_desc, start, size, k, j * BN)
            acc = tl.dot(left.T, right, acc, input_precision="tf32x3")
        write_matrix(out_desc, e, i * BM, j * BN, acc, PIECES)


def weight_grad(
    left: Tensor, right: Tensor, tiles: Tiles, *, config: WeightGradConfig | HopperConfig = WeightGradConfig()
) -> Tensor:
    """Compute `left[rows of e].T @ right[rows of e]` for each expert e.

    Args:
        left: (M, P) in expert order.
        right: (M, N) in expert order.
        tiles: of the rows.
        config: tile sizes.

    Returns:
        (E, P, N) in the dtype of `left`; zero for an expert without rows.
    """
    if isinstance(config, HopperConfig):
        from llmfoundry.kernels.hopper import weight_grad_hopper  # imported here because Gluon is experimental

        return weight_grad_hopper(left, right, tiles, config=config)
    n_experts = tiles.expert_start.numel() - 1
    c = config
    width = min(c.width, max(16, next_power_of_2(right.shape[1])))
    out = left.new_empty(n_experts, left.shape[1], right.shape[1])
    programs = n_programs(left.device)
    weight_grad_kernel[(programs * turns(),)](
        ragged(left, [c.depth, c.height]),
        ragged(right, [c.depth, width]),
        plain(out, [1, c.height, width // c.pieces]),
        tiles.expert_start, tiles.by_load, n_experts, P=left.shape[1], N=right.shape[1],
        BM=c.height, BN=width, BK=c.depth, GROUP=c.group, PROGRAMS=programs, TURNS=turns(), FLATTEN=c.flatten,
        PIECES=c.pieces,
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    return out


def weight_grad_reference(left: Tensor, right: Tensor, tiles: Tiles) -> Tensor:
    """`weight_grad` in plain PyTorch, expert by expert."""
    start = tiles.expert_start.tolist()
    return torch.stack([left[a:b].T @ right[a:b] for a, b in zip(start[:-1], start[1:], strict=True)])
