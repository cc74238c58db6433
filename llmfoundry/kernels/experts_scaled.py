"""The experts of a MoE layer in e4m3: all six products have 8-bit operands; everything between them is in 16 bits.

Shapes: T tokens, D d_model, F ffn hidden size, E experts, K top_k, R rows in expert order.
Like experts_triton.py, but with the work divided differently: a row's scale needs the whole row, so products only store
their result, and the kernel that reads it back quantizes it: h (R, 2F) to a', and da' (R, F) with h to dh and a'. This
moves as many bytes as an epilogue that stores dh in 16 bits to be read again. Weights are quantized again in each
forward and, transposed, in each backward, at 3 bytes per weight each; so updates, checkpoints and shards need no
quantized state.
On a CPU, the plain references run instead of an emulation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from llmfoundry.kernels import e4m3, scaled
from llmfoundry.kernels.e4m3 import E4M3, Scaled
from llmfoundry.kernels.gather import (
    slot_sums,
    slot_sums_reference,
    sum_rows,
    sum_rows_reference,
)
from llmfoundry.kernels.late import Deferred, LateGradients, computed
from llmfoundry.kernels.routing import Order, sort_by_expert
from llmfoundry.kernels.routing_triton import sort_by_expert_triton
from llmfoundry.kernels.tiles import Tiles, tile_rows, tile_rows_reference


class _Passes(NamedTuple):
    """The kernels, or their references."""

    tiles: Callable[[Tensor, int], Tiles]
    gather: Callable[[Tensor, Order, int], Scaled]
    rows: Callable[[Tensor], Scaled]
    turned_weight: Callable[[Tensor, Tensor], Scaled]
    activate: Callable[..., Scaled]
    activate_backward: Callable[..., e4m3.Backward]
    product: Callable[[Scaled, Scaled, Tiles, torch.dtype], Tensor]
    weight_grad: Callable[[Scaled, Scaled, Tiles, torch.dtype, Tensor | None, int], Tensor]
    sum_rows: Callable[[Tensor, Order, int], Tensor]
    slot_sums: Callable[[Tensor, Order], Tensor]


def _weight_grad(
    left: Scaled, right: Scaled, tiles: Tiles, dtype: torch.dtype, row_slot: Tensor | None, top_k: int
) -> Tensor:
    """Compute a weight gradient from rows in expert order; with `row_slot`, `right` is in token order."""
    turned = e4m3.transpose_rows(left, tiles), e4m3.transpose_rows(right, tiles, row_slot, top_k)
    return scaled.scaled_weight_grad(*turned, tiles, dtype)


def _weight_grad_reference(
    left: Scaled, right: Scaled, tiles: Tiles, dtype: torch.dtype, row_slot: Tensor | None, top_k: int
) -> Tensor:
    if row_slot is not None:
        token = row_slot[: left.scale.numel()].long() // top_k
        right = Scaled(right.values[token], right.scale[token])
    return scaled.scaled_weight_grad_reference(left, right, tiles, dtype)


_KERNELS = _Passes(
    tile_rows,
    e4m3.gather_scaled,
    e4m3.scale_rows,
    e4m3.transpose_weight,
    e4m3.activate_scaled,
    e4m3.activate_backward_scaled,
    scaled.scaled_grouped,
    _weight_grad,
    sum_rows,
    slot_sums,
)
_REFERENCES = _Passes(
    tile_rows_reference,
    e4m3.gather_scaled_reference,
    e4m3.scale_rows_reference,
    e4m3.transpose_weight_reference,
    e4m3.activate_scaled_reference,
    e4m3.activate_backward_scaled_reference,
    scaled.scaled_grouped_reference,
    _weight_grad_reference,
    sum_rows_reference,
    slot_sums_reference,
)


def _passes(tensor: Tensor) -> _Passes:
    return _KERNELS if tensor.is_cuda else _REFERENCES


def experts_ffn_scaled(
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
    """`experts.experts_ffn` in e4m3; arguments as there (and checked there). Needs at least one token."""
    bound = experts.numel() if n_rows is None else min(n_rows, experts.numel())
    inputs = (
        x.contiguous(), weights.contiguous(), w1.contiguous(), w2.contiguous(),
        *_order(experts.contiguous(), w2.shape[0]), activation, gated, max(bound, 1),
    )  # fmt: skip
    if late is not None:
        return cast(Tensor, _LateExperts.apply(late, *inputs))
    return cast(Tensor, _forward(*inputs)[0])


@torch.library.custom_op("llmfoundry::sort_by_expert_anywhere", mutates_args=())
def _order(experts: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    sort = sort_by_expert_triton if experts.is_cuda else sort_by_expert
    return tuple(sort(experts, n_experts))  # type: ignore[return-value]


@_order.register_fake
def _(experts: Tensor, n_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    row_slot, slot_row = (experts.new_empty(experts.numel(), dtype=torch.int32) for _ in range(2))
    return experts.new_empty(n_experts + 1, dtype=torch.int32), row_slot, slot_row


class _Rows(NamedTuple):
    """The output, and what backward needs."""

    y: Tensor  # (T, D)
    h: Tensor  # (R, 2F) or (R, F)
    w1_scale: Tensor  # (E,) of the transposed weights
    w2_scale: Tensor  # (E,)


@torch.library.custom_op("llmfoundry::experts_scaled_forward", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `_Rows`, as a plain tuple for the operator."""
    order, run = Order(expert_start, row_slot, slot_row), _passes(x)
    tiles = run.tiles(expert_start, n_rows)
    matrix = run.rows(w1)
    w1_scale = matrix.scale.amax(1)
    h = run.product(run.gather(x, order, n_rows), matrix, tiles, x.dtype)
    del matrix  # frees memory before w2's matrix and the rows of y
    a = run.activate(h, weights, row_slot, tiles, activation=activation, gated=gated)
    matrix = run.rows(w2)
    y = run.sum_rows(run.product(a, matrix, tiles, x.dtype), order, weights.shape[1])
    return _Rows(y, h, w1_scale, matrix.scale.amax(1))


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scales = (weights.new_empty(w1.shape[0], dtype=torch.float32) for _ in range(2))
    return _Rows(torch.empty_like(x), x.new_empty(n_rows, w1.shape[1]), *scales)


