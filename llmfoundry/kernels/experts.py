"""The experts of a MoE layer: every token through its K experts, weighted and summed, dropless.

Shapes: T tokens, D d_model, F ffn hidden size, E experts, K top_k, R rows in expert order.
Three backends, one face. `reference` says what is computed, slowly. `grouped_mm` sorts rows by expert, runs
one product for all experts and keeps only x and the pre-activation h for the backward. `triton` fuses that.

Two identities carry the backward (SonicMoE, arXiv:2512.14080, has them too). The routing weight s scales the
activation, a' = s * a, so the combine is a plain sum of rows and dW2 uses a' as it is. And with da' = dy @ W2
the weight's gradient is ds = rowsum(da' * a), so no expert's output has to be kept.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import cache
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from llmfoundry.kernels.activations import (
    ACTIVATIONS,
    GLU_ACTIVATIONS,
    accumulation_dtype,
    activate,
    activate_backward,
    glu,
)
from llmfoundry.kernels.late import LateGradients
from llmfoundry.kernels.routing import Order, sort_by_expert, sum_rows_torch

Backend = Literal["reference", "grouped_mm", "triton"]
TRITON_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
log = logging.getLogger(__name__)


class ExpertKind(NamedTuple):
    """What every expert of a layer computes, as far as backends differ in it."""

    d_model: int
    hidden: int
    activation: str = "silu"
    biased: bool = False
    limit: float | None = None  # clamp of gate and up


@cache
def _say_once(message: str) -> None:
    log.warning(message)


def _triton_refusal(kind: ExpertKind, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run these experts there, or None."""
    if importlib.util.find_spec("llmfoundry.kernels.experts_triton") is None:
        return "this build has no Triton kernels"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype == torch.float64:
        return "the Triton kernels have no float64"
    if os.environ.get("TRITON_INTERPRET") != "1":
        if device.type != "cuda" or torch.version.hip is not None:
            return f"the Triton kernels need an NVIDIA GPU, found {device}"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "the Triton kernels need compute capability 8.0"
    return _triton_refusal_of_kind(kind, dtype)


