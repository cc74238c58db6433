"""A linear layer's three products in e4m3: two by `torch._scaled_mm`, and the weight gradient like that of experts.

Shapes: T rows, J inputs, N outputs; W (N, J).
x is saved unquantized and quantized again in backward: an e4m3 copy would be kept in addition to what other layers save
of x. On a CPU, the plain references run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

if TYPE_CHECKING:
    from llmfoundry.kernels.e4m3 import Scaled


@torch.library.custom_op("llmfoundry::scaled_linear", mutates_args=())
def scaled_linear(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `x W^T`, and return the scale (1,) of the transposed W.

    Args:
        x: (T, J) with J and N multiples of 16.
        weight: (N, J).
    """
    # imported here because Triton may not be installed
    from llmfoundry.kernels.e4m3 import scale_rows, scale_rows_reference

    quantise = scale_rows if x.is_cuda else scale_rows_reference
    matrix = quantise(weight.contiguous())
    return _product(quantise(x.contiguous()), matrix, x.dtype), matrix.scale.amax(0, keepdim=True)


@scaled_linear.register_fake
def _(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(1, dtype=torch.float32)


@torch.library.custom_op("llmfoundry::scaled_linear_backward", mutates_args=())
def scaled_linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """Compute `dy W` (T, J) and `dy^T x` (N, J); empty if not needed."""
    from llmfoundry.kernels import e4m3

    quantise, transpose = (
        (e4m3.scale_rows, e4m3.transpose_weight)
        if dy.is_cuda
        else (e4m3.scale_rows_reference, e4m3.transpose_weight_reference)
    )
    rows = quantise(dy.contiguous())
    dx = dweight = x.new_empty(0)
    if need_x:
        turned = transpose(weight.contiguous().unsqueeze(0), scale).values[0]
        dx = _product(rows, e4m3.Scaled(turned, scale.expand(weight.shape[1])), dy.dtype)
    if need_weight:
        dweight = _weight_gradient(rows, quantise(x.contiguous()), weight.dtype)
    return dx, dweight


@scaled_linear_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, scale: Tensor, need_x: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    dx, dweight = (
        torch.empty_like(each) if need else x.new_empty(0) for each, need in ((x, need_x), (weight, need_weight))
    )
    return dx, dweight


def _product(rows: Scaled, matrix: Scaled, dtype: torch.dtype) -> Tensor:
    if rows.values.is_cuda:
        scales = rows.scale.unsqueeze(1), matrix.scale.contiguous().unsqueeze(0)
        return torch._scaled_mm(rows.values, matrix.values.t(), *scales, out_dtype=dtype, use_fast_accum=True)
    x, w = (each.values.float() * each.scale.unsqueeze(1) for each in (rows, matrix))
    return (x @ w.t()).to(dtype)


def _weight_gradient(left: Scaled, right: Scaled, dtype: torch.dtype) -> Tensor:
    """Compute the weight gradient as that of a single expert with all rows."""
    from llmfoundry.kernels import e4m3, scaled, tiles

    n_rows, device = left.scale.numel(), left.scale.device
    start = torch.arange(0, 2 * n_rows, n_rows, dtype=torch.int32, device=device)  # [0, n_rows], without a host copy
    if not left.values.is_cuda:
        return scaled.scaled_weight_grad_reference(left, right, tiles.tile_rows_reference(start, n_rows), dtype)[0]
    found = tiles.tile_rows(start, n_rows)
    turned = e4m3.transpose_rows(left, found), e4m3.transpose_rows(right, found)
    return scaled.scaled_weight_grad(*turned, found, dtype)[0]


class _Context(Protocol):
    saved_tensors: tuple[Tensor, Tensor, Tensor]
    needs_input_grad: tuple[bool, bool]

    def save_for_backward(self, *tensors: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


def _setup(ctx: _Context, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: _Context, dy: Tensor, _unused: None) -> tuple[Tensor | None, Tensor | None]:
    need_x, need_weight = ctx.needs_input_grad
    dx, dweight = scaled_linear_backward(dy, *ctx.saved_tensors, need_x, need_weight)
    return dx if need_x else None, dweight if need_weight else None


scaled_linear.register_autograd(_backward, setup_context=_setup)

Shape = tuple[int, int]


@register_flop_formula(torch.ops.llmfoundry.scaled_linear)
def _flops(x: Shape, weight: Shape, *args: object, out_shape: object = None, **_: object) -> int:
    return 2 * x[0] * weight[0] * weight[1]


@register_flop_formula(torch.ops.llmfoundry.scaled_linear_backward)
def _backward_flops(
    dy: Shape, x: Shape, weight: Shape, scale: object, need_x: bool, need_weight: bool, *args: object,
    out_shape: object = None, **_: object,
) -> int:  # fmt: skip
    return (need_x + need_weight) * _flops(x, weight)
