"""Fused RMSNorm and RoPE of queries and keys, in one pass over the projection's output, forward and backward.

Shapes: B rows, S sequence, H query heads, G kv heads, C head_dim, N = H or G heads.
Forward reads and writes queries and keys once; values stay in place. Backward reads both again, with the three
gradients, and writes the gradient of the projection's output, including values, without concatenation. The norm is over
each head, with C weights, or over all heads together, with N C weights. Everything is computed in float32 and rounded
once. Each program sums the weight gradients of its tokens in order, so results are bitwise deterministic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU builds of torch do not include it
    triton = None


class Projected(NamedTuple):
    """The queries, keys and values of a projection."""

    q: Tensor  # (B, S, H, C)
    k: Tensor  # (B, S, G, C)
    v: Tensor  # (B, S, G, C), a view of the projection's output


def norm_rotate(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, n_heads: int, kv_heads: int, eps: float
) -> Projected:
    """Normalize and rotate the queries and keys of a projection.

    Args:
        qkv: (B, S, (H + 2G) C) contiguous, bfloat16, float16 or float32, on a GPU.
        q_weight: (C,) for a norm of each head, (H C,) for one of all heads.
        k_weight: (C,) or (G C,).
        cos: (S, 1, C/2) or (B, S, 1, C/2) float32.
        sin: as `cos`.
        n_heads: H.
        kv_heads: G.
        eps: of the norm.
    """
    return Projected(*_NormRotate.apply(qkv, q_weight, k_weight, cos, sin, n_heads, kv_heads, eps))


def norm_rotate_reference(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, n_heads: int, kv_heads: int, eps: float
) -> Projected:
    """`norm_rotate` in plain PyTorch."""
    heads = qkv.unflatten(-1, (n_heads + 2 * kv_heads, -1))  # (B, S, H + 2G, C)
    q, k, v = heads.split((n_heads, kv_heads, kv_heads), dim=2)
    dtype = torch.promote_types(qkv.dtype, torch.float32)

    def finished(x: Tensor, weight: Tensor) -> Tensor:
        wide = x if len(weight) == x.shape[-1] else x.flatten(2)
        a, b = F.rms_norm(wide.to(dtype), weight.shape, weight.to(dtype), eps).view_as(x).chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)

    return Projected(finished(q, q_weight), finished(k, k_weight), v)


def has_kernel(x: Tensor) -> bool:
    """Return whether `norm_rotate` supports this tensor's device and dtype."""
    return triton is not None and x.is_cuda and x.dtype != torch.float64


class _NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, n_heads: int,
        kv_heads: int, eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        q, k = _forward(qkv, q_weight, k_weight, cos, sin, n_heads, kv_heads, eps)
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin)
        ctx.sizes = n_heads, kv_heads, eps  # type: ignore[attr-defined]
        return q, k, qkv.unflatten(-1, (n_heads + 2 * kv_heads, -1))[:, :, n_heads + kv_heads :]

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, sizes = ctx.saved_tensors, ctx.sizes  # type: ignore[attr-defined]
        dqkv, dw = _backward(*grads, *saved, *sizes)
        dq_weight, dk_weight = (
            part.to(weight.dtype)
            for part, weight in zip(dw.split([len(w) for w in saved[1:3]]), saved[1:3], strict=True)
        )
        return dqkv, dq_weight, dk_weight, None, None, None, None, None


