"""Cross-entropy of a linear head, a chunk of tokens at a time: the (T, V) logits are never all alive.

Shapes: T tokens, D d_model, V vocab, N tokens of one piece.
Each chunk's logits are turned into the loss and, in place of a saved graph, into the gradients of hidden states and
weight at once; backward only scales those. Three matrix products in all, as without chunks, and nothing is recomputed.
Logits are made a piece of a chunk at a time, for they have 4 bytes and their gradients 2: products with the gradients
of more tokens read and write the weight's gradient less often. `cross_entropy_reference` is the plain operation.
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
    """How many logits and how many of their gradients are alive, at most."""

    logits: int
    gradients: int


# GPU: at most 0.63 GiB of float32 logits, and 1.25 of their gradients in bfloat16: chunks of 4,096 tokens in pieces of
# 1,024 at Qwen3's vocabulary (151,936), of 8,192 and 2,048 at OLMoE's (50,304). Other sizes: docs/experiments.md.
# CPU: 2^20 float32 are 4 MiB and stay in the last-level cache from the product to the softmax and back.
SIZES = {"cuda": Sizes(5 * 2**25, 5 * 2**27), "cpu": Sizes(2**20, 2**20)}
TILE = 1024  # of tokens: products of other sizes leave some of a GPU's SMs idle


class CrossEntropy(NamedTuple):
    """The cost of labels in nats, float32 (float64 for float64 inputs)."""

    total: Tensor  # ()
    by_token: Tensor  # (T,) 0 where no label counts; no gradient


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """Sum over tokens of the negative log-likelihood of `labels`: the `total` of `cross_entropy_of_tokens`."""
    return cross_entropy_of_tokens(x, weight, labels, softcap).total


def cross_entropy_of_tokens(x: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None) -> CrossEntropy:
    """The negative log-likelihood of `labels` under `softmax(x @ weight.T)`, summed and of each token.

    Args:
        x: (T, D).
        weight: (V, D), in the dtype of `x`.
        labels: (T,) int64; tokens with -100 do not count.
        softcap: logits become `softcap * tanh(logit / softcap)`.
    """
    needs = torch.is_grad_enabled() and x.requires_grad, torch.is_grad_enabled() and weight.requires_grad
    return CrossEntropy(*_LinearCrossEntropy.apply(x, weight, labels, softcap, needs))


def cross_entropy_by_token(x: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """The same of each token, (T,), for a caller who weighs tokens: backward makes each chunk's logits again."""
    return cast(Tensor, _TokenCrossEntropy.apply(x, weight, labels, softcap))


def cross_entropy_reference(x: Tensor, weight: Tensor, labels: Tensor, softcap: float | None = None) -> Tensor:
    """The same value and gradients from one (T, V) matrix of logits."""
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
        ctx.save_for_backward(*cast(tuple[Tensor, Tensor], (dx, dw)))  # None may be saved, which torch's stub forgets
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
    """Write the loss of each token, and return the gradients of x and weight that are needed, in its dtype.

    They are those of the sum of all losses, or of the sum by the `weights` (T,) of tokens.
    """
    dtype = by_token.dtype
    dx = x.new_empty(x.shape, dtype=dtype) if needs[0] else None
    dw = weight.new_empty(weight.shape, dtype=dtype) if needs[1] else None
    size, piece = _sizes(x, weight)
    by_logits = x.new_empty(min(size, len(x)), len(weight)) if any(needs) else None  # the gradient, of one chunk
    for chunk in _slices(len(x), size):
        gradient = None if by_logits is None else by_logits[: len(x[chunk])]
        for part in _slices(len(x[chunk]), piece):
            at = slice(chunk.start + part.start, chunk.start + part.stop)
            logits = _product(x[at], weight.T, dtype)  # (N, V)
            if softcap is not None:
                logits = logits.div_(softcap).tanh_().mul_(softcap)
            softmax_loss(logits, labels[at], by_token[at], None if gradient is None else gradient[part], softcap,
                         None if weights is None else weights[at])  # fmt: skip
            del logits  # before the next ones are made
        if dx is not None and gradient is not None:
            _product(gradient, weight, dtype, out=dx[chunk])
        if dw is not None and gradient is not None:
            _add_product(dw, gradient.T, x[chunk], begins=chunk.start == 0)
    return dx, dw


def _sizes(x: Tensor, weight: Tensor) -> tuple[int, int]:
    """Tokens of a chunk and of a piece of it: powers of two, but for the last ones and chunks made equal."""
    sizes = SIZES.get(x.device.type, SIZES["cpu"])
    chunk, piece = (1 << max(0, (size // len(weight)).bit_length() - 1) for size in (sizes.gradients, sizes.logits))
    equal = cdiv(len(x), max(1, cdiv(len(x), chunk)))
    return min(chunk, max(1, cdiv(equal, TILE) * TILE)), piece


def _slices(n: int, size: int) -> Iterator[slice]:
    """At least one, though of nothing."""
    return (slice(start, min(start + size, n)) for start in range(0, max(n, 1), size))


def _product(a: Tensor, b: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """`a @ b` with the result in `dtype`, not rounded to the operands' on the way; written to `out`, of that dtype."""
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype) if out is None else torch.mm(a, b, out_dtype=dtype, out=out)
    return torch.mm(a.to(dtype), b.to(dtype), out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor, begins: bool) -> None:
    """`total += a @ b` in the dtype of `total`; where it begins, what was there before does not count."""
    if begins:
        _product(a, b, total.dtype, out=total)
    elif a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
