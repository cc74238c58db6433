"""The experts of a MoE layer in Triton: the operators for forward and backward, which launch the kernels.

Shapes: T tokens, D d_model, F ffn hidden size, E experts, K top_k, R rows in expert order.
Forward: gather, up projection with activation, down projection, sum per token. Backward: gather, gradients of
activation and routing weights, gradient of x, sum per token; then the weight gradients dw2 and dw1, in operators of
their own so that a collective can start before them. Forward keeps x, the pre-activation h and int32 indices; backward
computes a' = s * a and the gathered rows again. The host reads nothing, so a CUDA graph can capture both, and the
routing may change between replays.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from llmfoundry.kernels.gather import gather, slot_sums, sum_rows
from llmfoundry.kernels.grouped import grouped
from llmfoundry.kernels.late import LateGradients
from llmfoundry.kernels.routing import Order
from llmfoundry.kernels.routing_triton import sort_by_expert_triton
from llmfoundry.kernels.tiles import tile_rows
from llmfoundry.kernels.tune import (
    DOWN,
    DW1,
    DW2,
    DX,
    UP,
    UP_BACKWARD,
    Problem,
    pick,
)
from llmfoundry.kernels.up import up
from llmfoundry.kernels.up_backward import up_backward
from llmfoundry.kernels.weight_grad import weight_grad


def experts_ffn_triton(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    w1: Tensor,
    w2: Tensor,
    *,
    activation: str,
    gated: bool,
    n_rows: int | None = None,
    late: LateGradients | None = None,
) -> Tensor:
    """`experts.experts_ffn` by the Triton kernels; arguments as there, checked there. There must be a token."""
    bound = experts.numel() if n_rows is None else min(n_rows, experts.numel())
    inputs = (
        x.contiguous(), weights.contiguous(), w1.contiguous(), w2.contiguous(),
        *_order(experts.contiguous(), w2.shape[0]), activation, gated, max(bound, 1),
    )  # fmt: skip
    if late is not None:
        return cast(Tensor, _LateExperts.apply(late, *inputs))
    return cast(Tensor, _forward(*inputs)[0])


@torch.library.custom_op("llmfoundry::sort_by_expert", mutates_args=())
def _order(experts: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(sort_by_expert_triton(experts, n_experts))  # type: ignore[return-value]


@_order.register_fake
def _(experts: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    row_slot, slot_row = (experts.new_empty(experts.numel(), dtype=torch.int32) for _ in range(2))
    return experts.new_empty(n_experts + 1, dtype=torch.int32), row_slot, slot_row


@torch.library.custom_op("llmfoundry::experts_forward", mutates_args=())
def _forward(
    x: Tensor,
    weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    expert_start: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    activation: str,
    gated: bool,
    n_rows: int,
) -> tuple[Tensor, Tensor]:
    """y (T, D), and h (R, 2F) or (R, F)."""
    order = Order(expert_start, row_slot, slot_row)
    problem = _problem(w1, w2, n_rows)
    tiles = tile_rows(expert_start, n_rows)
    x_rows = gather(x, order, n_rows)  # (R, D)
    h, a = pick(
        UP,
        problem,
        partial(up, x_rows, weights, row_slot, tiles, w1, activation=activation, gated=gated),
    )
    del x_rows
    y_rows = pick(DOWN, problem, partial(grouped, a, w2, tiles))  # (R, D)
    y = sum_rows(y_rows, order, weights.shape[1])
    return y, h


@_forward.register_fake
def _(
    x: Tensor,
    weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    expert_start: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    activation: str,
    gated: bool,
    n_rows: int,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(n_rows, w1.shape[1])


class _RowGradients(NamedTuple):
    """Gradients of the inputs (empty if not needed), and the rows that the weight gradients are computed from."""

    dx: Tensor  # (T, D)
    dweights: Tensor  # (T, K) float32
    dy_rows: Tensor  # (R, D)
    dh: Tensor  # (R, 2F) or (R, F)
    a: Tensor  # (R, F), a' = s * a


@torch.library.custom_op("llmfoundry::experts_backward_rows", mutates_args=())
def _backward_rows(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    h: Tensor,
    w1: Tensor,
    w2: Tensor,
    expert_start: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    activation: str,
    gated: bool,
    n_rows: int,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`_RowGradients`, as a tuple, which is what operators return."""
    order = Order(expert_start, row_slot, slot_row)
    problem = _problem(w1, w2, n_rows)
    tiles = tile_rows(expert_start, n_rows)
    none = x.new_empty(0)
    dy_rows = gather(dy, order, n_rows)  # (R, D)
    dh, a, ds = pick(
        UP_BACKWARD,
        problem,
        partial(up_backward, dy_rows, h, weights, row_slot, tiles, w2, activation=activation, gated=gated),
    )
    dweights = slot_sums(ds, order).view(weights.shape) if need_weights else none
    dx = none
    if need_x:
        dx_rows = pick(DX, problem, partial(grouped, dh, w1, tiles, transposed=True))  # (R, D)
        dx = sum_rows(dx_rows, order, weights.shape[1])
    return _RowGradients(dx, dweights, dy_rows, dh, a)


