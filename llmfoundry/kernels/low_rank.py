"""Adapters computed beside a frozen weight: y = x W^T + s (x A^T) B^T.

Shapes: T tokens, E experts, J inner width of a weight, N its outputs, r rank; W (E, N, J), A (E, r, J), B (E, N, r).
Added to the weight instead, in bf16 a change below 1/256 of a weight is lost. Added to x W^T after that was rounded,
the same share of it is lost: the sum rounds back to where it was. So x A^T is a product of its own, r columns wide, and
its product with B^T goes into the float32 accumulator of the frozen product: the sum is rounded once.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from llmfoundry.kernels.late import LateGradients

RANK_STEP = 16  # the least inner width of a product on tensor cores; smaller ranks are filled up with zeros


def rounds_once(dtype: torch.dtype) -> bool:
    """Whether a sum with an adapter has to be rounded once: float32 has bits to spare."""
    return dtype.itemsize < 4


class LowRank(NamedTuple):
    """The adapter of one stacked weight."""

    a: Tensor  # (E, r, J)
    b: Tensor  # (E, N, r)


class Operands(NamedTuple):
    """What the products read: ranks filled up to a multiple. None: that weight has no adapter."""

    up_a: Tensor | None  # (E, r, D)
    up_b: Tensor | None  # (E, 2F, r)
    down_a: Tensor | None  # (E, r, F)
    down_b: Tensor | None  # (E, D, r)


class ExpertAdapters(NamedTuple):
    """The adapters of a layer's experts."""

    up: LowRank | None = None  # of w1
    down: LowRank | None = None  # of w2
    scale: float = 1.0
    dropout: float = 0.0  # of what A sees; 0 outside training

    @property
    def pairs(self) -> list[LowRank]:
        """Those that exist."""
        return [pair for pair in (self.up, self.down) if pair is not None]

    def operands(self, step: int = RANK_STEP, *, scaled: bool = True) -> Operands:
        """The tensors as products read them, B times the scale if `scaled`; gradients flow back through."""
        return Operands(*self._operands_of(self.up, step, scaled), *self._operands_of(self.down, step, scaled))

    def deferred(self, late: LateGradients) -> ExpertAdapters:
        """The same adapters; nodes that are created now compute the gradients of their operands."""
        names = Operands._fields
        tensors = [late.weight(name, tensor) for name, tensor in zip(names, self.operands(), strict=True)]
        up, down = (None if a is None or b is None else LowRank(a, b) for a, b in (tensors[:2], tensors[2:]))
        return ExpertAdapters(up, down, dropout=self.dropout)  # B holds the scale now

    def _operands_of(self, pair: LowRank | None, step: int, scaled: bool) -> tuple[Tensor, Tensor] | tuple[None, None]:
        if pair is None:
            return None, None
        a, b = pair.a, pair.b * self.scale if scaled and self.scale != 1 else pair.b
        missing = -a.shape[1] % step
        return (F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))) if missing else (a, b)


@torch.library.custom_op("llmfoundry::frozen_linear_plus", mutates_args=())
def frozen_linear_plus(x: Tensor, weight: Tensor, addend: Tensor) -> Tensor:
    """`x W^T + addend`, rounded once: an operator of its own, as a compiler would take the sum apart.

    Args:
        x: (T, J).
        weight: (N, J), which gets no gradient.
        addend: (T, N), what an adapter adds.
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
