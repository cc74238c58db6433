"""AdamW with 8-bit moments: one scale per 256 values of a row, stochastic rounding, in one pass.

A block's scale is its largest value (Dettmers et al. 2021, arXiv:2110.02861). Codes are denser near zero: a first
moment is the square of its code (127 steps and a sign), a second moment the fourth power (255 steps), so that the
smallest values above zero are 6e-5 and 2e-10 of the largest. This takes two roots instead of a table lookup. Stochastic
rounding is right on average, so small changes accumulate; but a positive second moment is never rounded to zero, which
would lead to a division by `eps`. Blocks end with their row, and rows are not split over ranks, so blocks are the same
on every mesh.

Shapes: R rows of C columns, N = ceil(C / 256) blocks per row.
Bytes moved per value: weight 8 or 4, gradient 4 or 2, moments 4, scales 1/16, copy 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmfoundry.kernels.update import Place, Rule, corrections, noise_of, read_weight, write_weight

try:
    import triton
    import triton.language as tl

    from llmfoundry.kernels.update import hash_bits, key_bits, load_weight, store_weight
except ImportError:  # CPU builds of torch do not include it
    triton = None

BLOCK = 256  # values per scale


def n_blocks(columns: int) -> int:
    """Return the number of scales per row."""
    return -(-columns // BLOCK)


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """Decode (..., C) int8 (signed) or uint8 codes and (..., N) scales to (..., C) float32."""
    scale = scales.repeat_interleave(BLOCK, dim=-1)[..., : codes.shape[-1]]
    code = codes.float()
    if codes.dtype == torch.int8:
        return code * code.abs() * (scale / 127**2)
    root = code * code * (1 / 255**2)
    return root * root * scale


def encode(x: Tensor, noise: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Encode (..., C) float32 as codes of `dtype` and (..., N) scales, with stochastic rounding.

    Args:
        x: the values; not negative for uint8.
        noise: 16 random bits per value.
        dtype: int8 or uint8.
    """
    columns = x.shape[-1]
    size = x.abs()
    n = n_blocks(columns)
    scales = F.pad(size, (0, n * BLOCK - columns)).unflatten(-1, (n, BLOCK)).amax(-1)
    share = size / scales.where(scales > 0, 1).repeat_interleave(BLOCK, dim=-1)[..., :columns]
    chance = noise.float() / 65536
    if dtype == torch.int8:
        share = share * 127**2
        low = share.sqrt().floor()
        up = chance * (2 * low + 1) < share - low * low
        return ((low + up).clamp(max=127) * x.sign()).to(dtype), scales
    low = (share.sqrt().sqrt() * 255).floor()
    below, above = ((low + i) * (low + i) * (1 / 255**2) for i in (0, 1))
    up = chance * (above * above - below * below) < share - below * below
    return (low + up).clamp(max=255).maximum((x > 0).float()).to(dtype), scales


@torch.library.custom_op(
    "llmfoundry::adamw_eight_bit_",
    mutates_args=("weights", "means", "squares", "mean_scales", "square_scales", "beside"),
)
def _adamw(
    weights: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    mean_scales: list[Tensor],
    square_scales: list[Tensor],
    beside: list[Tensor],
    steps: Tensor,
    divisor: Tensor,
    skip: Tensor,
    places: list[int],
    rule: list[float],
) -> None:
    numbers = Rule(*rule)
    factors = corrections(steps, numbers.beta1, numbers.beta2)
    for i, grad in enumerate(grads):
        w, m, v, m_scale, v_scale = weights[i], means[i], squares[i], mean_scales[i], square_scales[i]
        other = beside[i] if beside else None
        dense = all(each.is_contiguous() for each in (w, m, v, m_scale, v_scale, *beside[i : i + 1]))
        run = adamw_triton if w.is_cuda and dense else adamw_reference
        place = Place(*places[4 * i : 4 * i + 4])
        run(w, grad, m, v, m_scale, v_scale, other, steps[i], factors[i], divisor, skip, place, numbers)


def adamw_eight_bit_(
    weights: list[Tensor],
    grads: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    mean_scales: list[Tensor],
    square_scales: list[Tensor],
    beside: list[Tensor],
    steps: list[Tensor],
    divisor: Tensor,
    skip: Tensor,
    places: list[Place],
    rule: Rule,
) -> None:
    """Take one AdamW step in place, as `update.adamw_`, which describes the other arguments.

    Args:
        weights: as in `update.adamw_`, with two or more dims.
        means: int8 codes of the first moments.
        squares: uint8 codes of the second moments.
        mean_scales: float32, one per block.
        square_scales: float32, one per block.
    """
    _adamw(weights, grads, means, squares, mean_scales, square_scales, beside, torch.stack(steps), divisor, skip,
           [n for place in places for n in place], list(rule))  # fmt: skip


