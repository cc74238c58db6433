"""The experts of a MoE layer in Triton: the operators for forward and backward, which launch the kernels.

Shapes: T tokens, D d_model, F ffn hidden size, E experts, K top_k, R rows in expert order, r rank of adapters.
Forward: gather, up projection with activation, down projection, sum per token. Backward: gather, gradients of
activation and routing weights; then dw2, which frees the rows that it needs; the gradient of x, summed per token; dw1.
These are separate operators, so that x comes first if a collective waits for its gradient. Forward keeps x, the
pre-activation h and int32 indices; backward recomputes a' = s * a and the gathered rows. Adapters add a narrow product
before each wide one, which adds the second narrow product in its loop; forward also keeps the results, u = x A^T and a'
A^T. Biases of w1 are added in its kernel, those of w2 where a token's rows are summed. The host reads nothing, so a
CUDA graph can capture forward and backward, and the routing may change between replays.

With few tokens, host overhead matters. So row tiles are computed once, in forward. Outside of torch.compile, `_Experts`
replaces the autograd registered with the operators, which is 80 us slower, and calls the operators' implementations
directly.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from llmfoundry.kernels.activations import clamp_limit
from llmfoundry.kernels.gather import Biases, expert_sums, gather, gather_and_dots, slot_sums, sum_rows
from llmfoundry.kernels.grouped import grouped
from llmfoundry.kernels.late import Deferred, LateGradients, computed
from llmfoundry.kernels.low_rank import ExpertAdapters
from llmfoundry.kernels.narrow import narrow, narrow_grad
from llmfoundry.kernels.routing import Order
from llmfoundry.kernels.routing_triton import sort_by_expert_triton
from llmfoundry.kernels.tiles import Beside, Tiles, tile_rows, tiles_in, tiles_length
from llmfoundry.kernels.tune import (
    DOWN,
    DW1,
    DW2,
    DX,
    NARROW,
    NARROW_GRAD,
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
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: str,
    gated: bool,
    limit: float | None = None,
    n_rows: int | None = None,
    late: LateGradients | None = None,
    adapters: ExpertAdapters | None = None,
) -> Tensor:
    """`experts.experts_ffn` with Triton kernels; arguments as there (and checked there). Needs at least one token."""
    adapters = adapters or ExpertAdapters()
    operands = adapters.operands(scaled=False)
    bound = max(1, experts.numel() if n_rows is None else min(n_rows, experts.numel()))
    experts = experts.contiguous()
    inputs = (
        x.contiguous(), weights.contiguous(), w1.contiguous(), w2.contiguous(),
        *(None if tensor is None else tensor.contiguous() for tensor in (b1, b2, *operands)),
        experts, *_call(_order, experts, w2.shape[0], bound), activation, gated,
        clamp_limit(activation, limit) if gated else None, bound, adapters.scale,
    )  # fmt: skip
    if late is None and torch.compiler.is_compiling():
        return cast(Tensor, _forward(*inputs)[0])
    return cast(Tensor, _Experts.apply(late, *inputs))


def _call(operator: CustomOpDef, *arguments: object) -> Any:
    """Call an operator, or just its implementation if nothing intercepts operators: PyTorch's dispatch takes 15 us."""
    watched = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return operator(*arguments) if watched else operator._init_fn(*arguments)


