"""The experts of a MoE layer with sorted rows and one grouped product for all experts, in plain PyTorch.

Shapes: T tokens, D d_model, F ffn hidden size, E experts, K top_k, R rows in expert order, r rank of adapters.
Backward is hand-written: forward keeps x, the pre-activation h, the adapters' x A^T and int32 indices.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from llmfoundry.kernels.activations import accumulation_dtype, activate, activate_backward
from llmfoundry.kernels.late import LateGradients, computed
from llmfoundry.kernels.low_rank import RANK_STEP, ExpertAdapters, Operands, rounds_once
from llmfoundry.kernels.routing import Order, sort_by_expert, sum_rows_torch


def experts_ffn_grouped(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    *,
    activation: str,
    gated: bool,
    limit: float | None,
    n_rows: int | None,
    late: LateGradients | None,
    adapters: ExpertAdapters,
) -> Tensor:
    """`experts.experts_ffn` with grouped products; arguments as there (and checked there). Needs a token."""
    unit = _Unit(activation, gated, limit)
    operands = adapters.operands(RANK_STEP if _on_gpu(x) else 1)
    return cast(
        Tensor,
        _GroupedExperts.apply(
            x, weights, experts, w1, w2, b1, b2, *operands, unit, n_rows, late, adapters.dropout
        ),
    )  # fmt: skip


class _Unit(NamedTuple):
    """The activation between the two products."""

    activation: str
    gated: bool
    limit: float | None


class _ExpertRows(NamedTuple):
    """An `Order` truncated to R rows. Slots without an expert point to the last row, which is kept zero."""

    expert_start: Tensor  # (E+1,)
    token: Tensor  # (R,)
    slot: Tensor  # (R,)
    of_slot: Tensor  # (T, K)
    valid: Tensor | None  # (R,) bool; None if every row has an expert


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _rows(order: Order, shape: torch.Size, n_rows: int | None) -> _ExpertRows:
    """Return R rows for the slots of an order.

    Reading the number of slots with an expert is free on a CPU, so unused slots are dropped. A GPU must not wait for
    that number: it keeps all slots (or `n_rows`), and `F.grouped_mm` leaves the rows after the last expert unset.
    """
    n_slots = order.slot_row.numel()
    on_cpu = not _on_gpu(order.slot_row)
    kept = int(order.expert_start[-1]) if on_cpu else n_slots if n_rows is None else min(n_rows, n_slots)
    if on_cpu and kept == n_slots:
        token = order.row_slot // shape[1]
        return _ExpertRows(order.expert_start, token, order.row_slot, order.slot_row.view(shape), None)
    slot = F.pad(order.row_slot[:kept], (0, 1))
    token = slot // shape[1]
    valid = torch.arange(kept + 1, dtype=torch.int32, device=slot.device) < order.expert_start[-1]
    of_slot = torch.where(order.slot_row < order.expert_start[-1], order.slot_row, kept).view(shape)
    return _ExpertRows(order.expert_start, token, slot, of_slot, valid)


def _times_weights(rows: Tensor, w: Tensor, start: Tensor) -> Tensor:
    """Multiply each row by its expert's matrix: (R, X), (E, X, Y) -> (R, Y), unset after the last expert."""
    if _on_gpu(rows):
        return F.grouped_mm(rows, w, offs=start[1:])
    out = rows.new_empty(rows.shape[0], w.shape[2])
    for e, (a, b) in enumerate(_spans(start)):
        torch.mm(rows[a:b], w[e], out=out[a:b])
    return out


def _weight_gradient(left: Tensor, right: Tensor, start: Tensor) -> Tensor:
    """Compute each expert's `left.T @ right` over its rows: (R, X), (R, Y) -> (E, X, Y); zero for an empty expert."""
    if _on_gpu(left):
        return F.grouped_mm(left.t(), right, offs=start[1:])
    out = left.new_empty(start.numel() - 1, left.shape[1], right.shape[1])
    for e, (a, b) in enumerate(_spans(start)):
        torch.mm(left[a:b].t(), right[a:b], out=out[e])
    return out


def _spans(start: Tensor) -> list[tuple[int, int]]:
    """Return the row range of each expert, read on the host; for the CPU only."""
    edges = start.tolist()
    return list(zip(edges[:-1], edges[1:], strict=True))


