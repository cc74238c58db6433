"""Products of matrices with themselves: only the tiles on and below the diagonal are computed, the others are copies.

That is half of the FLOPs of two of the three products of a Newton-Schulz step (kernels/muon.py). Not measured on a GPU
yet, so it is an option and no default.

Shapes: N matrices of S rows and K columns in one batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it
    triton = None


def symmetric_product(x: Tensor, plus: Tensor | None = None, *, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """`alpha x x^T + beta plus`, symmetric to the bit on GPUs.

    Args:
        x: (N, S, K), strided in any way; bfloat16 or float32 on GPUs.
        plus: (N, S, S), symmetric and contiguous, of the same dtype.

    Returns:
        (N, S, S) in the dtype of `x`; sums are in float32, or in that of `x` on CPUs.
    """
    run = symmetric_triton if x.is_cuda and x.dtype != torch.float64 else symmetric_reference
    return run(x, plus, alpha=alpha, beta=beta)


def symmetric_reference(x: Tensor, plus: Tensor | None, *, alpha: float, beta: float) -> Tensor:
    """`symmetric_product` in plain PyTorch."""
    if plus is None:
        return (x @ x.mT).mul_(alpha)
    return torch.baddbmm(plus, x, x.mT, beta=beta, alpha=alpha)


if triton is not None:
    BLOCK, DEPTH_BYTES, WARPS, STAGES = 128, 128, 8, 4  # 128 KiB of shared memory

    @triton.jit
    def symmetric_kernel(
        x_ptr, plus_ptr, out_ptr, S, K, matrix_stride, row_stride, column_stride, alpha, beta,
        PLUS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
    ):  # fmt: skip
        # Tile t of the triangle is in row i of tiles, which t = i (i + 1) / 2 begins.
        t = tl.program_id(0)
        i = ((tl.sqrt(8 * t.to(tl.float32) + 1) - 1) / 2).to(tl.int32)
        i = tl.where(i * (i + 1) // 2 > t, i - 1, i)  # the root may be rounded
        i = tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)
        j = t - i * (i + 1) // 2
        n = tl.program_id(1).to(tl.int64)
        rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
        x_ptr += n * matrix_stride
        total = tl.zeros((BLOCK, BLOCK), tl.float32)
        for start in tl.range(0, K, DEPTH):
            k = start + tl.arange(0, DEPTH)
            left = tl.load(x_ptr + rows[:, None] * row_stride + k[None, :] * column_stride,
                           (rows < S)[:, None] & (k < K)[None, :], other=0.0)  # fmt: skip
            right = tl.load(x_ptr + columns[None, :] * row_stride + k[:, None] * column_stride,
                            (columns < S)[None, :] & (k < K)[:, None], other=0.0)  # fmt: skip
            total = tl.dot(left, right, total, input_precision="tf32x3")
        total *= alpha
        at = rows[:, None] * S + columns[None, :]
        inside = (rows < S)[:, None] & (columns < S)[None, :]
        begin = n * S * S
        if PLUS:
            total += beta * tl.load(plus_ptr + begin + at, inside, other=0.0).to(tl.float32)
        result = total.to(out_ptr.dtype.element_ty)
        if i == j:  # tensor cores may sum (a, b) in another order than (b, a): the lower triangle counts
            result = tl.where(rows[:, None] >= columns[None, :], result, tl.trans(result))
        tl.store(out_ptr + begin + at, result, inside)
        if i != j:
            across = columns[:, None] * S + rows[None, :]
            tl.store(out_ptr + begin + across, tl.trans(result), (columns < S)[:, None] & (rows < S)[None, :])


def symmetric_triton(x: Tensor, plus: Tensor | None, *, alpha: float, beta: float) -> Tensor:
    """`symmetric_product` by the kernel."""
    n, size, depth = x.shape
    tiles = triton.cdiv(size, BLOCK)
    out = x.new_empty(n, size, size)
    symmetric_kernel[(tiles * (tiles + 1) // 2, n)](
        x, out if plus is None else plus, out, size, depth, *x.stride(), alpha, beta,
        PLUS=plus is not None, BLOCK=BLOCK, DEPTH=DEPTH_BYTES // x.itemsize, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out