@torch.library.custom_op("llmfoundry::sort_by_expert", mutates_args=())
def _order(experts: Tensor, n_experts: int, n_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the order, and its row tiles in the format of `tiles_in`."""
    order = sort_by_expert_triton(experts, n_experts)
    tiles = order.expert_start.new_empty(tiles_length(n_experts, n_rows))
    tile_rows(order.expert_start, n_rows, tiles)
    return *order, tiles


@_order.register_fake
def _(experts: Tensor, n_experts: int, n_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m = experts.numel()
    lengths = (n_experts + 1, m, m, tiles_length(n_experts, n_rows))
    start, row_slot, slot_row, tiles = (experts.new_empty(n, dtype=torch.int32) for n in lengths)
    return start, row_slot, slot_row, tiles


class _Rows(NamedTuple):
    """The output, and what backward needs; u is empty without an adapter."""

    y: Tensor  # (T, D)
    h: Tensor  # (R, 2F) or (R, F)
    u_up: Tensor  # (R, r)
    u_down: Tensor  # (R, r)


@torch.library.custom_op("llmfoundry::experts_forward", mutates_args=())
def _forward(
    x: Tensor,
    weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    up_a: Tensor | None,
    up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    experts: Tensor,
    expert_start: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    row_tiles: Tensor,
    activation: str,
    gated: bool,
    limit: float | None,
    n_rows: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `_Rows`, as a plain tuple for the operator."""
    order = Order(expert_start, row_slot, slot_row)
    problem = _problem(w1, w2, n_rows)
    tiles = tiles_in(row_tiles, expert_start, n_rows)
    x_rows = gather(x, order, n_rows)  # (R, D)
    u_up, beside = _narrow(x, up_a, up_b, tiles, problem, scale, order)
    h, a = pick(
        UP,
        problem,
        partial(
            up,
            x_rows,
            weights,
            row_slot,
            tiles,
            w1,
            activation=activation,
            gated=gated,
            limit=limit,
            bias=b1,
            beside=beside,
        ),
        plain=gated and b1 is None and beside is None,
    )
    del x_rows
    u_down, beside = _narrow(a, down_a, down_b, tiles, problem, scale)
    y_rows = pick(DOWN, problem, partial(grouped, a, w2, tiles, beside=beside), plain=beside is None)  # (R, D)
    y = sum_rows(y_rows, order, weights.shape[1], None if b2 is None else Biases(b2, experts, weights))
    return _Rows(y, h, u_up, u_down)


@_forward.register_fake
def _(
    x: Tensor,
    weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    up_a: Tensor | None,
    up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    experts: Tensor,
    expert_start: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    row_tiles: Tensor,
    activation: str,
    gated: bool,
    limit: float | None,
    n_rows: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h = x.new_empty(n_rows, w1.shape[1])
    return _Rows(torch.empty_like(x), h, *(_empty_u(x, a, n_rows) for a in (up_a, down_a)))


def _empty_u(x: Tensor, a: Tensor | None, n_rows: int) -> Tensor:
    return x.new_empty(0) if a is None else x.new_empty(n_rows, a.shape[1])


def _narrow(
    rows: Tensor, first: Tensor | None, second: Tensor | None, tiles: Tiles, problem: Problem,
    scale: float, order: Order | None = None, transposed: bool = False,
) -> tuple[Tensor, Beside | None]:  # fmt: skip
    """Return an adapter's first product (R, r), and what the wide kernel adds. Forward passes A, B; backward B, A.

    With `order`, `rows` are tokens.
    """
    if first is None or second is None:
        return rows.new_empty(0), None
    run = partial(narrow, rows, first, tiles, problem.n_rows, scale=scale, order=order, transposed=transposed)
    u = pick(NARROW, problem, run)
    return u, Beside(u, second)


class _RowGradients(NamedTuple):
    """The gradient of the routing weights, and the rows from which all other gradients are computed."""

    dweights: Tensor  # (T, K) float32; empty if not needed
    dy_rows: Tensor  # (R, D)
    dh: Tensor  # (R, 2F) or (R, F)
    a: Tensor  # (R, F), a' = s * a
    du_up: Tensor  # (R, r); empty without an adapter
    du_down: Tensor  # (R, r); empty without an adapter


@torch.library.custom_op("llmfoundry::experts_backward_rows", mutates_args=())
def _backward_rows(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    h: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    up_a: Tensor | None,
    up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    experts: Tensor,
    expert_start: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    row_tiles: Tensor,
    activation: str,
    gated: bool,
    limit: float | None,
    n_rows: int,
    scale: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return `_RowGradients`, as a plain tuple for the operator."""
    order = Order(expert_start, row_slot, slot_row)
    problem = _problem(w1, w2, n_rows)
    tiles = tiles_in(row_tiles, expert_start, n_rows)
    none = x.new_empty(0)
    biases = None if b2 is None or not need_weights else Biases(b2, experts, weights)
    dy_rows, dots = gather_and_dots(dy, order, n_rows, biases)  # (R, D)
    du_down, beside = _narrow(dy, down_b, down_a, tiles, problem, scale, order, transposed=True)
    dh, a, ds = pick(
        UP_BACKWARD,
        problem,
        partial(
            up_backward,
            dy_rows,
            h,
            weights,
            row_slot,
            tiles,
            w2,
            activation=activation,
            gated=gated,
            limit=limit,
            beside=beside,
        ),
    )
    dweights = slot_sums(ds, order, dots).view(weights.shape) if need_weights else none
    du_up, _ = _narrow(dh, up_b, up_a, tiles, problem, scale, transposed=True)
    return _RowGradients(dweights, dy_rows, dh, a, du_up, du_down)


@_backward_rows.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    weights: Tensor,
    h: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    up_a: Tensor | None,
    up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    experts: Tensor,
    expert_start: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    row_tiles: Tensor,
    activation: str,
    gated: bool,
    limit: float | None,
    n_rows: int,
    scale: float,
    need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dweights = torch.empty_like(weights) if need_weights else x.new_empty(0)
    rows = (x.new_empty(n_rows, width) for width in (x.shape[1], w1.shape[1], w2.shape[2]))
    return _RowGradients(dweights, *rows, *(_empty_u(x, a, n_rows) for a in (up_a, down_a)))


@torch.library.custom_op("llmfoundry::experts_input_gradient", mutates_args=())
def _input_gradient(
    dh: Tensor,
    du_up: Tensor,
    w1: Tensor,
    w2: Tensor,
    up_a: Tensor | None,
    expert_start: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    row_tiles: Tensor,
    n_rows: int,
    top_k: int,
) -> Tensor:
    """Compute the gradient of x (T, D) from that of h (R, 2F) or (R, F)."""
    problem = _problem(w1, w2, n_rows)
    tiles = tiles_in(row_tiles, expert_start, n_rows)
    beside = None if up_a is None else Beside(du_up, up_a)
    run = partial(grouped, dh, w1, tiles, transposed=True, beside=beside)
    dx_rows = pick(DX, problem, run, plain=beside is None)  # (R, D)
    return sum_rows(dx_rows, Order(expert_start, row_slot, slot_row), top_k)


@_input_gradient.register_fake
def _(
    dh: Tensor,
    du_up: Tensor,
    w1: Tensor,
    w2: Tensor,
    up_a: Tensor | None,
    expert_start: Tensor,
    row_slot: Tensor,
    slot_row: Tensor,
    row_tiles: Tensor,
    n_rows: int,
    top_k: int,
) -> Tensor:
    return dh.new_empty(slot_row.numel() // top_k, w2.shape[1])


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
    row_tiles: Tensor,
    n_rows: int,
) -> Tensor:
    """Compute the gradient of the named matrix from its output gradient (R, N) and its input (R, J).

    For w1 and up_a, the input is x (T, D); for down_b, the output gradient is dy (T, D).
    """
    problem = _problem(w1, w2, n_rows)
    tiles = tiles_in(row_tiles, expert_start, n_rows)
    order = Order(expert_start, row_slot, slot_row)
    if name in ("w1", "w2"):
        right = gather(right, order, n_rows) if name == "w1" else right
        return pick(DW1 if name == "w1" else DW2, problem, partial(weight_grad, left, right, tiles), plain=True)
    wide_first = name.endswith("_b")
    wide, thin = (left, right) if wide_first else (right, left)
    by_token = order if name in ("up_a", "down_b") else None
    run = partial(narrow_grad, wide, thin, tiles, wide_first=wide_first, order=by_token)
    return pick(NARROW_GRAD, problem, run)


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
    row_tiles: Tensor,
    n_rows: int,
) -> Tensor:
    return left.new_empty(w1.shape[0], left.shape[1], right.shape[1])


@torch.library.custom_op("llmfoundry::experts_bias_gradient", mutates_args=())
def _bias_gradient(
    rows: Tensor, weights: Tensor | None, expert_start: Tensor, row_slot: Tensor, slot_row: Tensor
) -> Tensor:
    """Compute the gradient of a bias (E, N) from the gradient (R, N) of what it was added to."""
    return expert_sums(rows, Order(expert_start, row_slot, slot_row), weights)


@_bias_gradient.register_fake
def _(rows: Tensor, weights: Tensor | None, expert_start: Tensor, row_slot: Tensor, slot_row: Tensor) -> Tensor:
    return rows.new_empty(expert_start.numel() - 1, rows.shape[1])


class _Context(Protocol):
    """The autograd context of the operator."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    unit: tuple[str, bool, float | None, int, float]
    late: LateGradients | None

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


Adapter = tuple[Tensor | None, Tensor | None]
Biased = tuple[Tensor | None, Tensor | None]
Inputs = tuple[
    Tensor, Tensor, Tensor, Tensor, *Biased, *Adapter, *Adapter, Tensor, Tensor, Tensor, Tensor, Tensor,
    str, bool, float | None, int, float,
]  # fmt: skip
WEIGHTS = ("w1", "w2", "b1", "b2", "up_a", "up_b", "down_a", "down_b")


def _setup(ctx: _Context, inputs: Inputs, output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    *tensors, activation, gated, limit, n_rows, scale = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)  # h and u are outputs only for backward: no zero gradients
    ctx.unit = (activation, gated, limit, n_rows, scale)


def _gradients(ctx: _Context, needs: tuple[bool, ...], dy: Tensor) -> tuple[Tensor | None, Deferred]:
    """Return the gradient of the routing weights, and functions that compute those of x and of the matrices."""
    x, weights, w1, w2, *others, h, u_up, u_down = ctx.saved_tensors
    need_x, need_weights, *need_by_weight = needs
    dy = dy.contiguous()
    dweights, dy_rows, dh, a, du_up, du_down = _call(
        _backward_rows, dy, x, weights, h, w1, w2, *others, *ctx.unit, need_weights
    )
    order, n_rows = others[-4:], ctx.unit[3]

    def matrix(name: str, left: Tensor, right: Tensor) -> Callable[[], Tensor]:
        return partial(_call, _weight_gradient, name, left, right, w1, w2, *order, n_rows)

    # In this order, each frees as much memory as it can before the next.
    every: Deferred = {
        "w2": matrix("w2", dy_rows, a),
        "down_b": matrix("down_b", dy, u_down),
        "down_a": matrix("down_a", du_down, a),
        "b2": partial(_call, _bias_gradient, dy_rows, weights, *order[:3]),
        "x": partial(_call, _input_gradient, dh, du_up, w1, w2, others[2], *order, n_rows, weights.shape[1]),
        "w1": matrix("w1", dh, x),
        "up_b": matrix("up_b", dh, u_up),
        "up_a": matrix("up_a", du_up, x),
        "b1": partial(_call, _bias_gradient, dh, None, *order[:3]),
    }
    needed = dict(zip(WEIGHTS, need_by_weight, strict=True), x=need_x)
    return dweights if need_weights else None, {name: every[name] for name in every if needed[name]}


def _autograd(ctx: _Context, dy: Tensor, *_unused: None) -> tuple[Tensor | None, ...]:
    dweights, deferred = _gradients(ctx, ctx.needs_input_grad[:10], dy)
    grads = computed(deferred)
    return grads.get("x"), dweights, *(grads.get(name) for name in WEIGHTS), *[None] * 10


_forward.register_autograd(_autograd, setup_context=_setup)


class _Experts(torch.autograd.Function):
    """`_forward` with a backward that may defer the weight gradients."""

    @staticmethod
    def forward(ctx: _Context, late: LateGradients | None, *inputs: *Inputs) -> Tensor:
        output = _call(_forward, *inputs)
        _setup(ctx, inputs, output)
        ctx.late = late
        return cast(Tensor, output[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, dy: Tensor) -> tuple[Tensor | None, ...]:
        dweights, deferred = _gradients(ctx, ctx.needs_input_grad[1:11], dy)
        grads = computed(deferred, ctx.late)
        return None, grads.get("x"), dweights, *(grads.get(name) for name in WEIGHTS), *[None] * 10


Shape = tuple[int, ...]


@register_flop_formula(torch.ops.llmfoundry.experts_forward)
def _forward_flops(
    x: Shape, weights: Shape, w1: Shape, w2: Shape, *args: object, out_shape: object = None, **_: object
) -> int:
    """Two FLOPs per row and weight of its expert: 6*T*K*D*F if gated, without adapters."""
    adapters = cast(tuple[Shape | None, ...], args[2:6])
    met = sum(each[1] * each[2] for each in (w1, w2, *adapters) if each is not None)
    return 2 * weights[0] * weights[1] * met


@register_flop_formula(torch.ops.llmfoundry.experts_backward_rows)
def _backward_rows_flops(
    dy: Shape, x: Shape, weights: Shape, h: Shape, w1: Shape, w2: Shape, b1: Shape | None, b2: Shape | None,
    up_a: Shape | None, up_b: Shape | None, down_a: Shape | None, down_b: Shape | None, *args: object,
    out_shape: object = None, **_: object,
) -> int:  # fmt: skip
    met = sum(each[1] * each[2] for each in (w2, up_b, down_a, down_b) if each is not None)
    return 2 * weights[0] * weights[1] * met


@register_flop_formula(torch.ops.llmfoundry.experts_input_gradient)
def _input_gradient_flops(
    dh: Shape, du_up: Shape, w1: Shape, w2: Shape, up_a: Shape | None, expert_start: Shape, row_slot: Shape,
    slot_row: Shape, *args: object, out_shape: object = None, **_: object,
) -> int:  # fmt: skip
    return 2 * slot_row[0] * sum(each[1] * each[2] for each in (w1, up_a) if each is not None)


@register_flop_formula(torch.ops.llmfoundry.experts_weight_gradient)
def _weight_gradient_flops(
    name: str, left: Shape, right: Shape, *args: object, out_shape: object = None, **_: object
) -> int:
    rows = right[0] if name == "down_b" else left[0]  # the other operand may be in token order
    return 2 * rows * left[1] * right[1]


def _problem(w1: Tensor, w2: Tensor, n_rows: int) -> Problem:
    n_experts, d_model, hidden = w2.shape
    return Problem(w1.device, str(w1.dtype), d_model, hidden, n_experts, w1.shape[1] // hidden, n_rows)
