"""Float32 weights in two halves: the bfloat16 that is computed with, and the other 16 bits in int16.

The high half is the weight rounded to the nearest bfloat16 (ties away from zero), the low half the last 16 bits of the
float32. So both together are the weight exactly, a layer reads the high half without a cast, and they take 4 bytes per
weight where a float32 weight with a bfloat16 copy takes 6.

Source: Apex's DistributedFusedAdam keeps such remainders, `store_param_remainders`
(https://github.com/NVIDIA/apex/blob/master/apex/contrib/optimizers/distributed_fused_adam.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from llmfoundry.dtensor import cut_like, local_part

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it
    triton = None

LOW_HALF = "low_half"  # the key of an optimizer's state
_NAN = 0x7FC00000  # whose rounding is NaN too
_AT_ONCE = 2**24  # values that are joined or split at a time


class Halves(NamedTuple):
    """A float32 tensor as two of its shape."""

    high: Tensor  # bfloat16
    low: Tensor  # int16


def split(x: Tensor) -> Halves:
    """Both halves of a float32 tensor."""
    bits = torch.where(x.isnan(), _NAN, x.view(torch.int32).long() & 0xFFFFFFFF)
    return Halves(((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16))


def split_into(out: Halves, x: Tensor) -> None:
    """Write both halves of a float32 tensor into memory of its shape, in pieces, so that little more is needed."""
    for piece, high, low in zip(*(each.view(-1).split(_AT_ONCE) for each in (x, *out)), strict=True):
        halves = split(piece)
        high.copy_(halves.high)
        low.copy_(halves.low)


def joined(high: Tensor, low: Tensor) -> Tensor:
    """The float32 tensor of two halves."""
    bits = (high.view(torch.int16).int() << 16) + low  # a low half from 0x8000 on is negative: high was rounded up
    return bits.view(torch.float32)


def join_into(out: Tensor, halves: Halves) -> None:
    """Write a float32 tensor into memory that may be elsewhere, in pieces, so that little more is needed."""
    high, low = (each.reshape(-1) for each in halves)
    for piece, a, b in zip(out.view(-1).split(_AT_ONCE), high.split(_AT_ONCE), low.split(_AT_ONCE), strict=True):
        piece.copy_(joined(a, b), non_blocking=True)


def low_half_of(parameter: Tensor, optimizer: Optimizer | None) -> Tensor | None:
    """What an optimizer keeps of a parameter beside its high half; None: nothing."""
    return None if optimizer is None else optimizer.state.get(parameter, {}).get(LOW_HALF)


def weight_of(parameter: Tensor, optimizer: Optimizer | None) -> Tensor:
    """A parameter as its optimizer keeps it: float32 where it is in two halves, cut over ranks alike; else itself."""
    low = low_half_of(parameter, optimizer)
    if low is None:
        return parameter.detach()
    high = local_part(parameter.detach())
    out = torch.empty(high.shape, dtype=torch.float32, device=high.device)
    join_into(out, Halves(high, local_part(low)))
    return cut_like(parameter.detach(), out)


if triton is not None:

    @triton.jit
    def join_bits(high, low):
        # bfloat16, int16 -> float32
        bits = (high.to(tl.int16, bitcast=True).to(tl.int32) << 16) + low.to(tl.int32)
        return bits.to(tl.float32, bitcast=True)

    @triton.jit
    def split_bits(x):
        # float32 -> bfloat16, int16
        bits = tl.where(x == x, x.to(tl.uint32, bitcast=True), 0x7FC00000)
        high = ((bits + 0x8000) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        return high, bits.to(tl.uint16).to(tl.int16, bitcast=True)
