"""AdamW in one pass over lists of tensors: unscale, skip, clip, update weights and moments, write bfloat16 copies.

Weights are float32, float32 in two halves (halves.py), or bfloat16.

The gradient scale and the skip flag are read on the device, so the host never waits for the norm. Weights and moments
may be kept in bfloat16, with stochastic rounding. With rounding to nearest, a second moment that changes by less than
half of its last bit (with beta2 = 0.999 by 1/1000 per step; bfloat16 has 1/256) would never change, nor would a weight
whose update is below 1/512 of it. The random bits are a hash of the step, the index of the parameter and the position
of the value in the full tensor: the same on every mesh, and after a resume.

Bytes moved per value: weight 8 (float32, also in halves) or 4 (bfloat16), gradient 4 or 2, moments 16 or 8, copy 2.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from llmfoundry.kernels.halves import joined, split
from llmfoundry.kernels.whole import cdiv

try:
    import triton
    import triton.language as tl

    from llmfoundry.kernels.halves import join_bits, split_bits
except ImportError:  # CPU builds of torch do not include it
    triton = None

_MASK = 0xFFFFFFFF
_OTHER = 0x5BD1E995  # arbitrary, so that a weight's random bits differ from those of its moments
WHOLE = 1 << 30  # for tensors that are split only in their first dim: `inner` and `step` are equal


class Place(NamedTuple):
    """The position of a part in the full tensor: value i is number `start + i // inner * step + i % inner`."""

    number: int = 0  # index of the parameter
    start: int = 0
    inner: int = WHOLE
    step: int = WHOLE

    @classmethod
    def of(cls, number: int, part: torch.Size, whole: torch.Size, offsets: tuple[int, ...]) -> Place:
        """Return the place of a part that is split in the first dim, in another one, or in both.

        Raises:
            ValueError: if it is split in two dims after the first.
        """
        strides = [int(stride) for stride in torch.empty(whole, device="meta").stride()]
        start = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
        cut = [dim for dim in range(1, len(whole)) if part[dim] != whole[dim]]
        if not cut:
            return cls(number, start)
        if len(cut) > 1 or any(size > 1 for size in part[1 : cut[0]]):
            raise ValueError(f"a part {tuple(part)} of {tuple(whole)} is cut in more than one dim behind the first")
        inner = part[cut[0] :].numel()
        return cls(number, start, inner, whole[cut[0] :].numel())


class Rule(NamedTuple):
    """Settings of a step: `w *= 1 - lr * decay; w -= lr * m / (sqrt(v) + eps)`, with bias-corrected moments."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    decay: float


@torch.library.custom_op("llmfoundry::adamw_", mutates_args=("weights", "exp_avgs", "exp_avg_sqs", "beside"))
def _adamw(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    beside: list[Tensor],
    steps: Tensor,
    divisor: Tensor,
    skip: Tensor,
    places: list[int],
    rule: list[float],
) -> None:
    where = [Place(*places[i : i + 4]) for i in range(0, len(places), 4)]
    dense = all(tensor.is_contiguous() for each in (weights, exp_avgs, exp_avg_sqs, beside) for tensor in each)
    run = adamw_triton if weights[0].is_cuda and dense else adamw_reference
    run(weights, grads, exp_avgs, exp_avg_sqs, beside, steps, divisor, skip, where, Rule(*rule))


def adamw_(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    beside: list[Tensor],
    steps: list[Tensor],
    divisor: Tensor,
    skip: Tensor,
    places: list[Place],
    rule: Rule,
) -> None:
    """Take one AdamW step in place, according to a `Rule`.

    Args:
        weights: float32, or bfloat16 that is rounded stochastically unless its low halves are in `beside`; all on the
            same device, of the same dtype, and not empty. On a GPU, weights and moments should be contiguous.
        grads: of one dtype, float32 or bfloat16; not modified.
        exp_avgs: float32 or bfloat16, of the same dtype as `exp_avg_sqs`.
        exp_avg_sqs: as `exp_avgs`.
        beside: one per weight: bfloat16 copies, which receive the new weights, or int16 low halves (halves.py); or
            empty.
        steps: () float32 each, counted from 1, including this step.
        divisor: () float32; gradients are divided by it.
        skip: () float32; if 1, weights and moments are not changed.
        places: of each part in its full tensor, for the random bits.
        rule: the settings.
    """
    _adamw(weights, grads, exp_avgs, exp_avg_sqs, beside, torch.stack(steps), divisor, skip,
           [n for place in places for n in place], list(rule))  # fmt: skip


