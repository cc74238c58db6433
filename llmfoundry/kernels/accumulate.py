"""Sums of gradients: in bfloat16, rounded at random so that small terms are not lost; and of several ranks, in float32.

Rounded to the nearest, a term below 1/256 of the sum changes nothing, and the sum of many microbatches is too small.
Rounded up with the probability of what is cut off, the sum is right on average. The random bits are a hash of the
value's position and of a number that differs from sum to sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmfoundry.kernels.update import hashed, rounded

try:
    import triton
    import triton.language as tl

    from llmfoundry.kernels.update import hash_bits, round_bits
except ImportError:  # CPU builds of torch come without it
    triton = None


@torch.library.custom_op("llmfoundry::add_rounded_", mutates_args=("total",))
def add_rounded_(total: Tensor, x: Tensor, key: int) -> None:
    """`total += x`, in place, rounded at random.

    Args:
        total: bfloat16, of fewer than 2**32 values.
        x: bfloat16, of the same shape.
        key: of 32 bits, another one for each sum (`key_of`).
    """
    (add_triton if total.is_cuda and total.is_contiguous() else add_reference)(total, x, key)


def key_of(*numbers: int) -> int:
    """32 bits that depend on all of these numbers and their order."""
    key = 0
    for number in numbers:
        for part in (number & 0xFFFFFFFF, number >> 32):
            key = ((key ^ part) * 0x9E3779B1 + 0x7F4A7C15) & 0xFFFFFFFF
            key ^= key >> 15
    return key


def add_reference(total: Tensor, x: Tensor, key: int) -> None:
    """`add_rounded_` in plain PyTorch."""
    at = torch.arange(total.numel(), device=total.device).view(total.shape)
    noise = hashed(at ^ key)
    exact = total.float() + x.float()
    total.copy_(torch.where(exact.isfinite(), rounded(exact, noise & 0xFFFF), exact.bfloat16()))


def sum_parts(parts: Tensor, total: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """The sum of the rows of `parts`, in their order and in float32 at least, and of what was there before.

    Args:
        parts: (N, n), contiguous.
        total: of n values, contiguous, float32 or wider, which are added to in place; None begins with zero.
        dtype: of a new sum, which is rounded once; None: that of `parts`, at least float32.

    Returns:
        `total`, or (n,).
    """
    begins = total is None
    if total is None:
        dtype = torch.promote_types(parts.dtype, torch.float32) if dtype is None else dtype
        total = parts.new_empty(parts.shape[1], dtype=dtype)
    _add_parts(total, parts, begins)
    return total


@torch.library.custom_op("llmfoundry::add_parts_", mutates_args=("total",))
def _add_parts(total: Tensor, parts: Tensor, begins: bool) -> None:
    (add_parts_triton if total.is_cuda else add_parts_reference)(total, parts, begins)


def add_parts_reference(total: Tensor, parts: Tensor, begins: bool) -> None:
    """`sum_parts` in plain PyTorch."""
    wide = torch.promote_types(torch.promote_types(parts.dtype, total.dtype), torch.float32)
    first, *others = parts.to(wide)
    for part in others:
        first = first + part
    (total.copy_ if begins else total.add_)(first.view_as(total))


if triton is not None:
    _BLOCK = 4096

    @triton.jit
    def add_parts_kernel(total_ptr, parts_ptr, n, N: tl.constexpr, BEGINS: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < n
        at = parts_ptr + i
        wide = tl.float64 if parts_ptr.dtype.element_ty == tl.float64 else tl.float32
        total = tl.load(at, inside, other=0.0).to(wide)
        for _ in tl.static_range(1, N):
            at += n
            total += tl.load(at, inside, other=0.0).to(wide)
        if not BEGINS:
            total = tl.load(total_ptr + i, inside, other=0.0) + total
        tl.store(total_ptr + i, total, inside)

    @triton.jit(do_not_specialize=["key"])
    def add_kernel(total_ptr, x_ptr, n, key, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < n
        total, x = tl.load(total_ptr + i, inside, other=0.0), tl.load(x_ptr + i, inside, other=0.0)
        noise = hash_bits(i.to(tl.uint32) ^ key.to(tl.uint32))
        exact = total.to(tl.float32) + x.to(tl.float32)
        finite = tl.abs(exact) < float("inf")
        tl.store(total_ptr + i, tl.where(finite, round_bits(exact, noise & 0xFFFF), exact.to(tl.bfloat16)), inside)


def add_triton(total: Tensor, x: Tensor, key: int) -> None:
    """`add_rounded_` by the kernel; `total` is contiguous."""
    n = total.numel()
    add_kernel[(triton.cdiv(n, _BLOCK),)](total, x.contiguous(), n, key, BLOCK=_BLOCK, num_warps=8)


def add_parts_triton(total: Tensor, parts: Tensor, begins: bool) -> None:
    """`sum_parts` by the kernel, in float32, or float64 where the parts are."""
    ranks, n = parts.shape
    if n == 0:
        return
    add_parts_kernel[(triton.cdiv(n, _BLOCK),)](total, parts, n, N=ranks, BEGINS=begins, BLOCK=_BLOCK, num_warps=8)
