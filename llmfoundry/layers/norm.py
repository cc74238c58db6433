"""Normalization over the last dim, with float32 statistics whatever the input's dtype.

Shapes: `...` any leading shape, D the normalized size.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmfoundry.config import Config

NormType = Literal["rmsnorm", "layernorm", "low_precision_rmsnorm", "low_precision_layernorm"]


class NormConfig(Config):
    """The type of normalization; the model's config creates it from its own keys.

    LLM Foundry's low_precision_* names are accepted and mean the same: statistics are always float32, and the output
    has the input's dtype.
    """

    norm_type: NormType = "layernorm"
    eps: float = 1e-5
    bias: bool = True  # LayerNorm only

    @property
    def is_rms(self) -> bool:
        """Whether it is RMSNorm rather than LayerNorm."""
        return self.norm_type.endswith("rmsnorm")

    def n_params(self, dim: int) -> int:
        """Return the number of parameters for `dim` features."""
        return dim if self.is_rms or not self.bias else 2 * dim

    def build(self, dim: int) -> RMSNorm | LayerNorm:
        """Build the module for `dim` features."""
        return RMSNorm(dim, self.eps) if self.is_rms else LayerNorm(dim, self.eps, self.bias)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` (Zhang and Sennrich 2019, arXiv:1910.07467)."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (..., D) in the dtype of `x`; PyTorch's kernel computes statistics in float32 and rounds once."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class LayerNorm(nn.Module):
    """`(x - mean) / sqrt(var + eps) * weight [+ bias]`."""

    def __init__(self, dim: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (..., D) in the dtype of `x`; PyTorch's kernel computes statistics in float32 and rounds once."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias, self.eps)
