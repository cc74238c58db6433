"""A linear layer's products in e4m3, by torch's row-wise `_scaled_mm`: its output and the gradient of its input.

Shapes: T rows, J inputs, N outputs; W (N, J).
The gradient of W is a product in the dtype of its operands: both would have to be transposed first, 8-bit products read
along the inner dim, and a dense layer is too small to pay for that. On a CPU the plain reference runs.
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
    """`x W^T` and the scale (1,) that W has when it is transposed.

    Args:
        x: (T, J) with J and N multiples of 16.
        weight: (N, J).
    """
    # Imported here, not above: triton is not installed on every machine.
    from llmfoundry.kernels.e4m3 import scale_rows, scale_rows_reference

    quantise = scale_rows if x.is_cuda else scale_rows_reference
    matrix = quantise(weight.contiguous())
    return _product(quantise(x.contiguous()), matrix, x.dtype), matrix.scale.amax(0, keepdim=True)


@scaled_linear.register_fake
def _(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(1, dtype=torch.float32)


@torch.library.custom_op("llmfoundry::scaled_linear_input_gradient", mutates_args=())
def _input_gradient(dy: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`dy W`, (T, J)."""
    from llmfoundry.kernels import e4m3

    on_gpu = dy.is_cuda
    quantise, transpose = (
        (e4m3.scale_rows, e4m3.transpose_weight)
        if on_gpu
        else (e4m3.scale_rows_reference, e4m3.transpose_weight_reference)
    )
    turned = transpose(weight.contiguous().unsqueeze(0), scale)
    per_channel = scale.expand(weight.shape[1])
    return _product(quantise(dy.contiguous()), e4m3.Scaled(turned.values[0], per_channel), dy.dtype)


@_input_gradient.register_fake
def _(dy: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[0], weight.shape[1])


def _product(rows: Scaled, matrix: Scaled, dtype: torch.dtype) -> Tensor:
    if rows.values.is_cuda:
        scales = rows.scale.unsqueeze(1), matrix.scale.contiguous().unsqueeze(0)
        return torch._scaled_mm(rows.values, matrix.values.t(), *scales, out_dtype=dtype, use_fast_accum=True)
    x, w = (each.values.float() * each.scale.unsqueeze(1) for each in (rows, matrix))
    return (x @ w.t()).to(dtype)


class _Context(Protocol):
    saved_tensors: tuple[Tensor, Tensor, Tensor]
    needs_input_grad: tuple[bool, bool]

    def save_for_backward(self, *tensors: Tensor) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


def _setup(ctx: _Context, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: _Context, dy: Tensor, _unused: None) -> tuple[Tensor | None, Tensor | None]:
    x, weight, scale = ctx.saved_tensors
    need_x, need_weight = ctx.needs_input_grad
    dx = _input_gradient(dy, weight, scale) if need_x else None
    return dx, dy.t() @ x if need_weight else None


scaled_linear.register_autograd(_backward, setup_context=_setup)

Shape = tuple[int, int]


@register_flop_formula(torch.ops.llmfoundry.scaled_linear)
def _flops(x: Shape, weight: Shape, *args: object, out_shape: object = None, **_: object) -> int:
    return 2 * x[0] * weight[0] * weight[1]


@register_flop_formula(torch.ops.llmfoundry.scaled_linear_input_gradient)
def _input_gradient_flops(dy: Shape, weight: Shape, *args: object, out_shape: object = None, **_: object) -> int:
    return _flops(dy, weight)