def adamw_reference(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    m_scale: Tensor,
    v_scale: Tensor,
    beside: Tensor | None,
    step: Tensor,
    factors: Tensor,
    divisor: Tensor,
    skip: Tensor,
    place: Place,
    rule: Rule,
) -> None:
    """The step of one tensor in plain PyTorch. The host waits for `skip`, which costs nothing on a CPU."""
    if skip:
        return
    lr, beta1, beta2, eps, decay = rule
    grad = g.float() / divisor
    mean = decode(m, m_scale).lerp(grad, 1 - beta1)
    square = decode(v, v_scale) * beta2 + grad * grad * (1 - beta2)
    new = read_weight(w, beside, torch.float32).mul_(1 - lr * decay)
    new.sub_(lr / factors[0] * mean / (square.sqrt() / factors[1] + eps))
    write_weight(w, beside, new, step, place)
    noise = noise_of(w, step, place)
    for codes, scale, value, bits in ((m, m_scale, mean, noise & 0xFFFF), (v, v_scale, square, noise >> 16)):
        for to, new in zip((codes, scale), encode(value, bits, codes.dtype), strict=True):
            to.copy_(new)


if triton is not None:
    _BLOCKS = 8  # per program

    @triton.jit(do_not_specialize=["columns", "per_row", "number", "start", "inner", "step"])
    def adamw_kernel(
        w_ptr, g_ptr, m_ptr, v_ptr, ms_ptr, vs_ptr, b_ptr, count_ptr, factors_ptr, divisor_ptr, skip_ptr,
        n, columns, per_row, number, start, inner, step, lr, rest1, beta2, rest2, eps, keep,
        BESIDE: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        if tl.load(skip_ptr) != 0:
            return
        b = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        lane = tl.arange(0, BLOCK)
        first = (b % per_row) * BLOCK
        begin = b // per_row * columns + first
        here = b < n
        i = begin[:, None] + lane[None, :]
        inside = here[:, None] & (first[:, None] + lane[None, :] < columns)
        g = tl.load(g_ptr + i, inside, other=0.0).to(tl.float32) / tl.load(divisor_ptr)
        m = tl.load(m_ptr + i, inside, other=0).to(tl.float32)
        m = m * tl.abs(m) * (tl.load(ms_ptr + b, here, other=0.0) / 16129)[:, None]
        v = tl.load(v_ptr + i, inside, other=0).to(tl.float32)
        v = v * v * (1 / 65025)
        v = v * v * tl.load(vs_ptr + b, here, other=0.0)[:, None]
        w = load_weight(w_ptr, b_ptr, i, inside, BESIDE)
        m += (g - m) * rest1
        v = v * beta2 + g * g * rest2
        w = w * keep - lr / tl.load(factors_ptr) * m / (tl.sqrt(v) / tl.load(factors_ptr + 1) + eps)
        place = (start + begin // inner * step + begin % inner).to(tl.uint32)[:, None] + lane.to(tl.uint32)[None, :]
        noise = hash_bits(place ^ key_bits(tl.load(count_ptr), number))
        store_weight(w_ptr, b_ptr, i, inside, w, noise, BESIDE)
        m_scale, v_scale = tl.max(tl.abs(m), 1), tl.max(v, 1)
        tl.store(ms_ptr + b, m_scale, here)
        tl.store(vs_ptr + b, v_scale, here)
        share = tl.abs(m) / tl.where(m_scale > 0, m_scale, 1.0)[:, None] * 16129
        low = tl.floor(tl.sqrt(share))
        up = (noise & 0xFFFF).to(tl.float32) / 65536 * (2 * low + 1) < share - low * low
        code = tl.minimum(low + up.to(tl.float32), 127.0)
        tl.store(m_ptr + i, tl.where(m < 0, -code, code).to(tl.int8), inside)
        share = v / tl.where(v_scale > 0, v_scale, 1.0)[:, None]
        low = tl.floor(tl.sqrt(tl.sqrt(share)) * 255)
        below, above = low * low * (1 / 65025), (low + 1) * (low + 1) * (1 / 65025)
        up = (noise >> 16).to(tl.float32) / 65536 * (above * above - below * below) < share - below * below
        code = tl.maximum(tl.minimum(low + up.to(tl.float32), 255.0), (v > 0).to(tl.float32))
        tl.store(v_ptr + i, code.to(tl.int32).to(tl.uint8), inside)


def adamw_triton(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    m_scale: Tensor,
    v_scale: Tensor,
    beside: Tensor | None,
    step: Tensor,
    factors: Tensor,
    divisor: Tensor,
    skip: Tensor,
    place: Place,
    rule: Rule,
) -> None:
    """The step of one tensor by the Triton kernel; all tensors but the gradient must be contiguous."""
    n, columns = m_scale.numel(), w.shape[-1]
    lr, beta1, beta2, eps, decay = rule
    adamw_kernel[(triton.cdiv(n, _BLOCKS),)](
        w, g.contiguous(), m, v, m_scale, v_scale, w if beside is None else beside, step, factors, divisor, skip,
        n, columns, n_blocks(columns), *place, lr, 1 - beta1, beta2, 1 - beta2, eps, 1 - lr * decay,
        BESIDE=beside is not None, BLOCKS=_BLOCKS, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