def corrections(steps: Tensor, beta1: float, beta2: float) -> Tensor:
    """Map (n,) steps to (n, 2) float32: `1 - beta1^t` and the root of `1 - beta2^t`, computed in float64."""
    t = steps.double()
    return torch.stack([1 - beta1**t, (1 - beta2**t).sqrt()], dim=1).float()


def hashed(x: Tensor) -> Tensor:
    """Hash to 32 well-mixed bits, in int64 ("lowbias32", https://github.com/skeeto/hash-prospector)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def rounded(x: Tensor, noise: Tensor) -> Tensor:
    """Round float32 to bfloat16 stochastically, up with the probability of the truncated part; `noise` has 16 bits."""
    bits = x.view(torch.int32).long() + noise
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def noise_of(part: Tensor, step: Tensor, place: Place) -> Tensor:
    """Return 32 random bits per value of a part, in int64: a hash of the step, the parameter and the position."""
    at = torch.arange(part.numel(), device=part.device).view(part.shape)
    at = place.start + at // place.inner * place.step + at % place.inner
    key = hashed((step.long() ^ (place.number * 0x9E3779B1)) & _MASK)
    return hashed((at ^ key) & _MASK)


def noise_of_weight(noise: Tensor) -> Tensor:
    """Return 16 more random bits per value, derived from `noise_of`, whose own bits are used for the moments."""
    return hashed(noise ^ _OTHER) & 0xFFFF


def read_weight(weight: Tensor, beside: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return a weight in the dtype that its step is computed in; not a copy if it has that dtype."""
    if beside is not None and beside.dtype == torch.int16:
        return joined(weight, beside)
    return weight.to(dtype)


def write_weight(weight: Tensor, beside: Tensor | None, new: Tensor, step: Tensor, place: Place) -> None:
    """Write a new weight, and its low half or copy in `beside`."""
    if beside is not None and beside.dtype == torch.int16:
        high, low = split(new)
        weight.copy_(high)
        beside.copy_(low)
        return
    if weight.dtype == torch.bfloat16:
        new = rounded(new, noise_of_weight(noise_of(weight, step, place)))
    weight.copy_(new)
    if beside is not None:
        beside.copy_(weight)


def adamw_reference(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    beside: list[Tensor],
    steps: Tensor,
    divisor: Tensor,
    skip: Tensor,
    places: list[Place],
    rule: Rule,
) -> None:
    """`adamw_` in plain PyTorch. The host waits for `skip`, which costs nothing on a CPU."""
    if skip:
        return
    lr, beta1, beta2, eps, decay = rule
    factors = corrections(steps, beta1, beta2)
    for i, (w, g, m, v, place) in enumerate(zip(weights, grads, exp_avgs, exp_avg_sqs, places, strict=True)):
        grad = g.float() / divisor
        mean = m.float().lerp(grad, 1 - beta1)
        square = v.float() * beta2 + grad * grad * (1 - beta2)
        other = beside[i] if beside else None
        new = read_weight(w, other, torch.float32).mul_(1 - lr * decay)
        new.sub_(lr / factors[i, 0] * mean / (square.sqrt() / factors[i, 1] + eps))
        write_weight(w, other, new, steps[i], place)
        if m.dtype == torch.bfloat16:
            noise = noise_of(w, steps[i], place)
            mean, square = rounded(mean, noise & 0xFFFF), rounded(square, noise >> 16)
        m.copy_(mean)
        v.copy_(square)