@torch.library.custom_op("llmfoundry::norm_rotate", mutates_args=())
def _forward(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, n_heads: int, kv_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    q, k = _empty(qkv, n_heads, kv_heads)
    dim, n_tokens = q.shape[-1], q[..., 0, 0].numel()
    constants = _constants(n_heads, kv_heads, dim, q_weight)
    warps = _warps(constants)
    programs = min(n_tokens, _programs(qkv.device, 64 // warps))
    forward_kernel[(programs,)](
        qkv, q_weight, k_weight, cos, sin, q, k, n_tokens, cos.numel() * 2 // dim, eps,
        **constants, num_warps=warps,
    )  # fmt: skip
    return q, k


@_forward.register_fake
def _empty_results(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, n_heads: int, kv_heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    return _empty(qkv, n_heads, kv_heads)


def _empty(qkv: Tensor, n_heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    rows, length, width = qkv.shape
    dim = width // (n_heads + 2 * kv_heads)
    return qkv.new_empty(rows, length, n_heads, dim), qkv.new_empty(rows, length, kv_heads, dim)


@torch.library.custom_op("llmfoundry::norm_rotate_backward", mutates_args=())
def _backward(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    n_heads: int, kv_heads: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (each if each.stride(-1) == 1 else each.contiguous() for each in (dq, dk, dv))
    (length, dim), n_tokens = dq.shape[1::2], dq[..., 0, 0].numel()
    constants = _constants(n_heads, kv_heads, dim, q_weight)
    warps = _warps(constants)
    programs = min(n_tokens, _programs(qkv.device, 3 if warps == 4 else 16 // warps))
    dqkv = torch.empty_like(qkv)
    parts = qkv.new_empty(programs, len(q_weight) + len(k_weight), dtype=torch.float32)
    backward_kernel[(programs,)](
        dq, dk, dv, *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3], qkv, q_weight, k_weight, cos, sin, dqkv,
        parts, n_tokens, length, cos.numel() * 2 // dim, eps, **constants, num_warps=warps,
    )  # fmt: skip
    return dqkv, parts.sum(0)


@_backward.register_fake
def _empty_gradients(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    n_heads: int, kv_heads: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(qkv), qkv.new_empty(len(q_weight) + len(k_weight), dtype=torch.float32)


def _programs(device: torch.device, per_sm: int) -> int:
    if device.type != "cuda":
        return 2  # the interpreter runs programs one after another; two programs share the tokens
    return torch.cuda.get_device_properties(device).multi_processor_count * per_sm


def _warps(constants: dict[str, int | bool]) -> int:
    """Return enough warps that each thread holds at most 16 values of each half of a token's queries."""
    return min(16, max(4, constants["HP"] * constants["HALFP"] // 512))


def _constants(n_heads: int, kv_heads: int, dim: int, q_weight: Tensor) -> dict[str, int | bool]:
    padded = triton.next_power_of_2
    return {
        "H": n_heads, "G": kv_heads, "HALF": dim // 2, "HP": padded(n_heads), "GP": padded(kv_heads),
        "HALFP": padded(dim // 2), "EACH": len(q_weight) == dim,
    }  # fmt: skip


if triton is not None:

    @triton.jit
    def _halves(ptr, stride, N: tl.constexpr, NP: tl.constexpr, HALF: tl.constexpr, HALFP: tl.constexpr):
        """Load the two halves of each head, (N, C/2) float32 each, padded with zeros."""
        n, d = tl.arange(0, NP)[:, None], tl.arange(0, HALFP)[None, :]
        inside = (n < N) & (d < HALF)
        at = n * stride + d
        a = tl.load(ptr + at, mask=inside, other=0.0).to(tl.float32)
        return a, tl.load(ptr + at + HALF, mask=inside, other=0.0).to(tl.float32)

    @triton.jit
    def _store_halves(ptr, a, b, N: tl.constexpr, NP: tl.constexpr, HALF: tl.constexpr, HALFP: tl.constexpr):
        n, d = tl.arange(0, NP)[:, None], tl.arange(0, HALFP)[None, :]
        inside = (n < N) & (d < HALF)
        at = n * (2 * HALF) + d
        tl.store(ptr + at, a, mask=inside)
        tl.store(ptr + at + HALF, b, mask=inside)

    @triton.jit
    def _mean(x, N: tl.constexpr, HALF: tl.constexpr, EACH: tl.constexpr):
        """Average the sum of both halves over each head, or over all heads; broadcasts to (N, C/2)."""
        if EACH:
            return (tl.sum(x, axis=1) / (2 * HALF))[:, None]
        else:
            return tl.sum(x) / (2 * HALF * N)

    @triton.jit
    def _forward_part(
        x_ptr, w_ptr, out_ptr, cos, sin, eps, N: tl.constexpr, NP: tl.constexpr, HALF: tl.constexpr,
        HALFP: tl.constexpr, EACH: tl.constexpr,
    ):  # fmt: skip
        a, b = _halves(x_ptr, 2 * HALF, N, NP, HALF, HALFP)
        w_a, w_b = _halves(w_ptr, 0 if EACH else 2 * HALF, N, NP, HALF, HALFP)
        r = tl.rsqrt(_mean(a * a + b * b, N, HALF, EACH) + eps)
        a, b = a * r * w_a, b * r * w_b
        _store_halves(out_ptr, a * cos - b * sin, b * cos + a * sin, N, NP, HALF, HALFP)

    @triton.jit
    def forward_kernel(
        x_ptr, wq_ptr, wk_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, n_tokens, n_positions, eps, H: tl.constexpr,
        G: tl.constexpr, HALF: tl.constexpr, HP: tl.constexpr, GP: tl.constexpr, HALFP: tl.constexpr,
        EACH: tl.constexpr,
    ):  # fmt: skip
        d = tl.arange(0, HALFP)
        C: tl.constexpr = 2 * HALF
        for token in tl.range(tl.program_id(0), n_tokens, tl.num_programs(0)):
            position = token % n_positions
            cos = tl.load(cos_ptr + position * HALF + d, mask=d < HALF, other=0.0)[None, :]
            sin = tl.load(sin_ptr + position * HALF + d, mask=d < HALF, other=0.0)[None, :]
            x = x_ptr + tl.cast(token, tl.int64) * ((H + 2 * G) * C)
            q, k = q_ptr + tl.cast(token, tl.int64) * (H * C), k_ptr + tl.cast(token, tl.int64) * (G * C)
            _forward_part(x, wq_ptr, q, cos, sin, eps, H, HP, HALF, HALFP, EACH)
            _forward_part(x + H * C, wk_ptr, k, cos, sin, eps, G, GP, HALF, HALFP, EACH)

    @triton.jit
    def _backward_part(
        dy_ptr, dy_stride, x_ptr, dx_ptr, w_a, w_b, dw_a, dw_b, cos, sin, eps, N: tl.constexpr, NP: tl.constexpr,
        HALF: tl.constexpr, HALFP: tl.constexpr, EACH: tl.constexpr,
    ):  # fmt: skip
        """Write the gradient of one token's queries or keys; return the weight gradients plus this token's part."""
        a, b = _halves(x_ptr, 2 * HALF, N, NP, HALF, HALFP)
        dy_a, dy_b = _halves(dy_ptr, dy_stride, N, NP, HALF, HALFP)
        g_a, g_b = dy_a * cos + dy_b * sin, dy_b * cos - dy_a * sin
        r = tl.rsqrt(_mean(a * a + b * b, N, HALF, EACH) + eps)
        a, b = a * r, b * r
        dw_a, dw_b = dw_a + g_a * a, dw_b + g_b * b
        g_a, g_b = g_a * w_a, g_b * w_b
        along = _mean(g_a * a + g_b * b, N, HALF, EACH)
        _store_halves(dx_ptr, (g_a - a * along) * r, (g_b - b * along) * r, N, NP, HALF, HALFP)
        return dw_a, dw_b

    @triton.jit
    def _store_weight_grad(
        ptr, dw_a, dw_b, N: tl.constexpr, NP: tl.constexpr, HALF: tl.constexpr, HALFP: tl.constexpr,
        EACH: tl.constexpr,
    ):  # fmt: skip
        if EACH:
            d = tl.arange(0, HALFP)
            tl.store(ptr + d, tl.sum(dw_a, axis=0), mask=d < HALF)
            tl.store(ptr + HALF + d, tl.sum(dw_b, axis=0), mask=d < HALF)
        else:
            _store_halves(ptr, dw_a, dw_b, N, NP, HALF, HALFP)

    @triton.jit
    def backward_kernel(
        dq_ptr, dk_ptr, dv_ptr, dq_row, dq_token, dq_head, dk_row, dk_token, dk_head, dv_row, dv_token, dv_head,
        x_ptr, wq_ptr, wk_ptr, cos_ptr, sin_ptr, dx_ptr, parts_ptr, n_tokens, length, n_positions, eps,
        H: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, HP: tl.constexpr, GP: tl.constexpr,
        HALFP: tl.constexpr, EACH: tl.constexpr,
    ):  # fmt: skip
        d = tl.arange(0, HALFP)
        C: tl.constexpr = 2 * HALF
        wq_a, wq_b = _halves(wq_ptr, 0 if EACH else C, H, HP, HALF, HALFP)
        wk_a, wk_b = _halves(wk_ptr, 0 if EACH else C, G, GP, HALF, HALFP)
        dwq_a, dwq_b = tl.zeros([HP, HALFP], tl.float32), tl.zeros([HP, HALFP], tl.float32)
        dwk_a, dwk_b = tl.zeros([GP, HALFP], tl.float32), tl.zeros([GP, HALFP], tl.float32)
        for token in tl.range(tl.program_id(0), n_tokens, tl.num_programs(0)):
            row, at = tl.cast(token // length, tl.int64), tl.cast(token % length, tl.int64)
            position = token % n_positions
            cos = tl.load(cos_ptr + position * HALF + d, mask=d < HALF, other=0.0)[None, :]
            sin = tl.load(sin_ptr + position * HALF + d, mask=d < HALF, other=0.0)[None, :]
            x = x_ptr + tl.cast(token, tl.int64) * ((H + 2 * G) * C)
            dx = dx_ptr + tl.cast(token, tl.int64) * ((H + 2 * G) * C)
            v_a, v_b = _halves(dv_ptr + row * dv_row + at * dv_token, dv_head, G, GP, HALF, HALFP)
            dq, dk = dq_ptr + row * dq_row + at * dq_token, dk_ptr + row * dk_row + at * dk_token
            dwq_a, dwq_b = _backward_part(
                dq, dq_head, x, dx, wq_a, wq_b, dwq_a, dwq_b, cos, sin, eps, H, HP, HALF, HALFP, EACH
            )
            dwk_a, dwk_b = _backward_part(
                dk, dk_head, x + H * C, dx + H * C, wk_a, wk_b, dwk_a, dwk_b, cos, sin, eps, G, GP, HALF, HALFP, EACH
            )
            _store_halves(dx + (H + G) * C, v_a, v_b, G, GP, HALF, HALFP)
        Q: tl.constexpr = C if EACH else H * C
        parts = parts_ptr + tl.program_id(0) * (2 * C if EACH else (H + G) * C)
        _store_weight_grad(parts, dwq_a, dwq_b, H, HP, HALF, HALFP, EACH)
        _store_weight_grad(parts + Q, dwk_a, dwk_b, G, GP, HALF, HALFP, EACH)
