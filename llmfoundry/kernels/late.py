"""Gradients of weights in autograd nodes of their own, so that what does not need them goes first.

An operator's backward computes the gradients of its input and of its weights in one node, and whatever waits for the
input's gradient starts after both. Here that node leaves behind how the weights' are computed, and another node, made
before the operator, computes them. Of the nodes that are ready, autograd runs the one that forward made last: so a
node made between the two starts its work, say an exchange between ranks, and the gradients are computed beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast, overload

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx


class LateGradients:
    """The gradients that one call of an operator owes to its weights."""

    def __init__(self) -> None:
        self._owed: dict[str, Callable[[], Tensor]] = {}

    @overload
    def weight(self, name: str, weight: Tensor) -> Tensor: ...
    @overload
    def weight(self, name: str, weight: Tensor | None) -> Tensor | None: ...
    def weight(self, name: str, weight: Tensor | None) -> Tensor | None:
        """The same weight for the operator to use; its gradient is computed in a node that is made now."""
        return None if weight is None else cast(Tensor, _Late.apply(weight, self, name))

    def owe(self, name: str, compute: Callable[[], Tensor]) -> None:
        """For the operator's backward, which then returns None as the gradient of the weight of this name."""
        self._owed[name] = compute

    def pay(self, name: str) -> Tensor:
        """Compute the gradient, and forget what it needed."""
        return self._owed.pop(name)()


class _Context(FunctionCtx):
    late: LateGradients
    name: str


class _Late(torch.autograd.Function):
    """The weight itself."""

    @staticmethod
    def forward(ctx: _Context, weight: Tensor, late: LateGradients, name: str) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.late, ctx.name = late, name
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor | None) -> tuple[Tensor, None, None]:
        return ctx.late.pay(ctx.name) if grad is None else grad, None, None