class _Context(FunctionCtx):
    """What autograd and forward save for backward."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    unit: _Unit
    late: LateGradients | None
    dropout: float

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """As inherited; torch's own annotation omits that None may be saved."""
        super().save_for_backward(*cast(tuple[Tensor, ...], tensors))


class _GroupedExperts(torch.autograd.Function):
    """`experts_ffn` with sorted rows and grouped products. Saves x, h, the adapters' x A^T, and int32 indices."""

    @staticmethod
    def forward(
        ctx: _Context,
        x: Tensor,
        weights: Tensor,
        experts: Tensor,
        w1: Tensor,
        w2: Tensor,
        b1: Tensor | None,
        b2: Tensor | None,
        up_a: Tensor | None,
        up_b: Tensor | None,
        down_a: Tensor | None,
        down_b: Tensor | None,
        unit: _Unit,
        n_rows: int | None,
        late: LateGradients | None,
        dropout: float,
    ) -> Tensor:
        rows = _rows(sort_by_expert(experts, w1.shape[0]), experts.shape, n_rows)
        start = rows.expert_start
        x_rows = x.index_select(0, rows.token)  # (R, D)
        x_kept = None if up_a is None else _draw_kept(x, dropout)  # (T, D): the same mask for all of a token's experts
        u_up = _narrow(_keep(x_rows, x_kept, dropout, rows.token), up_a, start)  # (R, r)
        h = _both(x_rows, w1, u_up, up_b, start)  # (R, 2F) or (R, F)
        del x_rows
        if b1 is not None:
            h.add_(b1[_row_expert(rows)])
        scale = _row_weights(weights, rows)  # (R, 1)
        a = activate(h, *unit).mul_(scale).to(x.dtype)  # (R, F)
        a_kept = None if down_a is None else _draw_kept(a, dropout)  # (R, F)
        u_down = _narrow(_keep(a, a_kept, dropout), down_a, start)  # (R, r)
        out = _both(a, w2, u_down, down_b, start)  # (R, D)
        if b2 is not None:
            out.add_(scale * b2[_row_expert(rows)])
        if rows.valid is not None:
            out[-1] = 0
        adapters = (up_a, up_b, down_a, down_b, u_up, u_down, x_kept, a_kept)
        ctx.save_for_backward(x, weights, w1, w2, b1, b2, h, *adapters, *rows)
        ctx.unit, ctx.late, ctx.dropout = unit, late, dropout
        return sum_rows_torch(out, rows.of_slot)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, w1, w2, b1, b2, h, *saved = ctx.saved_tensors
        operands, (u_up, u_down, x_kept, a_kept) = Operands(*saved[:4]), saved[4:8]
        rows, unit, dropout = _ExpertRows(*saved[8:]), ctx.unit, ctx.dropout
        need_x, need_weights, _, *needs = ctx.needs_input_grad[:11]
        start = rows.expert_start
        scale = _row_weights(weights, rows)  # (R, 1)
        a = activate(h, *unit)  # (R, F)

        dout = dy.index_select(0, rows.token)  # (R, D)
        du_down = None if operands.down_b is None else _times_weights(dout, operands.down_b, start)  # (R, r)
        # (R, F), the gradient of a' = scale * a
        da = _both_back(dout, w2, du_down, operands.down_a, start, a_kept, dropout).to(a.dtype)
        dweights = None
        if need_weights:
            drow = torch.linalg.vecdot(da, a)  # (R,)
            if b2 is not None:
                drow = drow + torch.linalg.vecdot(dout.to(a.dtype), b2[_row_expert(rows)].to(a.dtype))
            dweights = _to_slots(drow, rows).to(weights.dtype)
        dh = activate_backward(da.mul_(scale), h, *unit)  # (R, 2F) or (R, F)
        dx = None
        du_up = None if operands.up_b is None else _times_weights(dh, operands.up_b, start)  # (R, r)
        if need_x:
            dx_rows = _both_back(dh, w1, du_up, operands.up_a, start, x_kept, dropout, rows.token)  # (R, D)
            if rows.valid is not None:
                dx_rows[-1] = 0
            dx = sum_rows_torch(dx_rows, rows.of_slot)
        a = a.mul_(scale).to(dy.dtype) if needs[1] or operands.down_a is not None else a  # a'

        def x_rows(kept: Tensor | None = None) -> Tensor:
            return _keep(x.index_select(0, rows.token), kept, dropout, rows.token)

        compute_by_name = {
            "w1": lambda: _weight_gradient(dh, x_rows(), start),
            "w2": lambda: _weight_gradient(dout, a, start),
            "b1": lambda: _sum_by_expert(dh, start).to(w1.dtype),
            "b2": lambda: _sum_by_expert(dout * scale, start).to(w2.dtype),
            "up_a": lambda: _weight_gradient(cast(Tensor, du_up), x_rows(x_kept), start),
            "up_b": lambda: _weight_gradient(dh, u_up, start),
            "down_a": lambda: _weight_gradient(cast(Tensor, du_down), _keep(a, a_kept, dropout), start),
            "down_b": lambda: _weight_gradient(dout, u_down, start),
        }
        needed = {name: compute_by_name[name] for name, need in zip(compute_by_name, needs, strict=True) if need}
        grads = computed(needed, ctx.late)
        return dx, dweights, None, *(grads.get(name) for name in compute_by_name), None, None, None, None


