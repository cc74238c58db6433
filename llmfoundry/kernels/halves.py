"""Float32 weights in two halves: the bfloat16 weight used in computation, and the remaining 16 bits in int16.

The high half is the weight rounded to the nearest bfloat16 (ties away from zero); the low half holds the last 16 bits
of the float32. So both together represent the weight exactly, a layer uses the high half without a cast, and they take
4 bytes per weight, whereas a float32 weight with a bfloat16 copy takes 6.

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
except ImportError:  # CPU builds of torch do not include it
    triton = None

LOW_HALF = "low_half"  # key in the optimizer's state
_NAN = 0x7FC00000  # its rounding is NaN too
_AT_ONCE = 2**24  # values that are joined or split at a time


class Halves(NamedTuple):
    """A float32 tensor as two tensors of the same shape."""

    high: Tensor  # bfloat16
    low: Tensor  # int16


def split(x: Tensor) -> Halves:
    """Split a float32 tensor into halves."""
    bits = torch.where(x.isnan(), _NAN, x.view(torch.int32).long() & 0xFFFFFFFF)
    return Halves(((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16))


def split_into(out: Halves, x: Tensor) -> None:
    """Split a float32 tensor into existing halves of its shape, in pieces, to bound temporary memory."""
    for piece, high, low in zip(*(each.view(-1).split(_AT_ONCE) for each in (x, *out)), strict=True):
        halves = split(piece)
        high.copy_(halves.high)
        low.copy_(halves.low)


def joined(high: Tensor, low: Tensor) -> Tensor:
    """Join two halves to a float32 tensor."""
    bits = (high.view(torch.int16).int() << 16) + low  # a low half from 0x8000 on is negative, as high was rounded up
    return bits.view(torch.float32)


def join_into(out: Tensor, halves: Halves) -> None:
    """Join halves into an existing float32 tensor, possibly on another device, in pieces, to bound temporary memory."""
    high, low = (each.reshape(-1) for each in halves)
    for piece, a, b in zip(out.view(-1).split(_AT_ONCE), high.split(_AT_ONCE), low.split(_AT_ONCE), strict=True):
        piece.copy_(joined(a, b), non_blocking=True)


def low_half_of(parameter: Tensor, optimizer: Optimizer | None) -> Tensor | None:
    """Return the low half that an optimizer keeps for a parameter; None if there is none."""
    return None if optimizer is None else optimizer.state.get(parameter, {}).get(LOW_HALF)


def weight_of(parameter: Tensor, optimizer: Optimizer | None) -> Tensor:
    """Return a parameter's full-precision value: joined in float32 if kept in halves, sharded alike; else itself."""
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
