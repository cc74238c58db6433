"""The sum of squares of all values in a list of tensors, for gradient norms: one launch that reads each value once.

Each program sums one block of one tensor in float32; these sums are added in float64, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmfoundry.kernels.update import table_of
from llmfoundry.kernels.whole import cdiv, next_power_of_2

try:
    import triton
    import triton.language as tl

    from llmfoundry.kernels.update import find_row
except ImportError:  # CPU builds of torch do not include it
    triton = None


def square_sum(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of squares, () float64, of one or more tensors of one dtype and device, without a host sync."""
    return _square_sum(list(tensors))


@torch.library.custom_op("llmfoundry::square_sum", mutates_args=())
def _square_sum(tensors: list[Tensor]) -> Tensor:
    by_kernel = tensors[0].is_cuda and triton is not None and tensors[0].dtype in (torch.bfloat16, torch.float32)
    return (square_sum_triton if by_kernel else square_sum_reference)(tensors)


@_square_sum.register_fake
def _(tensors: list[Tensor]) -> Tensor:
    return tensors[0].new_empty((), dtype=torch.float64)


def square_sum_reference(tensors: list[Tensor]) -> Tensor:
    """`square_sum` in plain PyTorch."""
    # A CPU sums a whole tensor in a few lanes: float32 would lose 2e-5 of the norm of half a million values, more than
    # a different number of ranks may change it.
    dtype = torch.promote_types(torch.float32 if tensors[0].is_cuda else torch.float64, tensors[0].dtype)
    return torch.stack(torch._foreach_norm(tensors, 2.0, dtype=dtype)).double().square().sum()


if triton is not None:
    _BLOCK = 8192

    @triton.jit
    def square_sum_kernel(
        table_ptr, sums_ptr, n_tensors,
        KIND: tl.constexpr, ALIGNED: tl.constexpr, TENSORS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        # Table columns: a tensor's first program, its pointer, its number of values, and the offset of its first sum.
        of = find_row(table_ptr, n_tensors, 4, TENSORS)
        pid = tl.program_id(0)
        x_ptr, n = tl.load(of + 1).to(tl.pointer_type(KIND)), tl.load(of + 2)
        if ALIGNED:
            x_ptr, n = tl.multiple_of(x_ptr, 16), tl.multiple_of(n, 8)
        i = (pid - tl.load(of)) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, i < n, other=0.0).to(tl.float32)
        tl.store(sums_ptr + tl.load(of + 3) + pid, tl.sum(x * x))


def square_sum_triton(tensors: list[Tensor]) -> Tensor:
    """`square_sum` by the Triton kernel: one launch, plus one for tensors that are not aligned to 16 bytes."""
    offset = 0
    dense = [tensor.contiguous() for tensor in tensors if tensor.numel()]  # kept alive until the kernels are launched
    sums = torch.empty(sum(cdiv(each.numel(), _BLOCK) for each in dense), dtype=torch.float32, device=tensors[0].device)
    for aligned in (True, False):
        rows = [(cdiv(each.numel(), _BLOCK), [each.data_ptr(), each.numel(), offset]) for each in dense
                if (each.numel() % 8 == 0 and each.data_ptr() % 16 == 0) == aligned]  # fmt: skip
        if not rows:
            continue
        programs = sum(count for count, _ in rows)
        square_sum_kernel[(programs,)](
            table_of(rows, sums.device), sums, len(rows),
            KIND=tl.bfloat16 if dense[0].dtype == torch.bfloat16 else tl.float32, ALIGNED=aligned,
            TENSORS=next_power_of_2(len(rows)), BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
        offset += programs
    return sums.sum(dtype=torch.float64)
