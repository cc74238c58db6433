"""Rotary position embeddings (RoPE), in the rotate-half convention, with the scalings of long-context models.

Shapes: B rows, S sequence, N heads of any kind, C head_dim.
The table is computed from the positions once per forward, in float32, with the same sequence of operations as in
`transformers`, so that a converted checkpoint gets bitwise the same values. Nothing is stored in buffers, so the length
has no limit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor

from llmfoundry.config import Choice


class Rope(NamedTuple):
    """Cosines and sines of one forward's positions, (S, 1, C/2) or (B, S, 1, C/2) float32, broadcast over heads."""

    cos: Tensor
    sin: Tensor


class RopeScaling(Choice, tag="type"):
    """Base class of the scalings: `rope_scaling` in the YAML."""

    type: str = "none"  # how the wavelengths change

    def inv_freq(self, theta: float, dim: int, device: torch.device) -> Tensor:
        """Return the frequencies (C/2,) float32, in radians per position."""
        raise NotImplementedError

    @property
    def magnitude(self) -> float:
        """The factor on cosines and sines."""
        return 1.0


def _plain_inv_freq(theta: float, dim: int, device: torch.device) -> Tensor:
    exponent = torch.arange(0, dim, 2, dtype=torch.int64, device=device).to(torch.float32) / dim
    return 1.0 / (theta**exponent)


class NoScaling(RopeScaling, names=("none", "default", "no_scaling")):
    """No scaling (Su et al. 2021, arXiv:2104.09864)."""

    def inv_freq(self, theta: float, dim: int, device: torch.device) -> Tensor:
        """Return the frequencies (C/2,) float32, in radians per position."""
        return _plain_inv_freq(theta, dim, device)


class LinearScaling(RopeScaling, names=("linear",)):
    """Divides positions by `factor` (Chen et al. 2023, arXiv:2306.15595)."""

    factor: float = Field(gt=0)  # new context length / original context length

    def inv_freq(self, theta: float, dim: int, device: torch.device) -> Tensor:
        """Return the frequencies (C/2,) float32, in radians per position."""
        return _plain_inv_freq(theta, dim, device) / self.factor


class Llama3Scaling(RopeScaling, names=("llama3",)):
    """Divides low frequencies by `factor`, keeps high ones, and blends those between (Llama 3.1)."""

    factor: float = Field(gt=0)  # new context length / original context length
    low_freq_factor: float = Field(gt=0)  # wavelengths above original length / this are scaled
    high_freq_factor: float = Field(gt=0)  # wavelengths below original length / this are kept
    original_max_position_embeddings: int = Field(gt=0)  # context length of pretraining, in tokens

    @model_validator(mode="after")
    def _check_range(self) -> Llama3Scaling:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} must exceed low_freq_factor={self.low_freq_factor}"
            )
        return self

    def inv_freq(self, theta: float, dim: int, device: torch.device) -> Tensor:
        """Return the frequencies (C/2,) float32, in radians per position."""
        inv_freq = _plain_inv_freq(theta, dim, device)
        low, high, length = self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings
        wavelength = 2 * math.pi / inv_freq
        is_long, is_short = wavelength > length / low, wavelength < length / high
        scaled = torch.where(is_long, inv_freq / self.factor, inv_freq)
        smooth = (length / wavelength - low) / (high - low)
        blended = (1 - smooth) * scaled / self.factor + smooth * scaled
        return torch.where(~is_long & ~is_short, blended, scaled)


class YarnScaling(RopeScaling, names=("yarn",)):
    """Interpolates dims of low frequency and keeps the others (Peng et al. 2023, arXiv:2309.00071)."""

    factor: float = Field(gt=0)  # new context length / original context length
    original_max_position_embeddings: int = Field(gt=0)  # context length of pretraining, in tokens
    beta_fast: float = Field(32.0, gt=0)  # dims with more rotations over the original length are kept
    beta_slow: float = Field(1.0, gt=0)  # dims with fewer rotations are fully interpolated
    attention_factor: float | None = Field(None, gt=0)  # None: from `factor`, or from the two mscales
    mscale: float | None = None  # DeepSeek's; with mscale_all_dim it sets attention_factor
    mscale_all_dim: float | None = None  # DeepSeek's, see mscale
    truncate: bool = True  # round the blended range outwards to whole dims; gpt-oss does not

    @property
    def magnitude(self) -> float:
        """The factor on cosines and sines."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            all_dims = yarn_magnitude(self.factor, self.mscale_all_dim)
            return yarn_magnitude(self.factor, self.mscale) / all_dims
        return yarn_magnitude(self.factor, 1.0)

    def inv_freq(self, theta: float, dim: int, device: torch.device) -> Tensor:
        """Return the frequencies (C/2,) float32, in radians per position."""
        exponent = torch.arange(0, dim, 2, device=device).to(torch.float32) / dim
        wavelength = theta**exponent
        low, high = self._dim_of(self.beta_fast, theta, dim), self._dim_of(self.beta_slow, theta, dim)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high = high + 0.001 if low == high else high  # the ramp would divide by zero
        ramp = ((torch.arange(dim // 2, dtype=torch.float32, device=device) - low) / (high - low)).clamp(0, 1)
        kept = 1 - ramp
        return 1.0 / (self.factor * wavelength) * (1 - kept) + 1.0 / wavelength * kept

    def _dim_of(self, turns: float, theta: float, dim: int) -> float:
        """Return the (fractional) dim that makes `turns` rotations over the original length."""
        length = self.original_max_position_embeddings
        return (dim * math.log(length / (turns * 2 * math.pi))) / (2 * math.log(theta))


def yarn_magnitude(factor: float, mscale: float) -> float:
    """Return YaRN's factor on q and k for a context that is `factor` times longer."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def rope_table(scaling: RopeScaling, theta: float, dim: int, positions: Tensor) -> Rope:
    """Compute the RoPE table of one forward.

    Args:
        scaling: of the frequencies.
        theta: the base of the frequencies.
        dim: C, even.
        positions: (S,) or (B, S) int64.
    """
    angles = positions.to(torch.float32)[..., None] * scaling.inv_freq(theta, dim, positions.device)  # (..., S, C/2)
    cos, sin = angles.cos(), angles.sin()
    if scaling.magnitude != 1.0:
        cos, sin = cos * scaling.magnitude, sin * scaling.magnitude
    return Rope(cos.unsqueeze(-2), sin.unsqueeze(-2))


def rotate(x: Tensor, rope: Rope, interleaved: bool = False) -> Tensor:
    """Rotate each head of q or k by its position.

    Args:
        x: (B, S, N, C); computed in float32 (or float64, if given), rounded once.
        rope: the RoPE table of the S positions.
        interleaved: rotate dims 2i and 2i + 1 together, as DeepSeek does, instead of i and i + C/2.

    Returns:
        (B, S, N, C): the first dims of all pairs, then the second ones, even if `x` was interleaved. This is consistent
        between q and k, and only their products matter.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = rope.cos.to(dtype), rope.sin.to(dtype)  # (S, 1, C/2), or per row
    x_up = x.to(dtype)
    a, b = (x_up[..., ::2], x_up[..., 1::2]) if interleaved else x_up.chunk(2, dim=-1)  # (B, S, N, C/2) each
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
