"""The parts of Muon: momentum in one pass, orthogonalization, and the weight update in one pass.

As in `update.py`, the gradient scale and the skip flag are read on the device. Momentum and weights in bfloat16 use
stochastic rounding, with the same random bits on every mesh.

Shapes: N matrices of R rows and C columns in one batch.
Bytes moved per value: gradient 4 or 2, momentum 8 or 4, direction 2 or 4 written and later read, weight 8 or 4, copy 2.

Source: Jordan et al. 2024, Muon, https://kellerjordan.github.io/posts/muon; Liu et al. 2025, arXiv:2502.16982.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmfoundry.kernels.symmetric import Scale, symmetric_product
from llmfoundry.kernels.update import Place, noise_of, read_weight, rounded, write_weight

try:
    import triton
    import triton.language as tl

    from llmfoundry.kernels.update import load_weight, noise_bits, round_bits, store_weight
except ImportError:  # CPU builds of torch do not include it
    triton = None

# Of the polynomial a x + b x^3 + c x^5. Its slope at zero is as large as possible, so that small singular values grow
# fast; large ones end between 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Each step multiplies the rounding error of the smallest eigenvalues by up to a^2 = 12. In bfloat16 it may be -1e-3 at
# first, and at about -1 the polynomial diverges. In the last of this many steps it is -0.14, and no further Gram matrix
# is needed; then the Gram matrix is recomputed from the matrix itself.
_STEPS_OF_GRAM = 3
_LEAST_NORM = 1e-7  # minimum norm that a matrix is divided by: a zero gradient stays zero


def orthogonalize(x: Tensor, steps: int) -> Tensor:
    """Approximate the nearest orthogonal matrices by Newton-Schulz: singular values end between 0.7 and 1.2.

    `x <- (a + b g + c g^2) x` with `g = x x^T`, or on the other side if there are fewer columns than rows. The factors
    commute with `g`, so the iteration runs only on the S x S matrices: `g <- f g f` and `q <- f q`, all symmetric, and
    `q x` is computed after three steps and at the end. In exact arithmetic this equals the plain iteration. The norm is
    the root of the first `g`'s trace. No tensor is divided by it: it scales the first products.

    Args:
        x: (N, R, C) of any float dtype, which is also that of the products; norms up to 1e9.
        steps: number of iterations.

    Returns:
        (N, R, C).

    Source: Zhang et al. 2026, Gram Newton-Schulz, https://dao-ailab.github.io/blog/2026/gram-newton-schulz.
    """
    a, b, c = COEFFICIENTS
    wide = x.shape[1] <= x.shape[2]
    for first in range(0, steps, _STEPS_OF_GRAM):
        gram = symmetric_product(x if wide else x.mT)
        square: Scale = 1.0  # remaining factor of the Gram matrix
        root: Scale = 1.0
        if first == 0:
            exact = torch.promote_types(x.dtype, torch.float32)
            square = 1 / gram.diagonal(dim1=1, dim2=2).sum(1, dtype=exact).clamp(min=_LEAST_NORM**2)
            root = square.sqrt()
        product = None  # of the factors
        for step in range(first, min(first + _STEPS_OF_GRAM, steps)):
            factor = symmetric_product(gram, plus=gram, alpha=c * square**2, beta=b * square, diagonal=a)
            if step + 1 < min(first + _STEPS_OF_GRAM, steps):
                half = symmetric_product(gram, factor, alpha=square)
                gram, square = symmetric_product(factor, half), 1.0
            if product is None:
                product = factor
            else:
                product, root = symmetric_product(product, factor, alpha=root), 1.0
        assert product is not None
        x = product @ x if wide else x @ product
        if isinstance(root, Tensor):  # after a single step
            x.mul_(root[:, None, None])
    return x


def orthogonalize_flops(rows: int, columns: int, steps: int, *, halves: bool = True) -> float:
    """Return the FLOPs of `orthogonalize` for one matrix.

    Args:
        rows: R.
        columns: C.
        steps: number of iterations.
        halves: whether only half of each symmetric product is computed, as on GPUs; diagonal tiles count as halves.
    """
    short, long = min(rows, columns), max(rows, columns)
    runs = [min(_STEPS_OF_GRAM, steps - first) for first in range(0, steps, _STEPS_OF_GRAM)]
    small = sum(4 * run - 3 for run in runs)  # four products per step; one fewer in the first, two in the last
    symmetric = 2 * short * short * (long * len(runs) + short * small)
    return symmetric / (2 if halves else 1) + 2 * short * short * long * len(runs)


@torch.library.custom_op("llmfoundry::momentum_", mutates_args=("moment", "direction"))
def momentum_(
    moment: Tensor,
    direction: Tensor,
    grad: Tensor,
    step: Tensor,
    divisor: Tensor,
    skip: Tensor,
    place: Sequence[int],
    *,
    momentum: float,
    nesterov: bool,
) -> None:
    """Update `m = momentum m + (1 - momentum) g` in place, and write the direction: m, or with Nesterov one step ahead.

    Args:
        moment: float32 or bfloat16 (float64 on CPUs).
        direction: contiguous, of any float dtype; overwritten, unless the step is skipped.
        grad: divided by `divisor`, and not modified.
        step: () float32, counted from 1, for the random bits.
        divisor: () float32.
        skip: () float32; if 1, nothing is changed.
        place: the `Place` of this part in its full tensor.
        momentum: the decay rate.
        nesterov: whether to use Nesterov momentum.
    """
    run = momentum_triton if moment.is_cuda and moment.is_contiguous() else momentum_reference
    run(moment, direction, grad, step, divisor, skip, Place(*place), momentum=momentum, nesterov=nesterov)


def momentum_reference(
    moment: Tensor,
    direction: Tensor,
    grad: Tensor,
    step: Tensor,
    divisor: Tensor,
    skip: Tensor,
    place: Place,
    *,
    momentum: float,
    nesterov: bool,
) -> None:
    """`momentum_` in plain PyTorch. The host waits for `skip`, which costs nothing on a CPU."""
    if skip:
        return
    dtype = torch.promote_types(moment.dtype, torch.float32)
    scaled = grad.to(dtype) / divisor
    mean = moment.to(dtype).lerp(scaled, 1 - momentum)
    direction.copy_(scaled.lerp(mean, momentum) if nesterov else mean)
    if moment.dtype == torch.bfloat16:
        mean = rounded(mean, noise_of(moment, step, place) & 0xFFFF)
    moment.copy_(mean)


@torch.library.custom_op("llmfoundry::apply_direction_", mutates_args=("weight", "beside"))
def apply_direction_(
    weight: Tensor,
    beside: list[Tensor],
    direction: Tensor,
    step: Tensor,
    skip: Tensor,
    place: Sequence[int],
    *,
    lr: float,
    keep: float,
) -> None:
    """Compute `w = keep w - lr direction` in place.

    Args:
        weight: not empty; bfloat16 is rounded stochastically, unless its low half is in `beside`.
        beside: a bfloat16 copy, which receives the new weight, or the int16 low half (halves.py); or nothing.
        direction: of the same shape, of any float dtype.
        step: () float32, counted from 1, for the random bits.
        skip: () float32; if 1, nothing is changed.
        place: the `Place` of this part in its full tensor.
    """
    dense = all(each.is_contiguous() for each in (weight, *beside))
    run = apply_triton if weight.is_cuda and weight.dtype != torch.float64 and dense else apply_reference
    run(weight, beside, direction, step, skip, Place(*place), lr=lr, keep=keep)


def apply_reference(
    weight: Tensor,
    beside: list[Tensor],
    direction: Tensor,
    step: Tensor,
    skip: Tensor,
    place: Place,
    *,
    lr: float,
    keep: float,
) -> None:
    """`apply_direction_` in plain PyTorch. The host waits for `skip`, which costs nothing on a CPU."""
    if skip:
        return
    other = beside[0] if beside else None
    new = read_weight(weight, other, torch.promote_types(weight.dtype, torch.float32)).mul_(keep)
    new.sub_(direction.to(new.dtype), alpha=lr)
    write_weight(weight, other, new, step, place)


if triton is not None:
    _BLOCK = 4096

    @triton.jit(do_not_specialize=["number", "start", "inner", "step"])
    def momentum_kernel(
        m_ptr, out_ptr, g_ptr, step_ptr, divisor_ptr, skip_ptr, n, number, start, inner, step, rest, momentum,
        NESTEROV: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        if tl.load(skip_ptr) != 0:
            return
        begin = tl.program_id(0).to(tl.int64) * BLOCK
        i = begin + tl.arange(0, BLOCK)
        inside = i < n
        g = tl.load(g_ptr + i, inside, other=0.0).to(tl.float32) / tl.load(divisor_ptr)
        m = tl.load(m_ptr + i, inside, other=0.0).to(tl.float32)
        m += (g - m) * rest
        ahead = g + (m - g) * momentum if NESTEROV else m
        tl.store(out_ptr + i, ahead.to(out_ptr.dtype.element_ty), inside)
        if m_ptr.dtype.element_ty == tl.bfloat16:
            noise = noise_bits(begin, tl.load(step_ptr), number, start, inner, step, BLOCK)
            tl.store(m_ptr + i, round_bits(m, noise & 0xFFFF), inside)
        else:
            tl.store(m_ptr + i, m, inside)

    @triton.jit(do_not_specialize=["number", "start", "inner", "step"])
    def apply_kernel(
        w_ptr, b_ptr, d_ptr, step_ptr, skip_ptr, n, number, start, inner, step, lr, keep,
        BESIDE: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        if tl.load(skip_ptr) != 0:
            return
        begin = tl.program_id(0).to(tl.int64) * BLOCK
        i = begin + tl.arange(0, BLOCK)
        inside = i < n
        w = load_weight(w_ptr, b_ptr, i, inside, BESIDE) * keep
        w -= tl.load(d_ptr + i, inside, other=0.0).to(tl.float32) * lr
        noise = noise_bits(begin, tl.load(step_ptr), number, start, inner, step, BLOCK)
        store_weight(w_ptr, b_ptr, i, inside, w, noise, BESIDE)


def momentum_triton(
    moment: Tensor,
    direction: Tensor,
    grad: Tensor,
    step: Tensor,
    divisor: Tensor,
    skip: Tensor,
    place: Place,
    *,
    momentum: float,
    nesterov: bool,
) -> None:
    """`momentum_` by the Triton kernel; `moment` is contiguous, in float32 or bfloat16."""
    n = moment.numel()
    momentum_kernel[(triton.cdiv(n, _BLOCK),)](
        moment, direction, grad.contiguous(), step, divisor, skip, n, *place, 1 - momentum, momentum,
        NESTEROV=nesterov, BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip


def apply_triton(
    weight: Tensor,
    beside: list[Tensor],
    direction: Tensor,
    step: Tensor,
    skip: Tensor,
    place: Place,
    *,
    lr: float,
    keep: float,
) -> None:
    """`apply_direction_` by the Triton kernel; weight and copy are contiguous."""
    n = weight.numel()
    apply_kernel[(triton.cdiv(n, _BLOCK),)](
        weight, beside[0] if beside else weight, direction.contiguous(), step, skip, n, *place, lr, keep,
        BESIDE=bool(beside), BLOCK=_BLOCK, num_warps=8,
    )  # fmt: skip
