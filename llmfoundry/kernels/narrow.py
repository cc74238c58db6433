"""Products of an adapter's width: rows times their expert's narrow matrix, and the gradients of such matrices.

Shapes: T tokens, K top_k, M = T*K rows in expert order, J inner width, r rank, E experts.
These products are bound by reading the wide operand. With an `order`, it is given as tokens and read by index: a
token's K rows are then read from the L2 cache, whereas gathered rows would come from memory.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from llmfoundry.kernels.grouped import grouped_reference
from llmfoundry.kernels.routing import Order
from llmfoundry.kernels.tiles import TILE_ROWS, Tiles
from llmfoundry.kernels.weight_grad import weight_grad_reference
from llmfoundry.kernels.whole import cdiv, next_power_of_2

MOST_RANKS = 64  # maximum adapter columns per program; more would spill registers


class NarrowConfig(NamedTuple):
    """Tile sizes of `narrow`: `depth` of the inner dim per step."""

    depth: int = 64
    num_warps: int = 4
    num_stages: int = 4


class NarrowGradConfig(NamedTuple):
    """Tile sizes of `narrow_grad`: `width` columns of the wide operand, `depth` rows per step."""

    width: int = 128
    depth: int = 64
    num_warps: int = 4
    num_stages: int = 3


@triton.jit
def narrow_kernel(
    rows_ptr, w_ptr, out_ptr, row_slot_ptr, start_ptr, expert_ptr, row_ptr, count_ptr, scale, J, R,
    K: tl.constexpr, TRANSPOSED: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    if i < tl.load(count_ptr):
        e = tl.load(expert_ptr + i).to(tl.int64)
        rows = tl.load(row_ptr + i) + tl.arange(0, BM)
        inside = rows < tl.load(start_ptr + e + 1)
        source = rows if K == 0 else tl.load(row_slot_ptr + rows, mask=inside, other=0) // K
        left = rows_ptr + source.to(tl.int64)[:, None] * J
        r = tl.program_id(1) * BR + tl.arange(0, BR)
        acc = tl.zeros([BM, BR], dtype=tl.float32)
        for k in tl.range(0, J, BK):
            at = k + tl.arange(0, BK)
            x = tl.load(left + at[None, :], mask=inside[:, None] & (at < J)[None, :], other=0.0)
            if TRANSPOSED:
                to_w = w_ptr + e * J * R + at[:, None] * R + r[None, :]
                w = tl.load(to_w, mask=(at < J)[:, None] & (r < R)[None, :], other=0.0)
            else:
                to_w = w_ptr + e * J * R + r[:, None] * J + at[None, :]
                w = tl.load(to_w, mask=(r < R)[:, None] & (at < J)[None, :], other=0.0).T
            acc = tl.dot(x, w, acc, input_precision="tf32x3")
        to_out = out_ptr + rows.to(tl.int64)[:, None] * R + r[None, :]
        tl.store(to_out, (acc * scale).to(out_ptr.dtype.element_ty), mask=inside[:, None] & (r < R)[None, :])


def narrow(
    rows: Tensor,
    w: Tensor,
    tiles: Tiles,
    n_rows: int,
    *,
    scale: float = 1.0,
    order: Order | None = None,
    transposed: bool = False,
    config: NarrowConfig = NarrowConfig(),
) -> Tensor:
    """Multiply each row by its expert's narrow matrix and by `scale`.

    Args:
        rows: (M, J) in expert order; with `order`, tokens (T, J).
        w: (E, r, J), applied as `rows @ w[e].T`; or `transposed` (E, J, r), as `rows @ w[e]`.
        tiles: of the rows.
        n_rows: M.
        scale: factor on the result.
        order: of the rows, if `rows` are tokens.
        transposed: the layout of `w`.
        config: tile sizes.

    Returns:
        (M, r) in the dtype of `rows`; rows after the last expert's are unset.
    """
    inner, rank = rows.shape[1], w.shape[2] if transposed else w.shape[1]
    out, block = rows.new_empty(n_rows, rank), _block(rank)
    slots, top_k = _index(rows, order)
    narrow_kernel[(tiles.expert.numel(), cdiv(rank, block))](
        rows, w, out, slots, tiles.expert_start, tiles.expert, tiles.row, tiles.n_tiles, scale, inner, rank,
        K=top_k, TRANSPOSED=transposed, BM=TILE_ROWS, BR=block, BK=config.depth,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def narrow_reference(
    rows: Tensor, w: Tensor, tiles: Tiles, n_rows: int, *, scale: float = 1.0, order: Order | None = None,
    transposed: bool = False,
) -> Tensor:  # fmt: skip
    """`narrow` in plain PyTorch, expert by expert."""
    return scale * grouped_reference(_rows(rows, order, n_rows), w, tiles, transposed=transposed)


@triton.jit
def narrow_grad_kernel(
    rows_ptr, u_ptr, out_ptr, row_slot_ptr, start_ptr, by_load_ptr, J, R,
    K: tl.constexpr, WIDE_FIRST: tl.constexpr, BJ: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    # By index, all experts process a block of columns together, which the L2 cache holds: 16,384 tokens of 128 columns
    # in bfloat16 are 4 MB. Rows in expert order are read by only one expert, so its column blocks run together.
    e = tl.load(by_load_ptr + tl.program_id(0 if K > 0 else 1)).to(tl.int64)
    columns = tl.program_id(1 if K > 0 else 0) * BJ + tl.arange(0, BJ)
    r = tl.program_id(2) * BR + tl.arange(0, BR)
    start = tl.load(start_ptr + e)
    end = tl.load(start_ptr + e + 1)
    rows = start + tl.arange(0, BK)
    acc = tl.zeros([BJ, BR], dtype=tl.float32)
    # Token ids are loaded one step ahead: loaded where they are used, they would leave only two pipeline stages.
    source = rows if K == 0 else tl.load(row_slot_ptr + rows, mask=rows < end, other=0) // K
    for first in tl.range(start, end, BK):
        rows = first + tl.arange(0, BK)
        inside = (rows < end)[:, None]
        to_x = rows_ptr + source.to(tl.int64)[:, None] * J + columns[None, :]
        x = tl.load(to_x, mask=inside & (columns < J)[None, :], other=0.0)
        to_u = u_ptr + rows.to(tl.int64)[:, None] * R + r[None, :]
        u = tl.load(to_u, mask=inside & (r < R)[None, :], other=0.0)
        ahead = rows + BK
        source = ahead if K == 0 else tl.load(row_slot_ptr + ahead, mask=ahead < end, other=0) // K
        acc = tl.dot(x.T, u, acc, input_precision="tf32x3")
    at = columns[:, None] * R + r[None, :] if WIDE_FIRST else columns[:, None] + r[None, :] * J
    inside = (columns < J)[:, None] & (r < R)[None, :]
    tl.store(out_ptr + e * J * R + at, acc.to(out_ptr.dtype.element_ty), mask=inside)


def narrow_grad(
    rows: Tensor,
    u: Tensor,
    tiles: Tiles,
    *,
    wide_first: bool,
    order: Order | None = None,
    config: NarrowGradConfig = NarrowGradConfig(),
) -> Tensor:
    """Compute `rows[of e].T @ u[of e]` for each expert e, or its transpose.

    Args:
        rows: (M, J) in expert order; with `order`, tokens (T, J).
        u: (M, r) in expert order.
        tiles: of the rows.
        wide_first: the layout of the result.
        order: of the rows, if `rows` are tokens.
        config: tile sizes.

    Returns:
        (E, J, r) if `wide_first`, else (E, r, J), in the dtype of `rows`; zero for an expert without rows.
    """
    n_experts, inner, rank = tiles.expert_start.numel() - 1, rows.shape[1], u.shape[1]
    out, block = rows.new_empty((n_experts, inner, rank) if wide_first else (n_experts, rank, inner)), _block(rank)
    slots, top_k = _index(rows, order)
    grid = (n_experts, cdiv(inner, config.width))
    narrow_grad_kernel[(*(grid if order is not None else grid[::-1]), cdiv(rank, block))](
        rows, u, out, slots, tiles.expert_start, tiles.by_load, inner, rank,
        K=top_k, WIDE_FIRST=wide_first, BJ=config.width, BR=block, BK=config.depth,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def narrow_grad_reference(
    rows: Tensor, u: Tensor, tiles: Tiles, *, wide_first: bool, order: Order | None = None
) -> Tensor:
    """`narrow_grad` in plain PyTorch, expert by expert."""
    out = weight_grad_reference(_rows(rows, order, u.shape[0]), u, tiles)
    return out if wide_first else out.transpose(1, 2)


def _block(rank: int) -> int:
    return min(MOST_RANKS, max(16, next_power_of_2(rank)))


def _index(rows: Tensor, order: Order | None) -> tuple[Tensor | None, int]:
    """Return the slots of the rows and the number of slots per token; 0 if `rows` are in expert order."""
    return (None, 0) if order is None else (order.row_slot, order.row_slot.numel() // rows.shape[0])


def _rows(rows: Tensor, order: Order | None, n_rows: int) -> Tensor:
    slots, top_k = _index(rows, order)
    return rows if slots is None else rows[slots[:n_rows].long() // top_k]
