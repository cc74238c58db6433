"""Rows in e4m3, 8-bit floats with 3 mantissa bits: the quantizing kernels between the products of scaled.py.

Shapes: T tokens, D d_model, F ffn hidden size, E experts, K top_k, M rows in expert order, N rows and J columns of a
weight, N_TILES bound on row tiles of 128.
Each row has one scale, a power of two, which brings its largest value between 224 and 448. Using another power of two
as the scale changes no bit of a value that does not underflow. This helps matrices that are read transposed, because
8-bit products read both operands along the inner dim: all rows of an expert are rescaled to a common scale without
being rounded twice. A row with a non-finite value has the scale NaN, so the step is skipped as usual.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmfoundry.kernels.activations import activate, activate_backward
from llmfoundry.kernels.gather import gather_reference
from llmfoundry.kernels.routing import Order
from llmfoundry.kernels.tiles import TILE_ROWS, Tiles, value_and_slope

E4M3 = torch.float8_e4m3fn
LEAST = 27  # biased exponent of the smallest scale, 2^-100, used for rows of zeros


class Scaled(NamedTuple):
    """Values in e4m3 with their scales."""

    values: Tensor  # (M, N) e4m3, or (E, N, J)
    scale: Tensor  # (M,) float32, or (E, N); (E,) for transposed matrices


@triton.jit
def scale_of(amax):
    """Return the scale for values up to `amax`, and its inverse. 0.5714 = 1 / 1.75: 448 is 1.75 * 2^8."""
    bits = (amax * 0.5714285714285714).to(tl.int32, bitcast=True)
    exponent = tl.maximum(((bits + 0x7FFFFF) >> 23) - 8, 27)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return tl.where(amax < float("inf"), scale, float("nan")), inverse


@triton.jit
def largest(x):
    """Return the largest magnitude of a row; infinite if a value is NaN, which tl.max would ignore."""
    return tl.max(tl.where(x == x, tl.abs(x), float("inf")))


@triton.jit
def inverse_of(scale):
    """Return 1 / scale for a power of two, without rounding; NaN for NaN."""
    inverse = ((254 << 23) - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
    return tl.where(scale == scale, inverse, float("nan"))


def scale_of_reference(amax: Tensor) -> tuple[Tensor, Tensor]:
    """`scale_of` in plain PyTorch, for float32."""
    bits = (amax * 0.5714285714285714).view(torch.int32)
    exponent = (((bits + 0x7FFFFF) >> 23) - 8).clamp(min=LEAST)
    scale, inverse = ((each << 23).view(torch.float32) for each in (exponent, 254 - exponent))
    return torch.where(amax < torch.inf, scale, torch.nan), inverse


def scale_rows_reference(rows: Tensor) -> Scaled:
    """`scale_rows` in plain PyTorch."""
    rows = rows.float()
    scale, inverse = scale_of_reference(rows.abs().amax(-1))
    # The kernels convert an infinite value to the largest one, and the scale is NaN.
    return Scaled((rows * inverse.unsqueeze(-1)).clamp(-448, 448).to(E4M3), scale)


@triton.jit
def scale_rows_kernel(x_ptr, q_ptr, scale_ptr, J: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * J + j, mask=j < J, other=0.0).to(tl.float32)
    scale, inverse = scale_of(largest(x))
    tl.store(q_ptr + row * J + j, (x * inverse).to(tl.float8e4nv), mask=j < J)
    tl.store(scale_ptr + row, scale)


def scale_rows(x: Tensor) -> Scaled:
    """Quantize each row of a contiguous tensor (..., J); reads 2 bytes per bf16 value and writes 1."""
    n_columns = x.shape[-1]
    q = torch.empty_like(x, dtype=E4M3)
    scale = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(n_columns)
    scale_rows_kernel[(scale.numel(),)](x, q, scale, J=n_columns, BLOCK=block, num_warps=_warps(block))
    return Scaled(q, scale)


def _warps(block: int, most: int = 16) -> int:
    return max(1, min(most, block // 256))


@triton.jit
def transpose_weight_kernel(
    w_ptr, q_ptr, scale_ptr, N, J, BN: tl.constexpr, BJ: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(2)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    base = e.to(tl.int64) * N * J
    inside = (n[:, None] < N) & (j[None, :] < J)
    w = tl.load(w_ptr + base + n[:, None] * J + j[None, :], mask=inside, other=0.0).to(tl.float32)
    q = (w * inverse_of(tl.load(scale_ptr + e))).to(tl.float8e4nv)
    inside = (j[:, None] < J) & (n[None, :] < N)
    tl.store(q_ptr + base + j[:, None] * N + n[None, :], q.T, mask=inside)


def transpose_weight(w: Tensor, scale: Tensor) -> Scaled:
    """Transpose and quantize (E, N, J) weights to (E, J, N) e4m3, with one scale per expert, its largest row scale."""
    n_experts, height, width = w.shape
    q = torch.empty(n_experts, width, height, dtype=E4M3, device=w.device)
    rows, columns = 128, 64
    grid = (triton.cdiv(width, columns), triton.cdiv(height, rows), n_experts)
    transpose_weight_kernel[grid](w, q, scale, height, width, BN=rows, BJ=columns, num_warps=4)
    return Scaled(q, scale)


def transpose_weight_reference(w: Tensor, scale: Tensor) -> Scaled:
    """`transpose_weight` in plain PyTorch."""
    scaled = (w.float() / scale[:, None, None]).clamp(-448, 448)
    return Scaled(scaled.to(E4M3).transpose(1, 2).contiguous(), scale)


@triton.jit
def spread_scaled_kernel(
    x_ptr, q_ptr, scale_ptr, slot_row_ptr, end_ptr, D: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    end = tl.load(end_ptr)
    x = tl.load(x_ptr + token * D + d, mask=d < D, other=0.0).to(tl.float32)
    scale, inverse = scale_of(largest(x))
    q = (x * inverse).to(tl.float8e4nv)
    for j in tl.static_range(K):
        row = tl.load(slot_row_ptr + token * K + j)
        inside = row < end
        tl.store(q_ptr + row.to(tl.int64) * D + d, q, mask=(d < D) & inside)
        tl.store(scale_ptr + row, scale, mask=inside)


def gather_scaled(x: Tensor, order: Order, n_rows: int) -> Scaled:
    """Quantize x (T, D) to (M, D) rows in expert order, unset after the last expert's. Reads each token once."""
    n_tokens, d_model = x.shape
    q = torch.empty(n_rows, d_model, dtype=E4M3, device=x.device)
    scale = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(d_model)
    spread_scaled_kernel[(n_tokens,)](
        x, q, scale, order.slot_row, order.expert_start[-1:], D=d_model, K=order.slot_row.numel() // n_tokens,
        BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return Scaled(q, scale)


def gather_scaled_reference(x: Tensor, order: Order, n_rows: int) -> Scaled:
    """`gather_scaled` in plain PyTorch."""
    return scale_rows_reference(gather_reference(x, order, n_rows))


@triton.jit
def activate_scaled_kernel(
    h_ptr, q_ptr, scale_ptr, weights_ptr, row_slot_ptr, end_ptr,
    F: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if row < tl.load(end_ptr):
        H: tl.constexpr = 2 * F if GATED else F
        base = row.to(tl.int64)
        f = tl.arange(0, BLOCK)
        s = tl.load(weights_ptr + tl.load(row_slot_ptr + row))
        gate = tl.load(h_ptr + base * H + f, mask=f < F, other=0.0).to(tl.float32)
        a, _ = value_and_slope(gate, ACTIVATION)
        if GATED:
            a = a * tl.load(h_ptr + base * H + F + f, mask=f < F, other=0.0).to(tl.float32)
        a = a * s
        scale, inverse = scale_of(largest(a))
        tl.store(q_ptr + base * F + f, (a * inverse).to(tl.float8e4nv), mask=f < F)
        tl.store(scale_ptr + row, scale)


def activate_scaled(
    h: Tensor, weights: Tensor, row_slot: Tensor, tiles: Tiles, *, activation: str, gated: bool
) -> Scaled:
    """Compute and quantize a' = s * act(h): (M, 2F) or (M, F) -> (M, F). If gated, reads 4 bytes per value, writes 1"""
    n_rows, hidden = h.shape[0], h.shape[1] // (2 if gated else 1)
    q = torch.empty(n_rows, hidden, dtype=E4M3, device=h.device)
    scale = torch.empty(n_rows, dtype=torch.float32, device=h.device)
    block = triton.next_power_of_2(hidden)
    activate_scaled_kernel[(n_rows,)](
        h, q, scale, weights, row_slot, tiles.expert_start[-1:], F=hidden, GATED=gated, ACTIVATION=activation,
        BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return Scaled(q, scale)


def activate_scaled_reference(
    h: Tensor, weights: Tensor, row_slot: Tensor, tiles: Tiles, *, activation: str, gated: bool
) -> Scaled:
    """`activate_scaled` in plain PyTorch."""
    return scale_rows_reference(activate(h, activation, gated) * _of_rows(weights, row_slot, h.shape[0]))


def _of_rows(weights: Tensor, row_slot: Tensor, n_rows: int) -> Tensor:
    return weights.reshape(-1)[row_slot[:n_rows].long()].unsqueeze(1)  # (M, 1)


@triton.jit
def activate_backward_scaled_kernel(
    da_ptr, h_ptr, dh_ptr, dh_scale_ptr, a_ptr, a_scale_ptr, ds_ptr, weights_ptr, row_slot_ptr, end_ptr,
    F: tl.constexpr, GATED: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if row < tl.load(end_ptr):
        H: tl.constexpr = 2 * F if GATED else F
        base = row.to(tl.int64)
        f = tl.arange(0, BLOCK)
        inside = f < F
        s = tl.load(weights_ptr + tl.load(row_slot_ptr + row))
        da = tl.load(da_ptr + base * F + f, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(h_ptr + base * H + f, mask=inside, other=0.0).to(tl.float32)
        a, slope = value_and_slope(gate, ACTIVATION)
        if GATED:
            up = tl.load(h_ptr + base * H + F + f, mask=inside, other=0.0).to(tl.float32)
            dup = da * s * a
            dgate = da * s * up * slope
            a = a * up
            amax = tl.maximum(largest(dup), largest(dgate))
        else:
            dup = da
            dgate = da * s * slope
            amax = largest(dgate)
        tl.store(ds_ptr + row, tl.sum(da * a))
        a = a * s
        a_scale, a_inverse = scale_of(largest(a))
        scale, inverse = scale_of(amax)
        tl.store(dh_scale_ptr + row, scale)
        tl.store(dh_ptr + base * H + f, (dgate * inverse).to(tl.float8e4nv), mask=inside)
        if GATED:
            tl.store(dh_ptr + base * H + F + f, (dup * inverse).to(tl.float8e4nv), mask=inside)
        tl.store(a_scale_ptr + row, a_scale)
        tl.store(a_ptr + base * F + f, (a * a_inverse).to(tl.float8e4nv), mask=inside)


class Backward(NamedTuple):
    """The results of the activation's backward."""

    dh: Scaled  # (M, 2F) or (M, F)
    a: Scaled  # (M, F), a' = s * act(h)
    ds: Tensor  # (1, M) float32, the gradient of the routing weights


def activate_backward_scaled(
    da: Tensor, h: Tensor, weights: Tensor, row_slot: Tensor, tiles: Tiles, *, activation: str, gated: bool
) -> Backward:
    """Compute dh from da' (M, F), the gradient of a' before the routing weight; 9 bytes per value of a' if gated.

    Args:
        da: (M, F).
        h: (M, 2F) or (M, F).
        weights: (T, K) float32 routing weights.
        row_slot: the slot of each row.
        tiles: of the rows.
        activation: of the feed-forward block.
        gated: whether it is gated.
    """
    n_rows, hidden = da.shape
    dh, a = torch.empty_like(h, dtype=E4M3), torch.empty_like(da, dtype=E4M3)
    dh_scale, a_scale, ds = (torch.empty(n_rows, dtype=torch.float32, device=h.device) for _ in range(3))
    block = triton.next_power_of_2(hidden)
    activate_backward_scaled_kernel[(n_rows,)](
        da, h, dh, dh_scale, a, a_scale, ds, weights, row_slot, tiles.expert_start[-1:], F=hidden, GATED=gated,
        ACTIVATION=activation, BLOCK=block, num_warps=_warps(block, 32),
    )  # fmt: skip
    return Backward(Scaled(dh, dh_scale), Scaled(a, a_scale), ds.unsqueeze(0))


def activate_backward_scaled_reference(
    da: Tensor, h: Tensor, weights: Tensor, row_slot: Tensor, tiles: Tiles, *, activation: str, gated: bool
) -> Backward:
    """`activate_backward_scaled` in plain PyTorch."""
    s, a, da = _of_rows(weights, row_slot, h.shape[0]), activate(h, activation, gated), da.float()
    dh = activate_backward(da * s, h.float(), activation, gated)
    return Backward(scale_rows_reference(dh), scale_rows_reference(a * s), (da * a).sum(1).unsqueeze(0))


@triton.jit
def source_of(row, row_slot_ptr, inside, K: tl.constexpr):
    """Return the row's index in its source: itself in expert order, or its token if K is not 0."""
    return tl.load(row_slot_ptr + row, mask=inside, other=0) // K if K > 0 else row


@triton.jit
def expert_scale_kernel(scale_ptr, row_slot_ptr, start_ptr, out_ptr, K: tl.constexpr, BLOCK: tl.constexpr):
    e = tl.program_id(0)
    end = tl.load(start_ptr + e + 1)
    most = tl.zeros([BLOCK], dtype=tl.float32) + 7.888609052210118e-31  # 2^-100
    for begin in tl.range(tl.load(start_ptr + e), end, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        source = source_of(row, row_slot_ptr, row < end, K)
        most = tl.maximum(most, tl.load(scale_ptr + source, mask=row < end, other=0.0))
    tl.store(out_ptr + e, tl.max(most))


@triton.jit
def transpose_rows_kernel(
    q_ptr, scale_ptr, expert_scale_ptr, out_ptr, row_slot_ptr, start_ptr, expert_ptr, row_ptr, count_ptr,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(1)
    if i < tl.load(count_ptr):
        e = tl.load(expert_ptr + i)
        row = tl.load(row_ptr + i)
        rows = tl.arange(0, BM)
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        inside = row + rows < tl.load(start_ptr + e + 1)
        source = source_of(row + rows, row_slot_ptr, inside, K)
        ratio = tl.load(scale_ptr + source, mask=inside, other=0.0) * inverse_of(tl.load(expert_scale_ptr + e))
        at = source.to(tl.int64)[:, None] * N + n[None, :]
        q = tl.load(q_ptr + at, mask=inside[:, None] & (n[None, :] < N), other=0.0)
        # Rows after the expert's last are zeroed, even if their values are NaN: they are another expert's, or unset.
        q = tl.where(inside[:, None], q.to(tl.float32) * ratio[:, None], 0.0).to(tl.float8e4nv)
        at = out_ptr + i.to(tl.int64) * N * BM
        tl.store(at + n[:, None] * BM + rows[None, :], q.T, mask=n[:, None] < N)


def transpose_rows(rows: Scaled, tiles: Tiles, row_slot: Tensor | None = None, top_k: int = 0) -> Scaled:
    """Transpose each row tile, (M, N) -> (N_TILES, N, 128), with one scale per expert; 2 bytes per value.

    A tile is zero after an expert's last row. Values below 2^-9 of the expert's scale underflow to zero.

    Args:
        rows: (M, N) in expert order, or (T, N) in token order if `row_slot` is given.
        tiles: of the rows.
        row_slot: (M,) the slot of each row; needs `top_k`.
        top_k: K, if `row_slot` is given.
    """
    n_experts, n_columns = tiles.expert_start.numel() - 1, rows.values.shape[1]
    scale = torch.empty(n_experts, dtype=torch.float32, device=rows.scale.device)
    expert_scale_kernel[(n_experts,)](
        rows.scale, row_slot, tiles.expert_start, scale, K=top_k, BLOCK=1024, num_warps=4
    )  # fmt: skip
    out = torch.empty(tiles.expert.numel(), n_columns, TILE_ROWS, dtype=E4M3, device=scale.device)
    columns = 128
    transpose_rows_kernel[(triton.cdiv(n_columns, columns), tiles.expert.numel())](
        rows.values, rows.scale, scale, out, row_slot, tiles.expert_start, tiles.expert, tiles.row, tiles.n_tiles,
        N=n_columns, K=top_k, BM=TILE_ROWS, BN=columns, num_warps=8,
    )  # fmt: skip
    return Scaled(out, scale)


def rescaled_reference(rows: Scaled, spans: list[tuple[int, int]]) -> Tensor:
    """Return the values that `transpose_rows` represents, in plain PyTorch: (M, N) float32, not transposed."""
    out = torch.zeros_like(rows.values, dtype=torch.float32)
    for a, b in spans:
        scale = rows.scale[a:b].amax().clamp(min=2.0**-100) if b > a else rows.scale.new_ones(())
        values = rows.values[a:b].float() * (rows.scale[a:b] / scale).unsqueeze(1)
        out[a:b] = values.to(E4M3).float() * scale
    return out
