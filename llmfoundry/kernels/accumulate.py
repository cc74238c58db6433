"""Gradient sums: in bfloat16 with stochastic rounding, so that small terms are not lost; and over ranks, in float32.

With rounding to nearest, a term below 1/256 of the sum changes nothing, and the sum of many microbatches comes out too
small. Stochastic rounding rounds up with a probability equal to the truncated fraction, so the sum is right on average.
The random bits are a hash of the value's position and of a key that differs for each sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmfoundry.kernels.update import hashed, rounded

try:
    import triton
    import triton.language as tl

    from llmfoundry.kernels.update import hash_bits, round_bits
except ImportError:  # CPU builds of torch do not include it
    triton = None


@torch.library.custom_op("llmfoundry::add_rounded_", mutates_args=("total",))
def add_rounded_(total: Tensor, x: Tensor, key: int) -> None:
    """Compute `total += x` in place, with stochastic rounding.

    Args:
        total: bfloat16, with fewer than 2**32 values.
        x: bfloat16, of the same shape.
        key: 32 bits, different for each sum (`key_of`).
    """
    (add_triton if total.is_cuda and total.is_contiguous() else add_reference)(total, x, key)


def key_of(*numbers: int) -> int:
    """Return 32 bits that depend on all of these numbers and their order."""
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


def sum_parts(total: Tensor, own: Tensor | None, others: Tensor, rank: int, *, begins: bool) -> None:
    """Sum parts in rank order, in float32, or in float64 if they or `total` are.

    Args:
        total: n values, contiguous. It is overwritten, or added to if `begins` is False, and rounded once.
        own: n values, contiguous: the part of `rank`, if it is not in `others`; None if it is.
        others: (N, n), contiguous.
        rank: this rank, where `own` is inserted.
        begins: whether to overwrite `total`.
    """
    own = others[:0].view(-1) if own is None else own
    _add_parts(total, own, others, rank, begins)


@torch.library.custom_op("llmfoundry::add_parts_", mutates_args=("total",))
def _add_parts(total: Tensor, own: Tensor, others: Tensor, rank: int, begins: bool) -> None:
    (add_parts_triton if total.is_cuda else add_parts_reference)(total, own, others, rank, begins)


def add_parts_reference(total: Tensor, own: Tensor, others: Tensor, rank: int, begins: bool) -> None:
    """`sum_parts` in plain PyTorch; `own` is empty if it is in `others`."""
    wide = torch.promote_types(torch.promote_types(others.dtype, total.dtype), torch.float32)
    parts = list(others.to(wide))
    if own.numel():
        parts.insert(rank, own.view(-1).to(wide))
    first, *rest = parts
    for part in rest:
        first = first + part
    (total.copy_ if begins else total.add_)(first.view_as(total))


if triton is not None:
    _BLOCK = 4096

    @triton.jit
    def add_parts_kernel(
        total_ptr, own_ptr, others_ptr, n, N: tl.constexpr, OWN: tl.constexpr, BEGINS: tl.constexpr, BLOCK: tl.constexpr
    ):  # fmt: skip
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < n
        wide = tl.float64 if others_ptr.dtype.element_ty == tl.float64 else tl.float32
        total = tl.zeros((BLOCK,), wide)
        at = others_ptr + i
        for rank in tl.static_range(N):
            if rank == OWN:
                part = tl.load(own_ptr + i, inside, other=0.0).to(wide)
            else:
                part = tl.load(at, inside, other=0.0).to(wide)
                at += n
            total = part if rank == 0 else total + part
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
    """`add_rounded_` by the Triton kernel; `total` is contiguous."""
    n = total.numel()
    add_kernel[(triton.cdiv(n, _BLOCK),)](total, x.contiguous(), n, key, BLOCK=_BLOCK, num_warps=8)


def add_parts_triton(total: Tensor, own: Tensor, others: Tensor, rank: int, begins: bool) -> None:
    """`sum_parts` by the Triton kernel; `own` is empty if it is in `others`."""
    n, apart = total.numel(), own.numel() > 0
    if n == 0:
        return
    add_parts_kernel[(triton.cdiv(n, _BLOCK),)](
        total, own if apart else others, others, n, N=others.shape[0] + apart, OWN=rank if apart else -1,
        BEGINS=begins, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