def _triton_refusal_of_kind(kind: ExpertKind, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run these experts anywhere, or None."""
    if kind.biased:
        return "the Triton kernels have no biases"
    if kind.limit is not None or kind.activation not in TRITON_ACTIVATIONS:
        known = ", ".join(TRITON_ACTIVATIONS)
        return f"the Triton kernels know {known} and no clamp, not {kind.activation} limit={kind.limit}"
    step = 16 // dtype.itemsize  # TMA: rows of 16 bytes
    if kind.d_model % step or kind.hidden % step:
        return f"d_model={kind.d_model} and ffn_hidden_size={kind.hidden} must be multiples of {step}"
    return None


def _grouped_mm_refusal(kind: ExpertKind, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `F.grouped_mm` cannot run these experts there, or None."""
    if device.type == "cuda" and dtype != torch.bfloat16:
        return f"grouped_mm needs bfloat16 on a GPU, found {dtype}"
    if device.type == "cuda" and (kind.d_model % 8 or kind.hidden % 8):
        return (
            "grouped_mm needs d_model and ffn_hidden_size to be multiples of 8 on a GPU, "
            f"found {kind.d_model} and {kind.hidden}"
        )
    return None


@torch.compiler.assume_constant_result
def resolve_backend(choice: str, kind: ExpertKind, device: torch.device, dtype: torch.dtype) -> Backend:
    """The backend that `choice` stands for, for these experts on this device in this dtype.

    Not traced, for it asks the environment.

    Args:
        choice: `auto`, `triton`, `grouped_mm` or `reference`.

    Raises:
        ValueError: the backend asked for cannot run here. `auto` falls back instead, and says so once.
    """
    refusals = {
        "triton": _triton_refusal(kind, device, dtype),
        "grouped_mm": _grouped_mm_refusal(kind, device, dtype),
        "reference": None,
    }
    on_gpu = device.type == "cuda"
    if choice == "auto":
        # Off a GPU the Triton kernels run in an interpreter, for their tests alone.
        usable = [name for name, refusal in refusals.items() if refusal is None and (on_gpu or name != "triton")]
        chosen = usable[0]
        if chosen != "triton" and on_gpu:
            _say_once(f"moe_impl=auto takes {chosen}: {refusals['triton']}")
        return cast(Backend, chosen)
    if choice not in refusals:
        raise ValueError(f"moe_impl={choice}: unknown; known: auto, {', '.join(refusals)}")
    if refusals[choice] is not None:
        raise ValueError(f"moe_impl={choice}: {refusals[choice]}; use moe_impl=auto")
    return cast(Backend, choice)


def reads_on_host(backend: Backend, device: torch.device) -> bool:
    """Whether a backend reads the experts' loads on the host, so that no compiler can trace it."""
    return backend == "reference" or (backend == "grouped_mm" and device.type == "cpu")


def experts_ffn(
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
    backend: Backend,
    limit: float | None = None,
    n_rows: int | None = None,
    late: LateGradients | None = None,
) -> Tensor:
    """Apply each token's experts: `y[t] = sum_j weights[t, j] * FFN[experts[t, j]](x[t])`.

    Args:
        x: (T, D) any float dtype; T may be 0.
        weights: (T, K) float32 (float64 where x is).
        experts: (T, K) int32 or int64. The id E says "no expert" and adds nothing.
        w1: (E, 2F, D) gate rows then up rows, or (E, F, D) without a gate.
        w2: (E, D, F).
        b1: (E, 2F) or (E, F), or None.
        b2: (E, D) or None.
        activation: one of `GLU_ACTIVATIONS` with a gate, of `ACTIVATIONS` without.
        gated: whether w1 holds a gate.
        backend: as `resolve_backend` returned it.
        limit: clamp of gate and up before the gated unit, or None.
        n_rows: a bound on the slots that have an expert, where the caller knows one below T*K: rows are
            allocated for that many. More slots with an expert than this is the caller's error.
        late: w1, w2, b1 and b2 came from its `weight`; backward defers their gradients to it. `reference` computes
            them at once, with the same result.

    Returns:
        (T, D) in the dtype of `x`, accumulated in float32 in the order of j: bitwise the same twice.

    Raises:
        ValueError: shapes or the activation do not fit, or the backend cannot compute these experts.
    """
    _check(x, weights, experts, w1, w2, activation, gated)
    if backend == "reference":
        return _experts_ffn_reference(x, weights, experts, w1, w2, b1, b2, activation, gated, limit)
    if backend == "triton":
        biased = b1 is not None or b2 is not None
        refusal = _triton_refusal_of_kind(ExpertKind(w2.shape[1], w2.shape[2], activation, biased, limit), w1.dtype)
        if refusal is not None:
            raise ValueError(f"moe_impl=triton: {refusal}; use moe_impl=auto")
    if x.numel() == 0 or experts.numel() == 0:
        # Depends on every weight: without tokens their gradients are zeros, not absent, on this rank as on others.
        nothing = torch.stack([w[:0].sum() for w in (w1, w2, b1, b2) if w is not None]).sum()
        return x * weights.sum(1, keepdim=True).to(x.dtype) + nothing.to(x.dtype)
    if backend == "triton":
        # Imported here, not above: triton is not installed on every machine.
        from llmfoundry.kernels.experts_triton import experts_ffn_triton

        return experts_ffn_triton(
            x, weights, experts, w1, w2, activation=activation, gated=gated, n_rows=n_rows, late=late
        )
    unit = _Unit(activation, gated, limit)
    return cast(Tensor, _GroupedExperts.apply(x, weights, experts, w1, w2, b1, b2, unit, n_rows, late))


def _check(x: Tensor, weights: Tensor, experts: Tensor, w1: Tensor, w2: Tensor, activation: str, gated: bool) -> None:
    n_experts, hidden, d_model = w2.shape[0], w2.shape[2], x.shape[-1]
    expected = (n_experts, hidden * (2 if gated else 1), d_model)
    if tuple(w1.shape) != expected or w2.shape[1] != d_model:
        raise ValueError(f"w1 {tuple(w1.shape)} does not fit w2 {tuple(w2.shape)}, d_model={d_model}, {gated=}")
    if weights.shape != experts.shape or weights.shape[0] != x.shape[0]:
        raise ValueError(f"weights {tuple(weights.shape)} and experts {tuple(experts.shape)} must be ({x.shape[0]}, K)")
    known = GLU_ACTIVATIONS if gated else tuple(ACTIVATIONS)
    if activation not in known:
        raise ValueError(f"activation={activation!r} with {gated=} is unknown; known: {', '.join(known)}")


def _experts_ffn_reference(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None,
    b2: Tensor | None,
    activation: str,
    gated: bool,
    limit: float | None,
) -> Tensor:
    """Expert by expert, as the formula reads; autograd does the backward. Reads values back to the host."""
    by_slot = x.new_zeros(experts.numel(), x.shape[1])  # (T*K, D)
    for e in range(w1.shape[0]):
        slots = (experts.reshape(-1) == e).nonzero().squeeze(1)
        h = F.linear(x[slots // experts.shape[1]], w1[e], None if b1 is None else b1[e])
        a = glu(h, activation, limit) if gated else ACTIVATIONS[activation](h)
        by_slot = by_slot.index_copy(0, slots, F.linear(a, w2[e], None if b2 is None else b2[e]))
    weighted = by_slot.view(*experts.shape, x.shape[1]) * weights.unsqueeze(-1)  # (T, K, D), float32 at least
    return weighted.sum(dim=1).to(x.dtype)


class _Unit(NamedTuple):
    """What stands between the two products."""

    activation: str
    gated: bool
    limit: float | None


class _ExpertRows(NamedTuple):
    """An `Order` cut to R rows. Slots without an expert point at the last one, which is kept zero."""

    expert_start: Tensor  # (E+1,)
    token: Tensor  # (R,)
    slot: Tensor  # (R,)
    of_slot: Tensor  # (T, K)
    valid: Tensor | None  # (R,) bool; None where every row has an expert


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _rows(order: Order, shape: torch.Size, n_rows: int | None) -> _ExpertRows:
    """R rows for the slots of an order.

    A CPU reads for nothing how many slots have an expert, and drops the others. A GPU must not wait for that
    number: it keeps them all (or `n_rows`), and `F.grouped_mm` leaves what is behind the last expert unset.
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
    """Each row times its expert's matrix: (R, X), (E, X, Y) -> (R, Y), unset behind the last expert."""
    if _on_gpu(rows):
        return F.grouped_mm(rows, w, offs=start[1:])
    out = rows.new_empty(rows.shape[0], w.shape[2])
    for e, (a, b) in enumerate(_spans(start)):
        torch.mm(rows[a:b], w[e], out=out[a:b])
    return out


def _weight_gradient(left: Tensor, right: Tensor, start: Tensor) -> Tensor:
    """Each expert's `left.T @ right` over its rows: (R, X), (R, Y) -> (E, X, Y); zero for an empty expert."""
    if _on_gpu(left):
        return F.grouped_mm(left.t(), right, offs=start[1:])
    out = left.new_empty(start.numel() - 1, left.shape[1], right.shape[1])
    for e, (a, b) in enumerate(_spans(start)):
        torch.mm(left[a:b].t(), right[a:b], out=out[e])
    return out


def _spans(start: Tensor) -> list[tuple[int, int]]:
    """The rows of each expert, read on the host: for the CPU only."""
    edges = start.tolist()
    return list(zip(edges[:-1], edges[1:], strict=True))


class _Context(FunctionCtx):
    """What autograd and forward leave for the backward."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    unit: _Unit
    late: LateGradients | None

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """As inherited; torch's own annotation forgets that None may be saved."""
        super().save_for_backward(*cast(tuple[Tensor, ...], tensors))


class _GroupedExperts(torch.autograd.Function):
    """`experts_ffn` by sorted rows and grouped products. Saves x and h (and int32 indices)."""

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
        unit: _Unit,
        n_rows: int | None,
        late: LateGradients | None,
    ) -> Tensor:
        rows = _rows(sort_by_expert(experts, w1.shape[0]), experts.shape, n_rows)
        h = _up(x, w1, b1, rows)  # (R, 2F) or (R, F)
        scale = _row_weights(weights, rows)  # (R, 1)
        a = activate(h, *unit).mul_(scale).to(x.dtype)  # (R, F)
        out = _times_weights(a, w2.transpose(1, 2), rows.expert_start)  # (R, D)
        if b2 is not None:
            out.add_(scale * b2[_row_expert(rows)])
        if rows.valid is not None:
            out[-1] = 0
        ctx.save_for_backward(x, weights, w1, w2, b1, b2, h, *rows)
        ctx.unit, ctx.late = unit, late
        return sum_rows_torch(out, rows.of_slot)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, w1, w2, b1, b2, h, *saved = ctx.saved_tensors
        rows, unit = _ExpertRows(*saved), ctx.unit
        need_x, need_weights, _, *needs, _, _, _ = ctx.needs_input_grad
        start = rows.expert_start
        scale = _row_weights(weights, rows)  # (R, 1)
        a = activate(h, *unit)  # (R, F)

        dout = dy.index_select(0, rows.token)  # (R, D)
        da = _times_weights(dout, w2, start).to(a.dtype)  # (R, F), the gradient of a' = scale * a
        dweights = None
        if need_weights:
            drow = torch.linalg.vecdot(da, a)  # (R,)
            if b2 is not None:
                drow = drow + torch.linalg.vecdot(dout.to(a.dtype), b2[_row_expert(rows)].to(a.dtype))
            dweights = _to_slots(drow, rows).to(weights.dtype)
        dh = activate_backward(da.mul_(scale), h, *unit)  # (R, 2F) or (R, F)
        dx = None
        if need_x:
            dx_rows = _times_weights(dh, w1, start)  # (R, D)
            if rows.valid is not None:
                dx_rows[-1] = 0
            dx = sum_rows_torch(dx_rows, rows.of_slot)
        a = a.mul_(scale).to(dy.dtype) if needs[1] else a  # a'
        compute_by_name = {
            "w1": lambda: _weight_gradient(dh, x.index_select(0, rows.token), start),
            "w2": lambda: _weight_gradient(dout, a, start),
            "b1": lambda: _sum_by_expert(dh, start).to(w1.dtype),
            "b2": lambda: _sum_by_expert(dout * scale, start).to(w2.dtype),
        }
        grads: list[Tensor | None] = []
        for (name, compute), need in zip(compute_by_name.items(), needs, strict=True):
            if need and ctx.late is not None:
                ctx.late.defer(name, compute)
            grads.append(compute() if need and ctx.late is None else None)
        return dx, dweights, None, *grads, None, None, None


def _up(x: Tensor, w1: Tensor, b1: Tensor | None, rows: _ExpertRows) -> Tensor:
    """The pre-activation of every row: (R, 2F) or (R, F)."""
    h = _times_weights(x.index_select(0, rows.token), w1.transpose(1, 2), rows.expert_start)
    return h if b1 is None else h.add_(b1[_row_expert(rows)])


def _row_weights(weights: Tensor, rows: _ExpertRows) -> Tensor:
    """(T, K) routing weights -> (R, 1) in expert order."""
    return weights.reshape(-1).index_select(0, rows.slot).unsqueeze(1)


def _row_expert(rows: _ExpertRows) -> Tensor:
    """(R,) each row's expert; an arbitrary one for rows behind the last."""
    ends = rows.expert_start[1:]
    row = torch.arange(rows.token.numel(), dtype=ends.dtype, device=ends.device)
    return torch.searchsorted(ends, row, right=True).clamp_(max=max(ends.numel() - 1, 0))


def _to_slots(by_row: Tensor, rows: _ExpertRows) -> Tensor:
    """(R,) values in expert order -> (T, K), zero for slots without an expert."""
    if rows.valid is not None:
        by_row = by_row.masked_fill(~rows.valid, 0)
    return by_row.index_select(0, rows.of_slot.reshape(-1)).view(rows.of_slot.shape)


def _sum_by_expert(rows: Tensor, start: Tensor) -> Tensor:
    """(R, X) -> (E, X) in float32: one thread sums one column of one expert, so no atomics."""
    rows = rows.to(accumulation_dtype(rows.dtype))
    return torch.segment_reduce(rows, "sum", lengths=start.diff(), unsafe=True)
