"""Lion in one pass: weights move by the sign of a mean of momentum and gradient; then the momentum is updated.

As in `update.py`, the scale of the gradients and the skip flag are read on the device. Weights and momentum in bfloat16
use stochastic rounding, with the same random bits on every mesh.

Bytes moved per value: weight 8 (float32) or 4 (bfloat16), gradient 4 or 2, momentum 8 or 4, copy 2.

Source: Chen et al. 2023, Symbolic Discovery of Optimization Algorithms, arXiv:2302.06675.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmfoundry.kernels.update import Place, noise_of, read_weight, rounded, write_weight

try:
    import triton
    import triton.language as tl

    from llmfoundry.kernels.update import load_weight, noise_bits, round_bits, store_weight
except ImportError:  # CPU builds of torch do not include it
    triton = None


@torch.library.custom_op("llmfoundry::lion_", mutates_args=("weight", "moment", "beside"))
def lion_(
    weight: Tensor,
    moment: Tensor,
    grad: Tensor,
    beside: list[Tensor],
    step: Tensor,
    divisor: Tensor,
    skip: Tensor,
    place: Sequence[int],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    keep: float,
) -> None:
    """`w = keep w - lr sign(b1 m + (1 - b1) g); m = b2 m + (1 - b2) g`, in place.

    Args:
        weight: not empty. In bfloat16 it is stochastically rounded, unless its low half is in `beside`.
        moment: float32 (float64 on CPUs), or bfloat16 with stochastic rounding.
        grad: any float dtype; it is divided by `divisor` when read, and not changed.
        beside: a bfloat16 copy that receives the new weight, or the int16 low half (halves.py), or empty.
        step: () float32, counted from 1, for the random bits.
        divisor: () float32.
        skip: () float32; 1: nothing is changed.
        place: the `Place` of this part in its whole tensor.
    """
    dense = all(each.is_contiguous() for each in (weight, moment, *beside))
    run = lion_triton if weight.is_cuda and weight.dtype != torch.float64 and dense else lion_reference
    run(weight, moment, grad, beside, step, divisor, skip, Place(*place), lr=lr, beta1=beta1, beta2=beta2, keep=keep)


def lion_reference(
    weight: Tensor,
    moment: Tensor,
    grad: Tensor,
    beside: list[Tensor],
    step: Tensor,
    divisor: Tensor,
    skip: Tensor,
    place: Place,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    keep: float,
) -> None:
    """`lion_` in plain PyTorch. The host waits for `skip`, which costs nothing on a CPU."""
    if skip:
        return
    dtype = torch.promote_types(moment.dtype, torch.float32)
    scaled, mean = grad.to(dtype) / divisor.to(dtype), moment.to(dtype)
    other = beside[0] if beside else None
    new = read_weight(weight, other, dtype).mul_(keep)
    new.sub_(torch.lerp(scaled, mean, beta1).sign_().mul_(lr))
    write_weight(weight, other, new, step, place)
    mean = mean.lerp(scaled, 1 - beta2)
    moment.copy_(rounded(mean, noise_of(weight, step, place) & 0xFFFF) if moment.dtype == torch.bfloat16 else mean)


if triton is not None:
    _BLOCK = 4096

    @triton.jit(do_not_specialize=["number", "start", "inner", "step"])
    def lion_kernel(
        w_ptr, m_ptr, g_ptr, b_ptr, step_ptr, divisor_ptr, skip_ptr, n, number, start, inner, step, lr, beta1, rest2,
        keep, BESIDE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        if tl.load(skip_ptr) != 0:
            return
        begin = tl.program_id(0).to(tl.int64) * BLOCK
        i = begin + tl.arange(0, BLOCK)
        inside = i < n
        g = tl.load(g_ptr + i, inside, other=0.0).to(tl.float32) / tl.load(divisor_ptr)
        m = tl.load(m_ptr + i, inside, other=0.0).to(tl.float32)
        w = load_weight(w_ptr, b_ptr, i, inside, BESIDE) * keep
        towards = g + (m - g) * beta1
        w -= tl.where(towards > 0, lr, tl.where(towards < 0, -lr, 0.0))
        noise = noise_bits(begin, tl.load(step_ptr), number, start, inner, step, BLOCK)
        store_weight(w_ptr, b_ptr, i, inside, w, noise, BESIDE)
        m += (g - m) * rest2
        if m_ptr.dtype.element_ty == tl.bfloat16:
            tl.store(m_ptr + i, round_bits(m, noise & 0xFFFF), inside)
        else:
            tl.store(m_ptr + i, m, inside)


def lion_triton(
    weight: Tensor,
    moment: Tensor,
    grad: Tensor,
    beside: list[Tensor],
    step: Tensor,
    divisor: Tensor,
    skip: Tensor,
    place: Place,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    keep: float,
) -> None:
    """`lion_` by the Triton kernel; all tensors but the gradient must be contiguous."""
    n = weight.numel()
    lion_kernel[(triton.cdiv(n, _BLOCK),)](
        weight, moment, grad.contiguous(), beside[0] if beside else weight, step, divisor, skip, n, *place, lr, beta1,
        1 - beta2, keep, BESIDE=bool(beside), BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
