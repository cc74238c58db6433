"""Symmetric products on Hopper, with loads, products and stores of different tiles at the same time.

The same as `symmetric.symmetric_product` in bfloat16, in Gluon (Triton's lower level). A program is one warp that loads
and two warp groups that multiply, each a block of 128 x 128 of a tile that is two blocks high. They meet at barriers
alone: the loads run up to STAGES steps ahead, through the ends of tiles, and the second group stays LAG steps behind
the first, so that while one stores its block and the block's copy, the other has the tensor cores. Where the first
group's block lies above the diagonal, it only lets the steps pass: half a tile, which takes half the time.

Shapes: N matrices of S rows and K columns in one batch.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from llmfoundry.kernels.tiles import n_programs
from llmfoundry.kernels.whole import cdiv

BLOCK, DEPTH, STAGES, PIECES, LAG = 128, 64, 4, 4, 2
BACKWARDS = False


@gluon.jit
def _place(tile, n_tiles, TILES: gl.constexpr, BACKWARDS: gl.constexpr):
    """Tile number -> matrix, row of tiles that are two blocks high, column of blocks.

    Row i begins with tile i (i + 1). Each matrix begins with another tile, so that all programs get halves.
    """
    n = tile // TILES
    t = (tile - n * TILES + n) % TILES
    if BACKWARDS:
        n = n_tiles // TILES - 1 - n
    i = ((gl.sqrt(4 * t.to(gl.float32) + 1) - 1) / 2).to(gl.int32)
    i = gl.where(i * (i + 1) > t, i - 1, i)  # the root may be rounded
    i = gl.where((i + 1) * (i + 2) <= t, i + 1, i)
    return n, i, t - i * (i + 1)


@gluon.jit
def _load(
    left_desc, right_desc, first_ring, second_ring, right_ring, full, empty, n_tiles, K,
    COLUMNS: gl.constexpr, TILES: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr, DEPTH: gl.constexpr,
    BLOCK: gl.constexpr, BACKWARDS: gl.constexpr,
):  # fmt: skip
    step = 0
    for tile in range(gl.program_id(0), n_tiles, PROGRAMS):
        n, i, j = _place(tile, n_tiles, TILES, BACKWARDS)
        row = 2 * i * BLOCK
        for k in range(0, K, DEPTH):
            slot = step % STAGES
            mbarrier.wait(empty.index(slot), (step // STAGES & 1) ^ 1)
            bar = full.index(slot)
            if j <= 2 * i:
                mbarrier.expect(bar, 2 * left_desc.block_type.nbytes + right_desc.block_type.nbytes)
                if COLUMNS:
                    tma.async_copy_global_to_shared(left_desc, [n, k, row], bar, first_ring.index(slot))
                else:
                    tma.async_copy_global_to_shared(left_desc, [n, row, k], bar, first_ring.index(slot))
            else:
                mbarrier.expect(bar, left_desc.block_type.nbytes + right_desc.block_type.nbytes)
            if COLUMNS:
                tma.async_copy_global_to_shared(left_desc, [n, k, row + BLOCK], bar, second_ring.index(slot))
                tma.async_copy_global_to_shared(right_desc, [n, k, j * BLOCK], bar, right_ring.index(slot))
            else:
                tma.async_copy_global_to_shared(left_desc, [n, row + BLOCK, k], bar, second_ring.index(slot))
                tma.async_copy_global_to_shared(right_desc, [n, j * BLOCK, k], bar, right_ring.index(slot))
            step += 1


@gluon.jit
def _multiply(
    left_ring, right_ring, full, empty, ahead, out_desc, copy_desc, plus_ptr, block, copy, alpha, beta, diagonal,
    n_tiles, S, K, SECOND: gl.constexpr, COLUMNS: gl.constexpr, PLUS: gl.constexpr, ALPHAS: gl.constexpr,
    BETAS: gl.constexpr, TILES: gl.constexpr, PROGRAMS: gl.constexpr, STAGES: gl.constexpr, PIECES: gl.constexpr,
    LAG: gl.constexpr, DEPTH: gl.constexpr, BLOCK: gl.constexpr, BACKWARDS: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    side: gl.constexpr = [left_ring.shape[2], left_ring.shape[3]]
    flat: gl.constexpr = gl.NVMMASharedLayout.get_default_for(side, left_ring.dtype)
    step = 0
    parity = 0
    for tile in range(gl.program_id(0), n_tiles, PROGRAMS):
        n, i, j = _place(tile, n_tiles, TILES, BACKWARDS)
        row = (2 * i + SECOND) * BLOCK
        if SECOND and LAG > 0:
            mbarrier.wait(ahead, parity)
            parity ^= 1
        if (j <= 2 * i + SECOND) & (row < S):
            acc = gl.zeros([BLOCK, BLOCK], gl.float32, layout)
            for k in range(0, K, DEPTH):
                slot = step % STAGES
                mbarrier.wait(full.index(slot), step // STAGES & 1)
                a = left_ring.index(slot)._reinterpret(left_ring.dtype, side, flat)
                b = right_ring.index(slot)._reinterpret(right_ring.dtype, side, flat)
                if COLUMNS:
                    a = a.permute((1, 0))
                else:
                    b = b.permute((1, 0))
                acc = hopper.warpgroup_mma(a, b, acc, is_async=True)
                acc = hopper.warpgroup_mma_wait(1, [acc])
                if k > 0:  # the step before is done
                    mbarrier.arrive(empty.index((step - 1) % STAGES))
                if not SECOND and LAG > 0:
                    mbarrier.arrive(ahead, pred=k == LAG * DEPTH)
                step += 1
            acc = hopper.warpgroup_mma_wait(0, [acc])
            mbarrier.arrive(empty.index((step - 1) % STAGES))
            scale = alpha
            if ALPHAS:
                scale = gl.load(alpha + n)
            more = beta
            if BETAS:
                more = gl.load(beta + n)
            _store(out_desc, copy_desc, plus_ptr, block, copy, acc, scale, more, diagonal, n, row, j * BLOCK, S,
                   PLUS, PIECES)  # fmt: skip
        else:
            for k in range(0, K, DEPTH):
                slot = step % STAGES
                mbarrier.wait(full.index(slot), step // STAGES & 1)
                mbarrier.arrive(empty.index(slot))
                if not SECOND and LAG > 0:
                    mbarrier.arrive(ahead, pred=k == LAG * DEPTH)
                step += 1
    tma.store_wait(0)


@gluon.jit
def _store(
    out_desc, copy_desc, plus_ptr, block, copy, acc, alpha, beta, diagonal, n, row, column, S,
    PLUS: gl.constexpr, PIECES: gl.constexpr,
):  # fmt: skip
    """Store a block, and below the diagonal its copy above, piece by piece of its columns."""
    BLOCK: gl.constexpr = acc.shape[0]
    WIDTH: gl.constexpr = BLOCK // PIECES
    pieces = _split(acc, PIECES)
    layout: gl.constexpr = pieces[0].type.layout
    rows = row + gl.arange(0, BLOCK, gl.SliceLayout(1, layout))[:, None]
    for p in gl.static_range(PIECES):
        columns = column + p * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, layout))[None, :]
        value = pieces[p] * alpha
        if PLUS:
            inside = (rows < S) & (columns < S)
            value += beta * gl.load(plus_ptr + n.to(gl.int64) * S * S + (rows * S + columns), inside, other=0.0).to(
                gl.float32
            )
        if row == column:
            value = gl.where(rows == columns, value + diagonal, value)
        result = value.to(out_desc.dtype)
        if row == column:
            tma.store_wait(0)
            block.store(result.reshape(block.shape))
            hopper.fence_async_shared()
            tma.async_copy_shared_to_global(out_desc, [n, row, column + p * WIDTH], block)
        else:
            tma.store_wait(1)
            block.store(result.reshape(block.shape))
            hopper.fence_async_shared()
            tma.async_copy_shared_to_global(out_desc, [n, row, column + p * WIDTH], block)
            tma.store_wait(1)
            copy.store(result.trans().reshape(copy.shape))
            hopper.fence_async_shared()
            tma.async_copy_shared_to_global(copy_desc, [n, column + p * WIDTH, row], copy)


@gluon.jit
def _split(acc, PIECES: gl.constexpr):
    """An accumulator in 1, 2 or 4 pieces of its columns."""
    if PIECES == 1:
        return (acc,)
    else:
        left, right = acc.reshape([acc.shape[0], 2, acc.shape[1] // 2]).permute(0, 2, 1).split()
        if PIECES == 2:
            return (left, right)
        else:
            a, b = _split(left, 2)
            c, d = _split(right, 2)
            return (a, b, c, d)


@gluon.jit
def symmetric_hopper_kernel(
    left_desc, right_desc, out_desc, copy_desc, plus_ptr, alpha, beta, diagonal, n_tiles, S, K,
    COLUMNS: gl.constexpr, PLUS: gl.constexpr, ALPHAS: gl.constexpr, BETAS: gl.constexpr, TILES: gl.constexpr,
    PROGRAMS: gl.constexpr, STAGES: gl.constexpr, PIECES: gl.constexpr, LAG: gl.constexpr, DEPTH: gl.constexpr,
    BLOCK: gl.constexpr, BACKWARDS: gl.constexpr,
):  # fmt: skip
    first_ring = gl.allocate_shared_memory(left_desc.dtype, [STAGES] + left_desc.block_shape, left_desc.layout)
    second_ring = gl.allocate_shared_memory(left_desc.dtype, [STAGES] + left_desc.block_shape, left_desc.layout)
    right_ring = gl.allocate_shared_memory(left_desc.dtype, [STAGES] + right_desc.block_shape, right_desc.layout)
    blocks = gl.allocate_shared_memory(out_desc.dtype, [2] + out_desc.block_shape, out_desc.layout)
    copies = gl.allocate_shared_memory(out_desc.dtype, [2] + copy_desc.block_shape, copy_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ahead = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=2)
    mbarrier.init(ahead, count=1)
    hopper.fence_async_shared()
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (_multiply, (first_ring, right_ring, full, empty, ahead, out_desc, copy_desc, plus_ptr, blocks.index(0),
                         copies.index(0), alpha, beta, diagonal, n_tiles, S, K, 0, COLUMNS, PLUS, ALPHAS, BETAS, TILES,
                         PROGRAMS, STAGES, PIECES, LAG, DEPTH, BLOCK, BACKWARDS)),
            (_multiply, (second_ring, right_ring, full, empty, ahead, out_desc, copy_desc, plus_ptr, blocks.index(1),
                         copies.index(1), alpha, beta, diagonal, n_tiles, S, K, 1, COLUMNS, PLUS, ALPHAS, BETAS, TILES,
                         PROGRAMS, STAGES, PIECES, LAG, DEPTH, BLOCK, BACKWARDS)),
            (_load, (left_desc, right_desc, first_ring, second_ring, right_ring, full, empty, n_tiles, K,
                     COLUMNS, TILES, PROGRAMS, STAGES, DEPTH, BLOCK, BACKWARDS)),
        ],
        [4, 1],  # warps of the second group, and of the loads; the first group are the program's own
        [240, 24],  # registers of each thread, and 240 for the first group
    )  # fmt: skip


def symmetric_hopper(
    left: Tensor,
    right: Tensor,
    plus: Tensor | None,
    *,
    alpha: float | Tensor,
    beta: float | Tensor,
    diagonal: float,
) -> Tensor:
    """`symmetric.symmetric_product` by this kernel."""
    n, size, inner = left.shape
    by_columns = not left.is_contiguous()
    out = left.new_empty(n, size, size)
    operands = [
        _described(x.mT, [1, DEPTH, BLOCK]) if by_columns else _described(x, [1, BLOCK, DEPTH]) for x in (left, right)
    ]
    rows = cdiv(cdiv(size, BLOCK), 2)
    tiles = rows * (rows + 1)
    programs = n_programs(left.device)
    symmetric_hopper_kernel[(programs,)](
        *operands, _described(out, [1, BLOCK, BLOCK // PIECES]), _described(out, [1, BLOCK // PIECES, BLOCK]),
        out if plus is None else plus, alpha, beta, diagonal, n * tiles, size, inner,
        COLUMNS=by_columns, PLUS=plus is not None, ALPHAS=isinstance(alpha, Tensor), BETAS=isinstance(beta, Tensor),
        TILES=tiles, PROGRAMS=programs, STAGES=STAGES, PIECES=PIECES,
        LAG=LAG if inner >= STAGES * DEPTH else 0,  # fewer steps: the first group could be two tiles ahead
        DEPTH=DEPTH, BLOCK=BLOCK, BACKWARDS=BACKWARDS, num_warps=4,
    )  # fmt: skip
    return out


def _described(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return TensorDescriptor.from_tensor(tensor, block, layout)