class _RowGradients(NamedTuple):
    """The gradient of the routing weights, and the rows from which all other gradients are computed."""

    dweights: Tensor  # (T, K) float32; empty if not needed
    dy_rows: Tensor  # (R, D) e4m3
    dy_scale: Tensor  # (R,)
    dh: Tensor  # (R, 2F) or (R, F) e4m3
    dh_scale: Tensor  # (R,)
    a: Tensor  # (R, F) e4m3, a' = s * a
    a_scale: Tensor  # (R,)


@torch.library.custom_op("llmfoundry::experts_scaled_backward_rows", mutates_args=())
def _backward_rows(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    h: Tensor,
    w1: Tensor,
    w2: Tensor,
    w1_scale: Tensor,
    w2_scale: Tensor,
    expert_start: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    activation: str,
    gated: bool,
    n_rows: int,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return `_RowGradients`, as a plain tuple for the operator."""
    order, run = Order(expert_start, row_slot, slot_row), _passes(x)
    tiles = run.tiles(expert_start, n_rows)
    dy_rows = run.gather(dy, order, n_rows)  # (R, D)
    da = run.product(dy_rows, run.turned_weight(w2, w2_scale), tiles, x.dtype)  # (R, F)
    back = run.activate_backward(da, h, weights, row_slot, tiles, activation=activation, gated=gated)
    del da
    dweights = run.slot_sums(back.ds, order).view(weights.shape) if need_weights else x.new_empty(0)
    return _RowGradients(dweights, *dy_rows, *back.dh, *back.a)


@_backward_rows.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    h: Tensor,
    w1: Tensor,
    w2: Tensor,
    w1_scale: Tensor,
    w2_scale: Tensor,
    expert_start: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    activation: str,
    gated: bool,
    n_rows: int,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dweights = torch.empty_like(weights) if need_weights else x.new_empty(0)
    rows = (
        each
        for width in (x.shape[1], w1.shape[1], w2.shape[2])
        for each in (x.new_empty(n_rows, width, dtype=E4M3), x.new_empty(n_rows, dtype=torch.float32))
    )
    return _RowGradients(dweights, *rows)


@torch.library.custom_op("llmfoundry::experts_scaled_input_gradient", mutates_args=())
def _input_gradient(
    dh: Tensor,
    dh_scale: Tensor,
    w1: Tensor,
    w1_scale: Tensor,
    expert_start: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    n_rows: int,
    top_k: int,
) -> Tensor:
    """Compute the gradient of x (T, D) from that of h (R, 2F) or (R, F) in e4m3."""
    run = _passes(w1)
    tiles = run.tiles(expert_start, n_rows)
    rows = run.product(Scaled(dh, dh_scale), run.turned_weight(w1, w1_scale), tiles, w1.dtype)  # (R, D)
    return run.sum_rows(rows, Order(expert_start, row_slot, slot_row), top_k)


@_input_gradient.register_fake
def _(
    dh: Tensor,
    dh_scale: Tensor,
    w1: Tensor,
    w1_scale: Tensor,
    expert_start: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    n_rows: int,
    top_k: int,
) -> Tensor:
    return w1.new_empty(slot_row.numel() // top_k, w1.shape[2])


@torch.library.custom_op("llmfoundry::experts_scaled_weight_gradient", mutates_args=())
def _weight_gradient(
    left: Tensor,
    left_scale: Tensor,
    right: Tensor,
    right_scale: Tensor | None,
    expert_start: Tensor,
    row_slot: Tensor,
    n_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    """Compute a matrix's gradient from its output gradient (R, N) and input (R, J) in e4m3, or x (T, J), unscaled."""
    run = _passes(left)
    tiles = run.tiles(expert_start, n_rows)
    side = Scaled(left, left_scale)
    if right_scale is None:
        top_k = row_slot.numel() // right.shape[0]
        return run.weight_grad(side, run.rows(right), tiles, dtype, row_slot, top_k)
    return run.weight_grad(side, Scaled(right, right_scale), tiles, dtype, None, 0)


@_weight_gradient.register_fake
def _(
    left: Tensor,
    left_scale: Tensor,
    right: Tensor,
    right_scale: Tensor | None,
    expert_start: Tensor,
    row_slot: Tensor,
    n_rows: int,
    dtype: torch.dtype,
) -> Tensor:
    return left.new_empty(expert_start.shape[0] - 1, left.shape[1], right.shape[1], dtype=dtype)


class _Context(Protocol):
    """The autograd context of the operator."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    unit: tuple[str, bool, int]
    late: LateGradients

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, str, bool, int]


def _setup(ctx: _Context, inputs: Inputs, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    *tensors, activation, gated, n_rows = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)  # h and the scales are outputs only for backward: no zero gradients
    ctx.unit = (activation, gated, n_rows)


def _gradients(ctx: _Context, needs: tuple[bool, ...], dy: Tensor) -> tuple[Tensor | None, Deferred]:
    """Return the gradient of the routing weights, and functions that compute those of x and of the matrices."""
    x, weights, w1, w2, *order, h, w1_scale, w2_scale = ctx.saved_tensors
    need_x, need_weights, need_w1, need_w2 = needs
    dweights, dy_rows, dy_scale, dh, dh_scale, a, a_scale = _backward_rows(
        dy.contiguous(), x, weights, h, w1, w2, w1_scale, w2_scale, *order, *ctx.unit, need_weights
    )
    n_rows = ctx.unit[-1]
    # In this order, each frees as much memory as it can before the next.
    deferred: Deferred = {}
    if need_w2:
        deferred["w2"] = partial(_weight_gradient, dy_rows, dy_scale, a, a_scale, *order[:2], n_rows, w2.dtype)
    if need_x:
        deferred["x"] = partial(_input_gradient, dh, dh_scale, w1, w1_scale, *order, n_rows, weights.shape[1])
    if need_w1:
        deferred["w1"] = partial(_weight_gradient, dh, dh_scale, x, None, *order[:2], n_rows, w1.dtype)
    return dweights if need_weights else None, deferred


def _autograd(ctx: _Context, dy: Tensor, *_unused: None) -> tuple[Tensor | None, ...]:
    dweights, deferred = _gradients(ctx, ctx.needs_input_grad[:4], dy)
    grads = computed(deferred)
    return grads.get("x"), dweights, grads.get("w1"), grads.get("w2"), *[None] * 6


_forward.register_autograd(_autograd, setup_context=_setup)


class _LateExperts(torch.autograd.Function):
    """`_forward` with a backward that defers the weight gradients."""

    @staticmethod
    def forward(ctx: _Context, late: LateGradients, *inputs: *Inputs) -> Tensor:
        output = _forward(*inputs)
        _setup(ctx, inputs, output)
        ctx.late = late
        return cast(Tensor, output[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, dy: Tensor) -> tuple[Tensor | None, ...]:
        dweights, deferred = _gradients(ctx, ctx.needs_input_grad[1:5], dy)
        grads = computed(deferred, ctx.late)
        return None, grads.get("x"), dweights, *[None] * 8


Shape = tuple[int, ...]


@register_flop_formula(torch.ops.llmfoundry.experts_scaled_forward)
def _forward_flops(
    x: Shape, weights: Shape, w1: Shape, w2: Shape, *args: object, out_shape: object = None, **_: object
) -> int:
    """Two FLOPs per row and weight of its expert: 6*T*K*D*F if gated."""
    return 2 * weights[0] * weights[1] * (w1[1] * w1[2] + w2[1] * w2[2])


@register_flop_formula(torch.ops.llmfoundry.experts_scaled_backward_rows)
def _backward_rows_flops(
    dy: Shape, x: Shape, weights: Shape, h: Shape, w1: Shape, w2: Shape, *args: object,
    out_shape: object = None, **_: object,
) -> int:  # fmt: skip
    return 2 * weights[0] * weights[1] * w2[1] * w2[2]


@register_flop_formula(torch.ops.llmfoundry.experts_scaled_input_gradient)
def _input_gradient_flops(
    dh: Shape, dh_scale: Shape, w1: Shape, w1_scale: Shape, expert_start: Shape, row_slot: Shape, slot_row: Shape,
    *args: object, out_shape: object = None, **_: object,
) -> int:  # fmt: skip
    return 2 * slot_row[0] * w1[1] * w1[2]


@register_flop_formula(torch.ops.llmfoundry.experts_scaled_weight_gradient)
def _weight_gradient_flops(
    left: Shape, left_scale: Shape, right: Shape, *args: object, out_shape: object = None, **_: object
) -> int:
    return 2 * left[0] * left[1] * right[1]
