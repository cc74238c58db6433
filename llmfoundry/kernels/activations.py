"""Activations of feed-forward blocks, plain and gated, with the derivatives for hand-written backward passes.

Shapes: M rows, F ffn hidden size; `...` any leading dims. A gated block's pre-activation is `[gate; up]`.
Everything is computed in float32 (float64 for float64 input) and rounded once, to the dtype of the input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SWIGLU_OSS_ALPHA = 1.702  # gpt-oss: gate * sigmoid(1.702 gate) * (up + 1)
SWIGLU_OSS_LIMIT = 7.0  # its default clamp
_BLOCK_VALUES = 2**18


class Scalar(NamedTuple):
    """An elementwise function, and its backward."""

    value: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]  # (gradient of value(x), x) -> gradient of x


def _swish_oss(x: Tensor) -> Tensor:
    return x * torch.sigmoid(SWIGLU_OSS_ALPHA * x)


def _swish_oss_backward(grad: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(SWIGLU_OSS_ALPHA * x)
    return grad * s * (1 + SWIGLU_OSS_ALPHA * x * (1 - s))


# PyTorch's own functions compute in float32 internally. `swiglu_oss` here is only the gate's activation in gpt-oss.
_SCALARS: dict[str, Scalar] = {
    "silu": Scalar(F.silu, torch.ops.aten.silu_backward),
    "gelu": Scalar(F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": Scalar(
        lambda x: F.gelu(x, approximate="tanh"),
        lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    ),
    "relu": Scalar(F.relu, lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0)),
    "relu2": Scalar(lambda x: F.relu(x).square(), lambda grad, x: 2 * grad * F.relu(x)),
    "swiglu_oss": Scalar(_swish_oss, _swish_oss_backward),
}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or float64 for float64, so that no path lowers the precision of float64 parity tests."""
    return torch.promote_types(dtype, torch.float32)


# The activations that a YAML may name for a block without a gate.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    name: _SCALARS[name].value for name in ("silu", "gelu", "gelu_tanh", "relu", "relu2")
}
# The activations for a gated block; `swiglu_oss`, gpt-oss's clamped unit, has no ungated form.
GLU_ACTIVATIONS: tuple[str, ...] = tuple(_SCALARS)


def clamp_limit(activation: str, limit: float | None) -> float | None:
    """Return the effective clamp: the given one, else gpt-oss's own for `swiglu_oss`, else None."""
    return SWIGLU_OSS_LIMIT if limit is None and activation == "swiglu_oss" else limit


def _gate_and_up(h: Tensor, activation: str, limit: float | None) -> tuple[Tensor, Tensor]:
    """Return (gate, up), each (..., F) in float32, clamped, with up shifted by 1 for gpt-oss."""
    gate, up = h.to(accumulation_dtype(h.dtype)).chunk(2, dim=-1)
    limit = clamp_limit(activation, limit)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate, up + 1 if activation == "swiglu_oss" else up


def glu(h: Tensor, activation: str, limit: float | None = None) -> Tensor:
    """Compute the gated unit `act(gate) * up`.

    Args:
        h: (..., 2F), gate then up.
        activation: one of `GLU_ACTIVATIONS`. `swiglu_oss` is `gate * sigmoid(1.702 gate) * (up + 1)`.
        limit: first clamp gate from above and up on both sides; None: no clamp.

    Returns:
        (..., F) in the dtype of `h`.

    Source: Shazeer 2020, arXiv:2002.05202; the clamped unit: OpenAI 2025, arXiv:2508.10925.
    """
    gate, up = _gate_and_up(h, activation, limit)
    return (_SCALARS[activation].value(gate) * up).to(h.dtype)


def activate(h: Tensor, activation: str, gated: bool, limit: float | None = None) -> Tensor:
    """Compute activations (M, F) in float32 from (M, 2F) or (M, F), for a caller that scales before rounding.

    It works in place on its own intermediates, so autograd cannot differentiate it.
    """
    out = h.new_empty(h.shape[0], h.shape[1] // (2 if gated else 1), dtype=accumulation_dtype(h.dtype))
    for block, into in _blocks(h, out):
        if gated:
            gate, up = _gate_and_up(block, activation, limit)
            torch.mul(_SCALARS[activation].value(gate), up, out=into)
        else:
            into.copy_(_SCALARS[activation].value(block.to(out.dtype)))
    return out


def activate_backward(grad: Tensor, h: Tensor, activation: str, gated: bool, limit: float | None = None) -> Tensor:
    """Compute the gradient of `h` from that of `activate(h, ...)`.

    Args:
        grad: (M, F) float32.
        h: (M, 2F) or (M, F) pre-activations, any float dtype.
        activation: as in `activate`.
        gated: as in `activate`.
        limit: as in `activate`.

    Returns:
        The gradient, in the shape and dtype of `h`; zero beyond the clamp's limit.
    """
    out = torch.empty_like(h)
    for block_grad, block, into in _blocks(grad, h, out):
        into.copy_(_block_backward(block_grad, block, activation, gated, limit))
    return out


def _block_backward(grad: Tensor, h: Tensor, activation: str, gated: bool, limit: float | None) -> Tensor:
    value, backward = _SCALARS[activation]
    if not gated:
        return backward(grad, h.to(accumulation_dtype(h.dtype)))
    gate, up = _gate_and_up(h, activation, limit)  # (M, F) each
    grad_gate, grad_up = backward(grad * up, gate), value(gate).mul_(grad)
    limit = clamp_limit(activation, limit)
    if limit is not None:
        raw_gate, raw_up = h.chunk(2, dim=-1)
        grad_gate = grad_gate.masked_fill(raw_gate > limit, 0)
        grad_up = grad_up.masked_fill(raw_up.abs() > limit, 0)
    return torch.cat([grad_gate, grad_up], dim=-1)  # (M, 2F)


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield blocks of rows of all tensors. On a CPU, intermediates that fit in its cache halve the time."""
    rows = tensors[0].shape[0]
    if tensors[0].device.type == "cpu":
        rows = min(rows, max(1, _BLOCK_VALUES // max(1, tensors[0].shape[1])))
    return zip(*(tensor.split(max(1, rows)) for tensor in tensors), strict=True)
