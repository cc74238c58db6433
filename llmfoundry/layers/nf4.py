"""Frozen weights in 4 bits: NF4, with sixteen levels and one scale for every 64 values (QLoRA).

A weight takes 4.5 bits per value instead of 16 or 32. It is dequantized, to the dtype of the input, each time a layer
runs; with activation recomputation no copy outlives its block. Ranks may share the codes of a weight: each keeps a
part, and they are all-gathered, in 4.5 bits per value, just before dequantization.
Source: Dettmers et al. 2023, arXiv:2305.14314, which defines the levels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from llmfoundry import runtime
from llmfoundry.layers.exact import ExactBuffers

BLOCK = 64  # values per scale
# Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_AT_ONCE = 2**24  # values that are quantized or dequantized together, to bound the float32 copies


class NF4Weight(ExactBuffers):
    """A weight in NF4. Its buffers are not in the state dict, because they are made from the base model's weights."""

    codes: Tensor  # (n / 2,) uint8, the first of two values in the high bits; of a shared weight, this rank's part
    scales: Tensor  # (n / 64,) float32, the largest magnitude of each block

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.shape = tuple(like.shape)  # of the result of `forward`
        self.first = 0  # its offset in dim 0 of the full weight
        self._holders: dist.ProcessGroup | None = None  # the ranks that hold the other parts of dim 0
        self._sharers: dist.ProcessGroup | None = None  # the ranks that share the codes
        self._allocate(self._blocks, like.device)

    def keep_part(self, group: dist.ProcessGroup) -> None:
        """Keep only this rank's equal part of dim 0, such as its experts. Call this on the meta device.

        Raises:
            ValueError: if a part is not a multiple of 64 values.
        """
        ranks, rank = group.size(), group.rank()
        n = self.shape[0] // ranks
        if n * math.prod(self.shape[1:]) % BLOCK:
            raise ValueError(f"{list(self.shape)} on {ranks} ranks: a part is not a whole number of {BLOCK} values")
        self.shape, self.first, self._holders = (n, *self.shape[1:]), rank * n, group
        self._allocate(self._blocks, self.codes.device)

    def share(self, group: dist.ProcessGroup) -> None:
        """Keep only this rank's part of the codes. Call this on the meta device."""
        self._sharers = group
        self._allocate(-(-self._blocks // group.size()), self.codes.device)  # equal parts; the last may be padded

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape including the parts of other ranks."""
        return (self.shape[0] * (1 if self._holders is None else self._holders.size()), *self.shape[1:])

    @property
    def _blocks(self) -> int:
        return math.prod(self.shape) // BLOCK

    def _allocate(self, blocks: int, device: torch.device) -> None:
        codes, scales = torch.empty(blocks * BLOCK // 2, dtype=torch.uint8), torch.empty(blocks)
        self.register_buffer("codes", codes.to(device), persistent=False)
        self.register_buffer("scales", scales.to(device), persistent=False)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """Dequantize the weight to a dtype."""
        codes, scales = (self.codes, self.scales) if self._sharers is None else self._gathered(self._sharers)
        if torch.compiler.is_compiling():  # one fused kernel, without copies
            return dequantize(codes, scales, dtype).view(self.shape)
        out = torch.empty(2 * codes.numel(), dtype=dtype, device=codes.device)
        for part in _parts(out.numel()):
            some = slice(part.start // BLOCK, part.stop // BLOCK)
            out[part] = dequantize(codes[part.start // 2 : part.stop // 2], scales[some], dtype)
        return out.view(self.shape)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """Dequantize the weight, including the parts of other ranks. This is a collective if there are any."""
        mine = self(dtype)
        if self._holders is None:
            return mine
        out = mine.new_empty(self._holders.size() * mine.shape[0], *mine.shape[1:])
        runtime.all_gather(out, mine, group=self._holders)
        return out

    def pieces(self) -> Iterator[slice]:
        """Yield the slices of dim 0 to quantize one at a time, bounded in size.

        Only slices of which this rank keeps a part are returned; no other values are needed.
        """
        row = math.prod(self.shape[1:])
        step = BLOCK // math.gcd(BLOCK, row)
        rows = max(_AT_ONCE // (row * step), 1) * step
        mine = self._mine
        for start in range(0, self.shape[0], rows):
            stop = min(start + rows, self.shape[0])
            if start * row < mine.stop and stop * row > mine.start:
                yield slice(start, stop)

    @torch.no_grad()
    def quantize_(self, values: Tensor, start: int = 0) -> None:
        """Quantize values into this weight.

        Args:
            values: the values of the whole weight, or of a slice from `pieces`.
            start: where the slice starts in dim 0.
        """
        flat, mine = values.reshape(-1), self._mine
        begin = start * math.prod(self.shape[1:])
        for part in _parts(flat.numel()):
            first, last = max(begin + part.start, mine.start), min(begin + part.stop, mine.stop)
            if first >= last:
                continue
            codes, scales = quantize(flat[first - begin : last - begin])
            first, last = first - mine.start, last - mine.start
            self.codes[first // 2 : last // 2] = codes
            self.scales[first // BLOCK : last // BLOCK] = scales

    @property
    def _mine(self) -> slice:
        """The range of values whose codes this rank holds."""
        n, held = math.prod(self.shape), 2 * self.codes.numel()
        rank = 0 if self._sharers is None else self._sharers.rank()
        return slice(min(rank * held, n), min((rank + 1) * held, n))

    @torch.compiler.disable
    def _gathered(self, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        """All-gather the codes and scales."""
        found = []
        for mine, n in ((self.codes, self._blocks * BLOCK // 2), (self.scales, self._blocks)):
            out = mine.new_empty(group.size() * len(mine))
            runtime.meet()
            runtime.all_gather(out, mine, group=group)
            found.append(out[:n])
        return found[0], found[1]


def fits(weight: Tensor) -> bool:
    """Return whether a weight's size is a multiple of the block size."""
    return weight.numel() % BLOCK == 0


def quantize(values: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize values (n,) to codes (n / 2,) uint8 and scales (n / 64,) float32, rounding to the nearest level."""
    blocks = values.float().view(-1, BLOCK)
    scales = blocks.abs().amax(1)
    levels = torch.tensor(LEVELS, device=values.device)
    relative = blocks / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
    codes = torch.bucketize(relative, (levels[1:] + levels[:-1]) / 2).to(torch.uint8).view(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1], scales


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantize codes to values (n,); computed in float32, rounded once."""
    levels = torch.tensor(LEVELS, device=codes.device)
    both = torch.stack([codes >> 4, codes & 15], 1).int()  # (n / 2, 2)
    return (levels[both].view(-1, BLOCK) * scales.unsqueeze(1)).view(-1).to(dtype)


def _parts(n: int) -> list[slice]:
    return [slice(start, min(start + _AT_ONCE, n)) for start in range(0, n, _AT_ONCE)]
