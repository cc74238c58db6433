"""Weight gradients in separate autograd nodes, so that a collective can start before they are computed.

By default, an operator's backward computes the gradients of its input and of its weights in one node, and whatever
waits for the input's gradient starts after both. Here the operator defers the weight gradients: it leaves functions
that compute them, and another node, created before the operator, calls them. Of the nodes that are ready, autograd runs
the one that forward created last. So a node created between the two starts its work, such as an exchange between ranks,
and the weight gradients are computed at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast, overload

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

Deferred = dict[str, Callable[[], Tensor]]  # computes the gradient of each weight, and of the input as "x"


class LateGradients:
    """The deferred weight gradients of one call of an operator."""

    def __init__(self) -> None:
        self._deferred: Deferred = {}

    @overload
    def weight(self, name: str, weight: Tensor) -> Tensor: ...
    @overload
    def weight(self, name: str, weight: Tensor | None) -> Tensor | None: ...
    def weight(self, name: str, weight: Tensor | None) -> Tensor | None:
        """Return the same weight for the operator to use; the node created here computes its gradient later."""
        return None if weight is None else cast(Tensor, _Late.apply(weight, self, name))

    def defer(self, name: str, compute: Callable[[], Tensor]) -> None:
        """Defer a gradient; called by the operator's backward, which then returns None for this weight."""
        self._deferred[name] = compute

    def compute(self, name: str) -> Tensor:
        """Compute a deferred gradient, and free what it needed."""
        return self._deferred.pop(name)()


def computed(deferred: Deferred, late: LateGradients | None = None) -> dict[str, Tensor]:
    """Compute the gradients in order. With `late`, compute only that of "x" and defer those of the weights.

    A collective may be waiting for the gradient of x.

    Args:
        deferred: is emptied, so that inputs are freed as soon as no later gradient needs them.
        late: receives the weight gradients; None: compute all now.
    """
    found: dict[str, Tensor] = {}
    for name in list(deferred):
        compute = deferred.pop(name)
        if late is None or name == "x":
            found[name] = compute()
        else:
            late.defer(name, compute)
    return found


class _Context(FunctionCtx):
    late: LateGradients
    name: str


class _Late(torch.autograd.Function):
    """The identity on the weight."""

    @staticmethod
    def forward(ctx: _Context, weight: Tensor, late: LateGradients, name: str) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.late, ctx.name = late, name
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: _Context, grad: Tensor | None) -> tuple[Tensor, None, None]:
        return ctx.late.compute(ctx.name) if grad is None else grad, None, None