def table_of(rows: list[tuple[int, list[int]]], device: torch.device) -> Tensor:
    """Build the table for a kernel that walks a list of tensors: (n, columns + 1) int64, first programs in front.

    Args:
        rows: for each tensor, its number of programs and its columns.
        device: of the table.
    """
    firsts = accumulate((programs for programs, _ in rows), initial=0)
    table = [[first, *columns] for first, (_, columns) in zip(firsts, rows, strict=False)]
    # Pinned, so that the copy does not block the host.
    pinned = torch.tensor(table, dtype=torch.int64, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


if triton is not None:
    _BLOCK = 2048

    @triton.jit
    def find_row(table_ptr, n_rows, WIDTH: tl.constexpr, ROWS: tl.constexpr):
        # Return this program's row of the table.
        row = tl.arange(0, ROWS)
        first = tl.load(table_ptr + row * WIDTH, row < n_rows, other=1 << 62)
        return table_ptr + (tl.sum((first <= tl.program_id(0)).to(tl.int32), 0) - 1) * WIDTH

    @triton.jit
    def hash_bits(x):
        x = (x ^ (x >> 16)) * 0x7FEB352D
        x = (x ^ (x >> 15)) * 0x846CA68B
        return x ^ (x >> 16)

    @triton.jit
    def round_bits(x, noise):
        bits = x.to(tl.uint32, bitcast=True) + noise
        return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)

    @triton.jit
    def key_bits(count, number):
        # Hash the step `count` and the parameter `number`.
        return hash_bits((count.to(tl.int64) ^ (number.to(tl.int64) * 0x9E3779B1)).to(tl.uint32))

    @triton.jit
    def noise_bits(begin, count, number, start, inner, step, BLOCK: tl.constexpr):
        # `noise_of` for BLOCK values from `begin` on, in the step `count`, with one 64-bit division per block.
        r = (begin % inner).to(tl.uint32) + tl.arange(0, BLOCK).to(tl.uint32)
        wraps = r // inner.to(tl.uint32)
        whole = (start + begin // inner * step).to(tl.uint32)
        place = whole + wraps * step.to(tl.uint32) + (r - wraps * inner.to(tl.uint32))
        return hash_bits(place ^ key_bits(count, number))

    @triton.jit
    def weight_bits(noise):
        return hash_bits(noise ^ 0x5BD1E995) & 0xFFFF  # `noise_of_weight`

    @triton.jit
    def load_weight(w_ptr, b_ptr, i, inside, BESIDE: tl.constexpr):
        # `read_weight`; BESIDE: whether b_ptr is used.
        w = tl.load(w_ptr + i, inside, other=0.0)
        if BESIDE and b_ptr.dtype.element_ty == tl.int16:
            w = join_bits(w, tl.load(b_ptr + i, inside, other=0))
        return w.to(tl.float32)

    @triton.jit
    def store_weight(w_ptr, b_ptr, i, inside, w, noise, BESIDE: tl.constexpr):
        # `write_weight`. `noise` belongs to the values; the compiler removes it if nothing is rounded.
        if BESIDE and b_ptr.dtype.element_ty == tl.int16:
            high, low = split_bits(w)
            tl.store(w_ptr + i, high, inside)
            tl.store(b_ptr + i, low, inside)
        elif w_ptr.dtype.element_ty == tl.bfloat16:
            tl.store(w_ptr + i, round_bits(w, weight_bits(noise)), inside)
        else:
            tl.store(w_ptr + i, w, inside)
        if BESIDE and b_ptr.dtype.element_ty == tl.bfloat16:
            tl.store(b_ptr + i, w.to(tl.bfloat16), inside)

    @triton.jit
    def adamw_kernel(
        table_ptr, steps_ptr, factors_ptr, divisor_ptr, skip_ptr, n_tensors, lr, rest1, beta2, rest2, eps, keep,
        WEIGHT: tl.constexpr, GRAD: tl.constexpr, MOMENT: tl.constexpr, BESIDE: tl.constexpr, TENSORS: tl.constexpr,
        ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        # Table columns: a tensor's first program, five pointers, its number of values, its position in the lists, and
        # its Place. BESIDE: the dtype of `beside`, or None.
        if tl.load(skip_ptr) != 0:
            return
        of = find_row(table_ptr, n_tensors, 12, TENSORS)
        begin = (tl.program_id(0) - tl.load(of)) * BLOCK
        weight, grad, mean, square = tl.load(of + 1), tl.load(of + 2), tl.load(of + 3), tl.load(of + 4)
        n, position = tl.load(of + 6), tl.load(of + 7)
        w_ptr = weight.to(tl.pointer_type(WEIGHT))
        g_ptr = grad.to(tl.pointer_type(GRAD))
        m_ptr = mean.to(tl.pointer_type(MOMENT))
        v_ptr = square.to(tl.pointer_type(MOMENT))
        b_ptr = tl.load(of + 5).to(tl.pointer_type(tl.bfloat16 if BESIDE is None else BESIDE))
        if ALIGNED:
            w_ptr, g_ptr = tl.multiple_of(w_ptr, 16), tl.multiple_of(g_ptr, 16)
            m_ptr, v_ptr = tl.multiple_of(m_ptr, 16), tl.multiple_of(v_ptr, 16)
            b_ptr = tl.multiple_of(b_ptr, 16)
            n = tl.multiple_of(n, 8)
        scale = 1 / tl.load(divisor_ptr)
        size, root = lr / tl.load(factors_ptr + 2 * position), tl.load(factors_ptr + 2 * position + 1)
        number, start, inner, step = tl.load(of + 8), tl.load(of + 9), tl.load(of + 10), tl.load(of + 11)
        count = tl.load(steps_ptr + position)
        i = begin + tl.arange(0, BLOCK)
        inside = i < n
        g = tl.load(g_ptr + i, inside, other=0.0).to(tl.float32) * scale
        m = tl.load(m_ptr + i, inside, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + i, inside, other=0.0).to(tl.float32)
        w = load_weight(w_ptr, b_ptr, i, inside, BESIDE is not None)
        m += (g - m) * rest1
        v = v * beta2 + g * g * rest2
        w = w * keep - size * m / (tl.sqrt(v) / root + eps)
        noise = noise_bits(begin, count, number, start, inner, step, BLOCK)  # eliminated if nothing is rounded
        store_weight(w_ptr, b_ptr, i, inside, w, noise, BESIDE is not None)
        if MOMENT == tl.bfloat16:
            tl.store(m_ptr + i, round_bits(m, noise & 0xFFFF), inside)
            tl.store(v_ptr + i, round_bits(v, noise >> 16), inside)
        else:
            tl.store(m_ptr + i, m, inside)
            tl.store(v_ptr + i, v, inside)


def adamw_triton(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    beside: list[Tensor],
    steps: Tensor,
    divisor: Tensor,
    skip: Tensor,
    places: list[Place],
    rule: Rule,
) -> None:
    """`adamw_` by the Triton kernel: one launch for all tensors, plus one for those not aligned to 16 bytes."""
    device = weights[0].device
    grads = [grad.contiguous() for grad in grads]
    types = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.int16: tl.int16}
    lr, beta1, beta2, eps, decay = rule
    factors = corrections(steps, beta1, beta2)
    by_alignment: dict[bool, list[tuple[int, list[int]]]] = {True: [], False: []}
    for i, tensors in enumerate(zip(weights, grads, exp_avgs, exp_avg_sqs, beside or weights, strict=True)):
        pointers, n = [tensor.data_ptr() for tensor in tensors], tensors[0].numel()
        aligned = n % 8 == 0 and all(pointer % 16 == 0 for pointer in pointers)
        by_alignment[aligned].append((cdiv(n, _BLOCK), [*pointers, n, i, *places[i]]))
    for aligned, rows in by_alignment.items():
        if not rows:
            continue
        adamw_kernel[(sum(programs for programs, _ in rows),)](
            table_of(rows, device), steps, factors, divisor, skip, len(rows),
            lr, 1 - beta1, beta2, 1 - beta2, eps, 1 - lr * decay,
            WEIGHT=types[weights[0].dtype], GRAD=types[grads[0].dtype], MOMENT=types[exp_avgs[0].dtype],
            BESIDE=types[beside[0].dtype] if beside else None, TENSORS=triton.next_power_of_2(len(rows)),
            ALIGNED=aligned, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
