"""Scales a tensor by a number on its device and casts it, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from llmfoundry.kernels.whole import cdiv

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch do not include it
    triton = None

_BLOCK = 4096


def scaled_to(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute `x * factor` in the dtype of `x`, and round once to `dtype`.

    Args:
        x: contiguous.
        factor: () in the dtype of `x`.
        dtype: of the result.
    """
    out = torch.empty_like(x, dtype=dtype)
    if not (x.is_cuda and triton is not None and x.dtype == torch.float32):
        return torch.mul(x, factor, out=out)
    scale_kernel[(cdiv(x.numel(), _BLOCK),)](x, factor, out, x.numel(), BLOCK=_BLOCK, num_warps=8)
    return out


if triton is not None:

    @triton.jit
    def scale_kernel(x_ptr, factor_ptr, out_ptr, n, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out_ptr + i, tl.load(x_ptr + i, i < n, other=0.0) * tl.load(factor_ptr), i < n)
