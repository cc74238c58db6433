"""Frozen weights in 4 bits: NF4, sixteen levels and one scale for each 64 values (QLoRA).

A weight takes 4.5 bits per value in place of 16 or 32. It is made anew, in the dtype of the input, each time that a
layer runs; with recompute no copy outlives its block. Ranks may share the codes of a weight: each keeps a part, and
they are gathered, in 4.5 bits, just before the weight is made.
Source: Dettmers et al. 2023, arXiv:2305.14314, whose levels these are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from llmfoundry import runtime
from llmfoundry.layers.exact import ExactBuffers

BLOCK = 64  # values that share a scale
# Quantiles of a normal distribution, scaled to [-1, 1], with an exact zero.
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_AT_ONCE = 2**24  # values that are made or quantised together, which bounds the float32 copies


class NF4Weight(ExactBuffers):
    """A weight in NF4. Its buffers are not part of the state dict: they come from the base model's weights."""

    codes: Tensor  # (n / 2,) uint8, the first of two values in the high bits; of a shared weight, this rank's part
    scales: Tensor  # (n / 64,) float32, the largest magnitude of each block

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.shape = tuple(like.shape)  # of what `forward` returns
        self.first = 0  # its place in dim 0 of the whole weight
        self._holders: dist.ProcessGroup | None = None  # ranks that have the other parts of dim 0
        self._sharers: dist.ProcessGroup | None = None  # ranks that share the codes
        self._allocate(self._blocks, like.device)

    def keep_part(self, group: dist.ProcessGroup) -> None:
        """Of dim 0, be this rank's of equal parts, such as its experts. On the meta device.

        Raises:
            ValueError: a part is not a whole number of blocks.
        """
        ranks, rank = group.size(), group.rank()
        n = self.shape[0] // ranks
        if n * math.prod(self.shape[1:]) % BLOCK:
            raise ValueError(f"{list(self.shape)} on {ranks} ranks: a part is not a whole number of {BLOCK} values")
        self.shape, self.first, self._holders = (n, *self.shape[1:]), rank * n, group
        self._allocate(self._blocks, self.codes.device)

    def share(self, group: dist.ProcessGroup) -> None:
        """Keep this rank's part of the codes only. On the meta device."""
        self._sharers = group
        self._allocate(-(-self._blocks // group.size()), self.codes.device)  # equal parts: the last may be longer

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The shape with the parts that other ranks have."""
        return (self.shape[0] * (1 if self._holders is None else self._holders.size()), *self.shape[1:])

    @property
    def _blocks(self) -> int:
        return math.prod(self.shape) // BLOCK

    def _allocate(self, blocks: int, device: torch.device) -> None:
        codes, scales = torch.empty(blocks * BLOCK // 2, dtype=torch.uint8), torch.empty(blocks)
        self.register_buffer("codes", codes.to(device), persistent=False)
        self.register_buffer("scales", scales.to(device), persistent=False)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """The weight in a dtype."""
        codes, scales = (self.codes, self.scales) if self._sharers is None else self._gathered(self._sharers)
        if torch.compiler.is_compiling():  # one kernel, without copies
            return dequantize(codes, scales, dtype).view(self.shape)
        out = torch.empty(2 * codes.numel(), dtype=dtype, device=codes.device)
        for part in _parts(out.numel()):
            some = slice(part.start // BLOCK, part.stop // BLOCK)
            out[part] = dequantize(codes[part.start // 2 : part.stop // 2], scales[some], dtype)
        return out.view(self.shape)

    def whole(self, dtype: torch.dtype) -> Tensor:
        """The weight with the parts that other ranks have. A collective if there are any."""
        mine = self(dtype)
        if self._holders is None:
            return mine
        out = mine.new_empty(self._holders.size() * mine.shape[0], *mine.shape[1:])
        runtime.all_gather(out, mine, group=self._holders)
        return out

    def pieces(self) -> Iterator[slice]:
        """What is quantised together: parts of dim 0 of the weight's shape, bounded in size.

        Only those of which this rank keeps something: no other values are needed.
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
        """Take over values.

        Args:
            values: those of a whole weight of this shape, or from `start` on in dim 0, as `pieces` says.
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
        """The values whose codes are here."""
        n, held = math.prod(self.shape), 2 * self.codes.numel()
        rank = 0 if self._sharers is None else self._sharers.rank()
        return slice(min(rank * held, n), min((rank + 1) * held, n))

    @torch.compiler.disable
    def _gathered(self, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        """Codes and scales of all ranks."""
        found = []
        for mine, n in ((self.codes, self._blocks * BLOCK // 2), (self.scales, self._blocks)):
            out = mine.new_empty(group.size() * len(mine))
            runtime.meet()
            runtime.all_gather(out, mine, group=group)
            found.append(out[:n])
        return found[0], found[1]


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
