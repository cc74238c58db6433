"""Products known to be symmetric: only tiles on and below the diagonal are computed, the others are copied.

This halves the FLOPs of nearly all products in Muon's iteration (kernels/muon.py). TMA loads operands and stores
results. A tile is small enough that two programs share an SM: one can store its tile and the copy while the other
multiplies.

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
except ImportError:  # CPU builds of torch do not include it
    triton = None

Scale = float | Tensor  # for all matrices, or (N,) float32, one per matrix


def symmetric_product(
    left: Tensor,
    right: Tensor | None = None,
    plus: Tensor | None = None,
    *,
    alpha: Scale = 1.0,
    beta: Scale = 0.0,
    diagonal: float = 0.0,
) -> Tensor:
    """Compute `alpha left right^T + beta plus + diagonal I`, which must be symmetric; uses the part below the diagonal.

    Args:
        left: (N, S, K), contiguous or the transpose of a contiguous tensor; bfloat16 or float32 for the kernel.
        right: as `left`; None: `left`. The product of two different matrices must be symmetric, as is that of two
            symmetric ones that commute.
        plus: (N, S, S), symmetric and contiguous, of the same dtype.
        alpha: factor on the product.
        beta: factor on `plus`.
        diagonal: factor on the identity.

    Returns:
        (N, S, S) in the dtype of `left`, bitwise symmetric; accumulated in float32, or in the dtype of `left` on CPUs.
    """
    right = left if right is None else right
    run = symmetric_triton if left.is_cuda and _has_descriptors(left) else symmetric_reference
    return run(left, right, plus, alpha=alpha, beta=beta, diagonal=diagonal)


def _has_descriptors(left: Tensor) -> bool:
    """Return whether TMA can access these tensors: rows must start at multiples of 16 bytes."""
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
    # Two programs share an SM: 96 KiB of shared memory and 128 registers per thread.
    BLOCK, DEPTH_BYTES, WARPS, STAGES = 128, 128, 8, 3

    @triton.jit
    def symmetric_kernel(
        left_desc, right_desc, plus_desc, out_desc, alpha, beta, diagonal, S, K,
        COLUMNS: tl.constexpr, PLUS: tl.constexpr, ALPHAS: tl.constexpr, BETAS: tl.constexpr, BLOCK: tl.constexpr,
        DEPTH: tl.constexpr,
    ):  # fmt: skip
        # Block t of the triangle is in block row i, which starts at t = i (i + 1) / 2.
        t, n = tl.program_id(0), tl.program_id(1)
        i = ((tl.sqrt(8 * t.to(tl.float32) + 1) - 1) / 2).to(tl.int32)
        i = tl.where(i * (i + 1) // 2 > t, i - 1, i)  # the root may be inexact
        i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)
        row, column = i * BLOCK, (t - i * (i + 1) // 2) * BLOCK
        acc = tl.zeros((BLOCK, BLOCK), tl.float32)
        for k in tl.range(0, K, DEPTH):
            if COLUMNS:
                left = left_desc.load([n, k, row]).reshape([DEPTH, BLOCK]).T
                right = right_desc.load([n, k, column]).reshape([DEPTH, BLOCK])
            else:
                left = left_desc.load([n, row, k]).reshape([BLOCK, DEPTH])
                right = right_desc.load([n, column, k]).reshape([BLOCK, DEPTH]).T
            acc = tl.dot(left, right, acc, input_precision="tf32x3")
        if ALPHAS:
            alpha = tl.load(alpha + n)
        acc *= alpha
        if PLUS:
            if BETAS:
                beta = tl.load(beta + n)
            acc += beta * plus_desc.load([n, row, column]).reshape([BLOCK, BLOCK]).to(tl.float32)
        if row == column:
            rows, columns = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
            result = tl.where(rows == columns, acc + diagonal, acc).to(out_desc.dtype)
            result = tl.where(rows >= columns, result, tl.trans(result))
            out_desc.store([n, row, column], result.reshape([1, BLOCK, BLOCK]))
        else:
            result = acc.to(out_desc.dtype)
            out_desc.store([n, row, column], result.reshape([1, BLOCK, BLOCK]))
            out_desc.store([n, column, row], tl.trans(result).reshape([1, BLOCK, BLOCK]))


def symmetric_triton(
    left: Tensor, right: Tensor, plus: Tensor | None, *, alpha: Scale, beta: Scale, diagonal: float
) -> Tensor:
    """`symmetric_product` by the Triton kernel."""
    n, size, inner = left.shape
    by_columns = not left.is_contiguous()
    depth = DEPTH_BYTES // left.itemsize
    out = left.new_empty(n, size, size)
    square, side = [1, BLOCK, BLOCK], [1, depth, BLOCK] if by_columns else [1, BLOCK, depth]
    blocks = cdiv(size, BLOCK)
    symmetric_kernel[(blocks * (blocks + 1) // 2, n)](
        *(plain(x.mT if by_columns else x, side) for x in (left, right)),
        plain(out if plus is None else plus, square), plain(out, square), alpha, beta, diagonal, size, inner,
        COLUMNS=by_columns, PLUS=plus is not None, ALPHAS=isinstance(alpha, Tensor), BETAS=isinstance(beta, Tensor),
        BLOCK=BLOCK, DEPTH=depth, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out