def _draw_kept(rows: Tensor, dropout: float) -> Tensor | None:
    """Draw the dropout mask of an adapter's input, with PyTorch's generator; None: keep all."""
    return None if dropout == 0 else torch.rand_like(rows) >= dropout


def _keep(rows: Tensor, kept: Tensor | None, dropout: float, of_row: Tensor | None = None) -> Tensor:
    """Apply dropout to rows (R, X); `kept` is (R, X), or (T, X) with each row's token in `of_row`."""
    if kept is None:
        return rows
    return rows * (kept if of_row is None else kept.index_select(0, of_row)) / (1 - dropout)


def _narrow(rows: Tensor, a: Tensor | None, start: Tensor) -> Tensor | None:
    """Compute the first product of an adapter: (R, J), (E, r, J) -> (R, r)."""
    return None if a is None else _times_weights(rows, a.transpose(1, 2), start)


def _both(rows: Tensor, w: Tensor, u: Tensor | None, b: Tensor | None, start: Tensor) -> Tensor:
    """Compute `rows W^T + u B^T`; as one product, which copies the layer's weights, if the sum must be rounded once."""
    if u is None or b is None:
        return _times_weights(rows, w.transpose(1, 2), start)
    if rounds_once(rows.dtype):
        rows, w = torch.cat([rows, u], 1), torch.cat([w, b], 2)
        return _times_weights(rows, w.transpose(1, 2), start)
    wide = _times_weights(rows, w.transpose(1, 2), start)
    return wide.add_(_times_weights(u, b.transpose(1, 2), start))


def _both_back(
    grad: Tensor,
    w: Tensor,
    du: Tensor | None,
    a: Tensor | None,
    start: Tensor,
    kept: Tensor | None,
    dropout: float,
    of_row: Tensor | None = None,
) -> Tensor:
    """Compute `grad W + du A`, the input gradient of a weight and its adapter; the latter goes through its dropout."""
    if du is None or a is None:
        return _times_weights(grad, w, start)
    if kept is None and rounds_once(grad.dtype):
        return _times_weights(torch.cat([grad, du], 1), torch.cat([w, a], 1), start)
    return _times_weights(grad, w, start).add_(_keep(_times_weights(du, a, start), kept, dropout, of_row))


def _row_weights(weights: Tensor, rows: _ExpertRows) -> Tensor:
    """Gather (T, K) routing weights to (R, 1) in expert order."""
    return weights.reshape(-1).index_select(0, rows.slot).unsqueeze(1)


def _row_expert(rows: _ExpertRows) -> Tensor:
    """Return each row's expert, (R,); arbitrary for rows after the last expert's."""
    ends = rows.expert_start[1:]
    row = torch.arange(rows.token.numel(), dtype=ends.dtype, device=ends.device)
    return torch.searchsorted(ends, row, right=True).clamp_(max=max(ends.numel() - 1, 0))


def _to_slots(by_row: Tensor, rows: _ExpertRows) -> Tensor:
    """Return (R,) values in expert order as (T, K), zero for slots without an expert."""
    if rows.valid is not None:
        by_row = by_row.masked_fill(~rows.valid, 0)
    return by_row.index_select(0, rows.of_slot.reshape(-1)).view(rows.of_slot.shape)


def _sum_by_expert(rows: Tensor, start: Tensor) -> Tensor:
    """Sum rows per expert, (R, X) -> (E, X), in float32: one thread per column and expert, without atomics."""
    rows = rows.to(accumulation_dtype(rows.dtype))
    return torch.segment_reduce(rows, "sum", lengths=start.diff(), unsafe=True)
