"""Products that are known to be symmetric: only tiles on and below the diagonal are computed, the others are copies.

That is half of the FLOPs of nearly all products of Muon's iteration (kernels/muon.py). Operands come by TMA. A tile is
small enough that two programs share an SM: one writes its tile and the copy while the other multiplies.

Shapes: N matrices of S rows and K columns in one batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmfoundry.kernels.whole import cdiv

try:
    import triton
    import triton.language as tl

    from llmfoundry.kernels.tiles import plain
except ImportError:  # CPU builds of torch come without it
    triton = None

Scale = float | Tensor  # of all matrices, or (N,) float32: of each


def symmetric_product(
    left: Tensor,
    right: Tensor | None = None,
    plus: Tensor | None = None,
    *,
    alpha: Scale = 1.0,
    beta: Scale = 0.0,
    diagonal: float = 0.0,
) -> Tensor:
    """`alpha left right^T + beta plus + diagonal I`, where that is symmetric; the part below the diagonal counts.

    Args:
        left: (N, S, K), contiguous, or the transpose of what is; bfloat16 or float32 for the kernel.
        right: as `left`; None: `left`. Of two different matrices the product must be symmetric, as it is of two
            symmetric ones that commute.
        plus: (N, S, S), symmetric and contiguous, of the same dtype.

    Returns:
        (N, S, S) in the dtype of `left`, symmetric to the bit; sums are in float32, or in that of `left` on CPUs.
    """
    right = left if right is None else right
    run = symmetric_triton if left.is_cuda and _has_descriptors(left) else symmetric_reference
    return run(left, right, plus, alpha=alpha, beta=beta, diagonal=diagonal)


def _has_descriptors(left: Tensor) -> bool:
    """Whether TMA reads and writes these: rows begin at multiples of 16 bytes."""
    sides = left.shape[1:] if left.is_contiguous() else left.shape[1:2]
    return left.dtype in (torch.bfloat16, torch.float32) and all(side * left.itemsize % 16 == 0 for side in sides)


def symmetric_reference(
    left: Tensor, right: Tensor, plus: Tensor | None, *, alpha: Scale, beta: Scale, diagonal: float
) -> Tensor:
    """`symmetric_product` in plain PyTorch."""
    out = (left @ right.mT).mul_(_of_each(alpha))
    if plus is not None:
        out.add_(plus * _of_each(beta))
    if diagonal:
        out.diagonal(dim1=1, dim2=2).add_(diagonal)
    return out.tril_().add_(out.tril(-1).mT)


def _of_each(scale: Scale) -> Scale:
    return scale[:, None, None] if isinstance(scale, Tensor) else scale


if triton is not None:
    BLOCK, DEPTH_BYTES = 128, 128
    BACKWARDS = False
    TILES, WARPS, STAGES = 1, 8, 3  # 96 KiB of shared memory and 128 registers: two programs on an SM

    @triton.jit
    def symmetric_kernel(
        left_desc, right_desc, plus_desc, out_desc, alpha, beta, diagonal, S, K,
        COLUMNS: tl.constexpr, PLUS: tl.constexpr, ALPHAS: tl.constexpr, BETAS: tl.constexpr, BACKWARDS: tl.constexpr,
        BLOCK: tl.constexpr, TILES: tl.constexpr, DEPTH: tl.constexpr,
    ):  # fmt: skip
        # TILES rows of tiles that are TILES blocks wide are a step of the triangle; t = TILES i (i + 1) / 2 begins it.
        t, n = tl.program_id(0), tl.program_id(1)
        if BACKWARDS:
            n = tl.num_programs(1) - 1 - n
        step = ((tl.sqrt(8 * (t // TILES).to(tl.float32) + 1) - 1) / 2).to(tl.int32)
        step = tl.where(step * (step + 1) // 2 > t // TILES, step - 1, step)  # the root may be rounded
        step = tl.where((step + 1) * (step + 2) // 2 <= t // TILES, step + 1, step)
        inside = t - TILES * (step * (step + 1) // 2)
        i, j = step * TILES + inside % TILES, inside // TILES * TILES
        if i * BLOCK >= S:
            return
        acc = tl.zeros((BLOCK, TILES * BLOCK), tl.float32)
        for k in tl.range(0, K, DEPTH):
            if COLUMNS:
                a = left_desc.load([n, k, i * BLOCK]).reshape([DEPTH, BLOCK]).T
                b = right_desc.load([n, k, j * BLOCK]).reshape([DEPTH, TILES * BLOCK])
            else:
                a = left_desc.load([n, i * BLOCK, k]).reshape([BLOCK, DEPTH])
                b = right_desc.load([n, j * BLOCK, k]).reshape([TILES * BLOCK, DEPTH]).T
            acc = tl.dot(a, b, acc, input_precision="tf32x3")
        if ALPHAS:
            alpha = tl.load(alpha + n)
        if BETAS:
            beta = tl.load(beta + n)
        acc *= alpha
        if TILES == 1:
            write_block(plus_desc, out_desc, acc, beta, diagonal, n, i, j, PLUS)
        else:
            near, far = acc.reshape([BLOCK, TILES, BLOCK]).permute(0, 2, 1).split()
            write_block(plus_desc, out_desc, near, beta, diagonal, n, i, j, PLUS)
            if j < i:
                write_block(plus_desc, out_desc, far, beta, diagonal, n, i, j + 1, PLUS)

    @triton.jit
    def write_block(plus_desc, out_desc, acc, beta, diagonal, n, i, j, PLUS: tl.constexpr):
        """Store block (i, j) and, below the diagonal, its copy above."""
        BLOCK: tl.constexpr = acc.shape[0]
        if PLUS:
            acc += beta * plus_desc.load([n, i * BLOCK, j * BLOCK]).reshape([BLOCK, BLOCK]).to(tl.float32)
        if i == j:
            rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
            acc = tl.where(rows == columns, acc + diagonal, acc)
            result = acc.to(out_desc.dtype)  # tensor cores may sum (a, b) in another order than (b, a)
            result = tl.where(rows >= columns, result, tl.trans(result))
            out_desc.store([n, i * BLOCK, j * BLOCK], result.reshape([1, BLOCK, BLOCK]))
        else:
            result = acc.to(out_desc.dtype)
            out_desc.store([n, i * BLOCK, j * BLOCK], result.reshape([1, BLOCK, BLOCK]))
            out_desc.store([n, j * BLOCK, i * BLOCK], tl.trans(result).reshape([1, BLOCK, BLOCK]))


def symmetric_triton(
    left: Tensor, right: Tensor, plus: Tensor | None, *, alpha: Scale, beta: Scale, diagonal: float
) -> Tensor:
    """`symmetric_product` by the kernel."""
    n, size, inner = left.shape
    by_columns = not left.is_contiguous()
    depth = DEPTH_BYTES // left.itemsize
    out = left.new_empty(n, size, size)
    block = plain(out, [1, BLOCK, BLOCK])
    if by_columns:
        operands = [plain(x.mT, [1, depth, width]) for x, width in ((left, BLOCK), (right, TILES * BLOCK))]
    else:
        operands = [plain(x, [1, height, depth]) for x, height in ((left, BLOCK), (right, TILES * BLOCK))]
    steps = cdiv(cdiv(size, BLOCK), TILES)
    symmetric_kernel[(TILES * steps * (steps + 1) // 2, n)](
        *operands, block if plus is None else plain(plus, [1, BLOCK, BLOCK]), block, alpha, beta, diagonal,
        size, inner, COLUMNS=by_columns, PLUS=plus is not None, ALPHAS=isinstance(alpha, Tensor),
        BETAS=isinstance(beta, Tensor), BACKWARDS=BACKWARDS, BLOCK=BLOCK, TILES=TILES, DEPTH=depth,
        num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out
