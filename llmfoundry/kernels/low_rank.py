"""Adapters computed beside a frozen weight: y = x W^T + s (x A^T) B^T.

Shapes: T tokens, E experts, J inner width of a weight, N its outputs, r rank; W (E, N, J), A (E, r, J), B (E, N, r).
If the adapter were merged into a bf16 weight, changes below 1/256 of the weight would be lost. If it were added to x
W^T after rounding, the same share of the output would be lost, because the sum rounds back. So x A^T is a separate
product, r columns wide, and its product with B^T is added to the float32 accumulator of the frozen product: the sum is
rounded only once.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from llmfoundry.kernels.late import LateGradients

RANK_STEP = 16  # minimum inner width of a tensor core product; smaller ranks are zero-padded


def rounds_once(dtype: torch.dtype) -> bool:
    """Return whether a sum with an adapter must be rounded only once; float32 has enough precision without it."""
    return dtype.itemsize < 4


class LowRank(NamedTuple):
    """The adapter of one stacked weight."""

    a: Tensor  # (E, r, J)
    b: Tensor  # (E, N, r)


class Operands(NamedTuple):
    """The operands of the products, with padded ranks. None if the weight has no adapter."""

    up_a: Tensor | None  # (E, r, D)
    up_b: Tensor | None  # (E, 2F, r)
    down_a: Tensor | None  # (E, r, F)
    down_b: Tensor | None  # (E, D, r)


class ExpertAdapters(NamedTuple):
    """The adapters of a layer's experts."""

    up: LowRank | None = None  # of w1
    down: LowRank | None = None  # of w2
    scale: float = 1.0
    dropout: float = 0.0  # of A's input; 0 outside training

    @property
    def pairs(self) -> list[LowRank]:
        """The adapters that exist."""
        return [pair for pair in (self.up, self.down) if pair is not None]

    def operands(self, step: int = RANK_STEP, *, scaled: bool = True) -> Operands:
        """Return the operands of the products, with B scaled if `scaled`; gradients flow back through this."""
        return Operands(*self._operands_of(self.up, step, scaled), *self._operands_of(self.down, step, scaled))

    def deferred(self, late: LateGradients) -> ExpertAdapters:
        """Return the same adapters; nodes created here compute the gradients of their operands later."""
        names = Operands._fields
        tensors = [late.weight(name, tensor) for name, tensor in zip(names, self.operands(), strict=True)]
        up, down = (None if a is None or b is None else LowRank(a, b) for a, b in (tensors[:2], tensors[2:]))
        return ExpertAdapters(up, down, dropout=self.dropout)  # B now includes the scale

    def _operands_of(self, pair: LowRank | None, step: int, scaled: bool) -> tuple[Tensor, Tensor] | tuple[None, None]:
        if pair is None:
            return None, None
        a, b = pair.a, pair.b * self.scale if scaled and self.scale != 1 else pair.b
        missing = -a.shape[1] % step
        return (F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))) if missing else (a, b)


@torch.library.custom_op("llmfoundry::frozen_linear_plus", mutates_args=())
def frozen_linear_plus(x: Tensor, weight: Tensor, addend: Tensor) -> Tensor:
    """Compute `x W^T + addend`, rounded once. A separate operator, because a compiler would split the sum.

    Args:
        x: (T, J).
        weight: (N, J), which gets no gradient.
        addend: (T, N), the adapter's output.
    """
    return torch.addmm(addend, x, weight.t())


@frozen_linear_plus.register_fake
def _(x: Tensor, weight: Tensor, addend: Tensor) -> Tensor:
    return torch.empty_like(addend)


class _Context(Protocol):
    saved_tensors: tuple[Tensor]
    needs_input_grad: tuple[bool, bool, bool]

    def save_for_backward(self, weight: Tensor) -> None: ...


def _keep_weight(ctx: _Context, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, None, Tensor]:
    return grad @ ctx.saved_tensors[0] if ctx.needs_input_grad[0] else None, None, grad


frozen_linear_plus.register_autograd(_backward, setup_context=_keep_weight)


@register_flop_formula(torch.ops.llmfoundry.frozen_linear_plus)
def _flops(x: tuple[int, int], weight: tuple[int, int], *args: object, out_shape: object = None, **_: object) -> int:
    return 2 * x[0] * weight[0] * weight[1]
