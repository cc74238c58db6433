"""Cross-entropy of a linear head, a chunk of tokens at a time: the (T, V) logits are never all alive.

Shapes: T tokens, D d_model, V vocab, N tokens of one chunk.
Each chunk's logits are made, turned into the loss and, in place of a saved graph, into the gradients of
hidden states and weight at once; backward only scales those. Three matrix products in all, as without chunks,
and nothing is recomputed. `cross_entropy_reference` is the plain operation.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch come without it
    triton = None

IGNORE = -100
# Logits of one chunk. GPU: 2^28 float32 are 1 GiB; at T = 16384, D = 2048 on an H200 forward and backward
# take 18.0 ms at V = 50304 and 28.9 ms at T = 8192, V = 151936 (2^26: 19.4 and 39.5 ms; the plain loss: 23.3
# and 35.7 ms). CPU: 2^20 float32 are 4 MiB and stay in the last-level cache from the product to the softmax
# and back.
CHUNK_LOGITS = {"cuda": 2**28, "cpu": 2**20}


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
        total = x.new_zeros((), dtype=dtype)
        by_token = x.new_empty(x.shape[:1], dtype=dtype)
        dx = x.new_empty(x.shape, dtype=dtype) if needs[0] else None
        dw = weight.new_zeros(weight.shape, dtype=dtype) if needs[1] else None
        for chunk in _chunks(x, weight):
            here = None if dx is None else dx[chunk]
            by_token[chunk] = _chunk_loss(x[chunk], weight, labels[chunk], softcap, here, dw, dtype)
            total += by_token[chunk].sum()
        ctx.save_for_backward(*cast(tuple[Tensor, Tensor], (dx, dw)))  # None may be saved, which torch's stub forgets
        ctx.dtypes = (x.dtype, weight.dtype)
        ctx.mark_non_differentiable(by_token)
        return total, by_token

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _Context, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = (
            None if each is None else torch.mul(each, grad, out=torch.empty_like(each, dtype=dtype))  # in one pass
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
        for chunk in _chunks(x, weight):
            by_token[chunk] = _chunk_loss(x[chunk], weight, labels[chunk], softcap, None, None, dtype)
        ctx.save_for_backward(x, weight, labels)
        ctx.softcap = softcap
        return by_token

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: _TokenContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, labels = ctx.saved_tensors
        dtype = grad.dtype
        dx = x.new_empty(x.shape, dtype=dtype) if ctx.needs_input_grad[0] else None
        dw = weight.new_zeros(weight.shape, dtype=dtype) if ctx.needs_input_grad[1] else None
        for chunk in _chunks(x, weight):
            here = None if dx is None else dx[chunk]
            _chunk_loss(x[chunk], weight, labels[chunk], ctx.softcap, here, dw, dtype, grad[chunk])
        return None if dx is None else dx.to(x.dtype), None if dw is None else dw.to(weight.dtype), None, None


def _chunks(x: Tensor, weight: Tensor) -> list[slice]:
    """Tokens whose logits are made at once."""
    n_chunks = max(1, -(-x.shape[0] * weight.shape[0] // CHUNK_LOGITS.get(x.device.type, 2**20)))
    rows = max(1, -(-x.shape[0] // n_chunks))
    return [slice(start, min(start + rows, x.shape[0])) for start in range(0, x.shape[0], rows)]


def _chunk_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    softcap: float | None,
    dx: Tensor | None,
    dw: Tensor | None,
    dtype: torch.dtype,
    weights: Tensor | None = None,
) -> Tensor:
    """The loss of some tokens, (N,); dx is set and dw added to, of the sum or by `weights` (N,) of tokens.

    The logits are freed when it returns.
    """
    logits = _product(x, weight.T, dtype)  # (N, V)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss, dlogits = _softmax_loss(logits, labels, x.dtype, dx is not None or dw is not None)
    if dlogits is not None:
        if softcap is not None:
            dlogits = (dlogits * (1 - (logits / softcap) ** 2)).to(x.dtype)
        if weights is not None:
            dlogits = (dlogits * weights.unsqueeze(1)).to(x.dtype)
        if dx is not None:
            dx.copy_(_product(dlogits, weight, dtype))
        if dw is not None:  # not for a frozen head
            _add_product(dw, dlogits.T, x)
    return loss


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`a @ b` with the result in `dtype`, not rounded to the operands' on the way."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b` in the dtype of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += _product(a, b, total.dtype)


def _softmax_loss(logits: Tensor, labels: Tensor, dtype: torch.dtype, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Loss of each token, (N,), and its gradient by the logits, (N, V) in `dtype`."""
    if logits.is_cuda and triton is not None and logits.dtype == torch.float32:
        return _softmax_loss_triton(logits, labels, dtype, needs_grad)
    counts = labels != IGNORE
    index = labels.where(counts, 0).unsqueeze(1)
    log_p = torch.log_softmax(logits, dim=-1)
    loss = -log_p.gather(1, index).squeeze(1) * counts
    if not needs_grad:
        return loss, None
    gradient = log_p.exp_()
    gradient.scatter_add_(1, index, -torch.ones_like(loss).unsqueeze(1))
    return loss, (gradient.mul_(counts.unsqueeze(1))).to(dtype)


def _softmax_loss_triton(
    logits: Tensor, labels: Tensor, dtype: torch.dtype, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    n, vocab = logits.shape
    loss = torch.empty(n, dtype=torch.float32, device=logits.device)
    gradient = torch.empty_like(logits, dtype=dtype) if needs_grad else logits
    if n:
        block = min(8192, triton.next_power_of_2(vocab))
        _softmax_loss_kernel[(n,)](logits, labels, loss, gradient, vocab, IGNORE, needs_grad, block, num_warps=16)
    return loss, gradient if needs_grad else None


if triton is not None:

    @triton.jit
    def _softmax_loss_kernel(
        logits,
        labels,
        loss,
        gradient,
        vocab,
        IGNORE: tl.constexpr,
        NEEDS_GRAD: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        """One program a token: a pass over its logits for max and sum, and one (from L2) for the gradient."""
        row = tl.program_id(0)
        base = row.to(tl.int64) * vocab
        label = tl.load(labels + row)
        columns = tl.arange(0, BLOCK)
        top = tl.full((BLOCK,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocab, BLOCK):
            z = tl.load(logits + base + start + columns, start + columns < vocab, float("-inf"))
            higher = tl.maximum(top, z)
            # A lane that has seen nothing but padding holds -inf: keep exp(-inf - -inf) out of the sum.
            total = tl.where(higher == float("-inf"), 0.0, total * tl.exp(top - higher) + tl.exp(z - higher))
            top = higher
        peak = tl.max(top)
        total = tl.sum(tl.where(top == float("-inf"), 0.0, total * tl.exp(top - peak)))
        logsumexp = peak + tl.log(total)
        counts = label != IGNORE
        # A label outside the vocabulary shows as NaN instead of reading another row.
        chosen = tl.load(logits + base + label, (label >= 0) & (label < vocab), float("nan"))
        tl.store(loss + row, tl.where(counts, logsumexp - chosen, 0.0))
        if NEEDS_GRAD:
            for start in range(0, vocab, BLOCK):
                at = start + columns
                z = tl.load(logits + base + at, at < vocab, float("-inf"))
                g = tl.where(counts, tl.exp(z - logsumexp) - tl.where(at == label, 1.0, 0.0), 0.0)
                tl.store(gradient + base + at, g, at < vocab)