@_backward_rows.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    h: Tensor,
    w1: Tensor,
    w2: Tensor,
    expert_start: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    activation: str,
    gated: bool,
    n_rows: int,
    need_x: bool,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dweights = (
        torch.empty_like(t) if need else x.new_empty(0) for t, need in ((x, need_x), (weights, need_weights))
    )
    return _RowGradients(dx, dweights, *(x.new_empty(n_rows, w) for w in (x.shape[1], w1.shape[1], w2.shape[2])))


@torch.library.custom_op("llmfoundry::experts_weight_gradient", mutates_args=())
def _weight_gradient(
    name: str,
    left: Tensor,
    right: Tensor,
    w1: Tensor,
    w2: Tensor,
    expert_start: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    n_rows: int,
) -> Tensor:
    """The gradient of the weight of this name: of w2 from dy_rows and a, of w1 from dh and x."""
    problem = _problem(w1, w2, n_rows)
    tiles = tile_rows(expert_start, n_rows)
    if name == "w1":
        right = gather(right, Order(expert_start, row_slot, slot_row), n_rows)
    return pick(DW1 if name == "w1" else DW2, problem, partial(weight_grad, left, right, tiles))


@_weight_gradient.register_fake
def _(
    name: str,
    left: Tensor,
    right: Tensor,
    w1: Tensor,
    w2: Tensor,
    expert_start: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    n_rows: int,
) -> Tensor:
    return torch.empty_like(w1 if name == "w1" else w2)


class _Context(Protocol):
    """What autograd gives to an operator's set-up and backward."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    unit: tuple[str, bool, int]
    late: LateGradients

    def save_for_backward(self, *tensors: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


Deferred = dict[str, Callable[[], Tensor]]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, str, bool, int]


def _setup(ctx: _Context, inputs: Inputs, output: tuple[Tensor, Tensor]) -> None:
    x, weights, w1, w2, *order, activation, gated, n_rows = inputs
    ctx.save_for_backward(x, weights, w1, w2, *order, output[1])
    ctx.set_materialize_grads(False)  # h is an output for this alone: no zeros as its gradient
    ctx.unit = (activation, gated, n_rows)


def _gradients(ctx: _Context, needs: tuple[bool, ...], dy: Tensor) -> tuple[Tensor | None, Tensor | None, Deferred]:
    """The gradients of x and weights, and functions that compute those of w1 and w2."""
    x, weights, w1, w2, *order, h = ctx.saved_tensors
    need_x, need_weights, need_w1, need_w2 = needs
    dx, dweights, dy_rows, dh, a = _backward_rows(
        dy.contiguous(), x, weights, h, w1, w2, *order, *ctx.unit, need_x, need_weights
    )
    n_rows = ctx.unit[-1]
    deferred: Deferred = {}
    if need_w2:
        deferred["w2"] = partial(_weight_gradient, "w2", dy_rows, a, w1, w2, *order, n_rows)
    if need_w1:
        deferred["w1"] = partial(_weight_gradient, "w1", dh, x, w1, w2, *order, n_rows)
    return dx if need_x else None, dweights if need_weights else None, deferred


def _autograd(ctx: _Context, dy: Tensor, _dh: None) -> tuple[Tensor | None, ...]:
    dx, dweights, deferred = _gradients(ctx, ctx.needs_input_grad[:4], dy)
    # `pop` frees what only dw2 needs before dw1 is computed.
    dw2, dw1 = (deferred.pop(name)() if name in deferred else None for name in ("w2", "w1"))
    return dx, dweights, dw1, dw2, *[None] * 6


_forward.register_autograd(_autograd, setup_context=_setup)


class _LateExperts(torch.autograd.Function):
    """`_forward`; its backward defers the gradients of the weights."""

    @staticmethod
    def forward(ctx: _Context, late: LateGradients, *inputs: *Inputs) -> Tensor:
        output = _forward(*inputs)
        _setup(ctx, inputs, output)
        ctx.late = late
        return cast(Tensor, output[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweights, deferred = _gradients(ctx, ctx.needs_input_grad[1:5], dy)
        for name, compute in deferred.items():
            ctx.late.defer(name, compute)
        return None, dx, dweights, *[None] * 8


Shape = tuple[int, ...]


@register_flop_formula(torch.ops.llmfoundry.experts_forward)
def _forward_flops(
    x: Shape, weights: Shape, w1: Shape, w2: Shape, *args: object, out_shape: object = None, **_: object
) -> int:
    """Two FLOPs a row and a weight of its expert: 6*T*K*D*F when gated."""
    return 2 * weights[0] * weights[1] * (w1[1] * w1[2] + w2[1] * w2[2])


@register_flop_formula(torch.ops.llmfoundry.experts_backward_rows)
def _backward_rows_flops(
    dy: Shape, x: Shape, weights: Shape, h: Shape, w1: Shape, w2: Shape, *args: object,
    out_shape: object = None, **_: object,
) -> int:  # fmt: skip
    return _forward_flops(x, weights, w1, w2)


@register_flop_formula(torch.ops.llmfoundry.experts_weight_gradient)
def _weight_gradient_flops(
    name: str, left: Shape, right: Shape, *args: object, out_shape: object = None, **_: object
) -> int:
    return 2 * left[0] * left[1] * right[1]


def _problem(w1: Tensor, w2: Tensor, n_rows: int) -> Problem:
    n_experts, d_model, hidden = w2.shape
    return Problem(w1.device, str(w1.dtype), d_model, hidden, n_experts, w1.shape[1] // hidden, n_rows)
