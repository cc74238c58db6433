"""Activations of the feed-forward blocks, plain and gated.

Shapes: F ffn hidden size; `...` any leading shape.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "relu2": _relu2,
}


def glu(h: Tensor, activation: str, limit: float | None = None) -> Tensor:
    """`act(gate) * up`, computed in float32 (float64 stays) and rounded once.

    Args:
        h: (..., 2F), the gate's half first.
        activation: a name in `ACTIVATIONS`.
        limit: clamp gate to at most `limit` and up to [-limit, limit], or None.

    Returns:
        (..., F) in the dtype of `h`.
    """
    gate, up = h.to(torch.promote_types(h.dtype, torch.float32)).chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (ACTIVATIONS[activation](gate) * up).to(h.dtype)
