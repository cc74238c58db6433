"""Cross-entropy of a linear head, computed in chunks of tokens: the full (T, V) logits never exist at once.

Shapes: T tokens, D d_model, V vocab, N tokens in one piece.
Each chunk's logits are turned into the loss and, instead of saving a graph, immediately into the gradients of the
hidden states and the weight; backward only scales those. There are three matrix products in all, as without chunks, and
nothing is recomputed. Logits are computed for a piece of a chunk at a time, because they take 4 bytes and their
gradients 2: products over more tokens read and write the weight's gradient less often. `cross_entropy_reference` is the
plain operation.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from llmfoundry.kernels.scale import scaled_to
from llmfoundry.kernels.softmax_loss import IGNORE, softmax_loss
from llmfoundry.kernels.whole import cdiv


class Sizes(NamedTuple):
    """The maximum numbers of logits and of their gradients in memory."""

    logits: int
    gradients: int


# GPU: at most 0.63 GiB of float32 logits, and 1.25 GiB of their gradients in bfloat16: chunks of 4,096 tokens in pieces
# of 1,024 for Qwen3's vocabulary (151,936), of 8,192 and 2,048 for OLMoE's (50,304). Other sizes: docs/experiments.md.
# CPU: 2^20 float32 values are 4 MiB and stay in the last-level cache from the product to the softmax and back.
SIZES = {"cuda": Sizes(5 * 2**25, 5 * 2**27), "cpu": Sizes(2**20, 2**20)}
TILE = 1024  # tokens; other multiples leave some of a GPU's SMs idle


class CrossEntropy(NamedTuple):
    """The loss of labels in nats, float32 (float64 for float64 inputs)."""

    total: Tensor  # ()
    by_token: Tensor  # (T,) 0 for ignored labels; no gradient


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """Return the negative log-likelihood of `labels`, summed over tokens; see `cross_entropy_of_tokens`."""
    return cross_entropy_of_tokens(x, weight, labels, softcap).total


def cross_entropy_of_tokens(x: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None) -> CrossEntropy:
    """Compute the negative log-likelihood of `labels` under `softmax(x @ weight.T)`, summed and per token.

    Args:
        x: (T, D).
        weight: (V, D), in the dtype of `x`.
        labels: (T,) int64; -100 is ignored.
        softcap: logits become `softcap * tanh(logit / softcap)`.
    """
    needs = torch.is_grad_enabled() and x.requires_grad, torch.is_grad_enabled() and weight.requires_grad
    return CrossEntropy(*_LinearCrossEntropy.apply(x, weight, labels, softcap, needs))


def cross_entropy_by_token(x: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """Compute the same per token, (T,), with a gradient, to weight tokens; backward recomputes each chunk's logits."""
    return cast(Tensor, _TokenCrossEntropy.apply(x, weight, labels, softcap))


def cross_entropy_reference(x: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """Compute the same value and gradients from one (T, V) matrix of logits."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    logits = x.to(dtype) @ weight.to(dtype).T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


class _Context(torch.autograd.function.FunctionCtx):
    saved_tensors: tuple[Tensor | None, Tensor | None]
    dtypes: tuple[torch.dtype, torch.dtype]  # of x and weight


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        softcap: float | None,
        needs: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        by_token = x.new_empty(x.shape[:1], dtype=dtype)
        dx, dw = _loss_and_gradients(x, weight, labels, softcap, by_token, needs)
        ctx.save_for_backward(*cast(tuple[Tensor, Tensor], (dx, dw)))  # None may be saved, but torch's stub omits it
        ctx.dtypes = (x.dtype, weight.dtype)
        ctx.mark_non_differentiable(by_token)
        return by_token.sum(), by_token

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _Context, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = (
            None if each is None else scaled_to(each, grad, dtype)
            for each, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*grads, None, None, None)


class _TokenContext(torch.autograd.function.FunctionCtx):
    saved_tensors: tuple[Tensor, Tensor, Tensor]
    needs_input_grad: tuple[bool, ...]
    softcap: float | None


class _TokenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _TokenContext, x: Tensor, weight: Tensor, labels: Tensor, softcap: float | None) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        by_token = x.new_empty(x.shape[:1], dtype=dtype)
        _loss_and_gradients(x, weight, labels, softcap, by_token, (False, False))
        ctx.save_for_backward(x, weight, labels)
        ctx.softcap = softcap
        return by_token

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _TokenContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, labels = ctx.saved_tensors
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        dx, dw = _loss_and_gradients(x, weight, labels, ctx.softcap, torch.empty_like(grad), needs, grad)
        return None if dx is None else dx.to(x.dtype), None if dw is None else dw.to(weight.dtype), None, None


def _loss_and_gradients(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    softcap: float | None,
    by_token: Tensor,
    needs: tuple[bool, bool],
    weights: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Write the loss of each token, and return the required gradients of x and weight, in the dtype of `by_token`.

    They are the gradients of the sum of all losses, or of the sum weighted by `weights` (T,).
    """
    dtype = by_token.dtype
    dx = x.new_empty(x.shape, dtype=dtype) if needs[0] else None
    dw = weight.new_empty(weight.shape, dtype=dtype) if needs[1] else None
    size, piece = _sizes(x, weight)
    by_logits = x.new_empty(min(size, len(x)), len(weight)) if any(needs) else None  # gradients of one chunk's logits
    for chunk in _slices(len(x), size):
        gradient = None if by_logits is None else by_logits[: len(x[chunk])]
        for part in _slices(len(x[chunk]), piece):
            at = slice(chunk.start + part.start, chunk.start + part.stop)
            logits = _product(x[at], weight.T, dtype)  # (N, V)
            if softcap is not None:
                logits = logits.div_(softcap).tanh_().mul_(softcap)
            softmax_loss(logits, labels[at], by_token[at], None if gradient is None else gradient[part], softcap,
                         None if weights is None else weights[at])  # fmt: skip
            del logits  # free them before the next are computed
        if dx is not None and gradient is not None:
            _product(gradient, weight, dtype, out=dx[chunk])
        if dw is not None and gradient is not None:
            _add_product(dw, gradient.T, x[chunk], begins=chunk.start == 0)
    return dx, dw


def _sizes(x: Tensor, weight: Tensor) -> tuple[int, int]:
    """Return the tokens per chunk and per piece: powers of two, except for chunks of equal size and the last ones."""
    sizes = SIZES.get(x.device.type, SIZES["cpu"])
    chunk, piece = (1 << max(0, (size // len(weight)).bit_length() - 1) for size in (sizes.gradients, sizes.logits))
    equal = cdiv(len(x), max(1, cdiv(len(x), chunk)))
    return min(chunk, max(1, cdiv(equal, TILE) * TILE)), piece


def _slices(n: int, size: int) -> Iterator[slice]:
    """Yield slices of n values; at least one, which may be empty."""
    return (slice(start, min(start + size, n)) for start in range(0, max(n, 1), size))


def _product(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Compute `a @ b` in `dtype`, without rounding to the operands' dtype; written to `out`, if given."""
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype) if out is None else torch.mm(a, b, out_dtype=dtype, out=out)
    return torch.mm(a.to(dtype), b.to(dtype), out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor, begins: bool) -> None:
    """Compute `total += a @ b` in the dtype of `total`, or overwrite it if `begins`."""
    if begins:
        _product(a, b, total.dtype, out=total)
    elif a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
