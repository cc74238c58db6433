"""Frozen weights in 4 bits: NF4, sixteen levels and one scale for each 64 values (QLoRA).

A weight takes 4.5 bits per value in place of 16 or 32. It is made anew, in the dtype of the input, each time that a
layer runs; with recompute no copy outlives its block.
Source: Dettmers et al. 2023, arXiv:2305.14314, whose levels these are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

BLOCK = 64  # values that share a scale
# Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_AT_ONCE = 2**24  # values that are made or quantised together, which bounds the float32 copies


class NF4Weight(nn.Module):
    """A weight in NF4. Its buffers are not part of the state dict: they come from the base model's weights."""

    codes: Tensor  # (n / 2,) uint8, the first of two values in the high bits
    scales: Tensor  # (n / 64,) float32, the largest magnitude of each block

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.shape = tuple(like.shape)
        n = math.prod(self.shape)
        self.register_buffer("codes", torch.empty(n // 2, dtype=torch.uint8, device=like.device), persistent=False)
        self.register_buffer("scales", torch.empty(n // BLOCK, device=like.device), persistent=False)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The weight in a dtype."""
        if torch.compiler.is_compiling():  # one kernel, without copies
            return dequantize(self.codes, self.scales, dtype).view(self.shape)
        out = torch.empty(2 * self.codes.numel(), dtype=dtype, device=self.codes.device)
        for part in _parts(out.numel()):
            codes, scales = self.codes[part.start // 2 : part.stop // 2], self.scales[part.start // BLOCK :]
            out[part] = dequantize(codes, scales[: (part.stop - part.start) // BLOCK], dtype)
        return out.view(self.shape)

    @torch.no_grad()
    def quantize_(self, weight: Tensor) -> None:
        """Take over the values of a weight of this shape."""
        flat = weight.reshape(-1)
        for part in _parts(flat.numel()):
            codes, scales = quantize(flat[part])
            self.codes[part.start // 2 : part.stop // 2] = codes
            self.scales[part.start // BLOCK : part.stop // BLOCK] = scales


def fits(weight: Tensor) -> bool:
    """Whether a weight is a whole number of blocks."""
    return weight.numel() % BLOCK == 0


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values (n,) -> codes (n / 2,) uint8 and scales (n / 64,) float32: each value's nearest level."""
    blocks = values.float().view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    levels = torch.tensor(LEVELS, device=values.device)
    relative = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
    codes = torch.bucketize(relative, (levels[1:] + levels[:-1]) / 2).to(torch.uint8).view(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1], scales


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The values (n,) of codes; computed in float32, rounded once."""
    levels = torch.tensor(LEVELS, device=codes.device)
    both = torch.stack([codes >> 4, codes & 15], 1).int()  # (n / 2, 2)
    return (levels[both].view(-1, BLOCK) * scales.unsqueeze(1)).view(-1).to(dtype)


def _parts(n: int) -> list[slice]:
    return [slice(start, min(start + _AT_ONCE, n)) for start in range(0, n, _AT_ONCE)]
