"""The experts of a MoE layer: every token through its K experts, weighted and summed, dropless.

Shapes: T tokens, D d_model, F ffn hidden size, E experts, K top_k, R rows in expert order.
Three backends, one face. `reference` says what is computed, slowly. `grouped_mm` sorts rows by expert, runs
one product for all experts and keeps only x and the pre-activation h for the backward. `triton` fuses that.
Adapters are computed beside the weights by each of them (low_rank.py).

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

from llmfoundry.kernels.activations import ACTIVATIONS, GLU_ACTIVATIONS, glu
from llmfoundry.kernels.experts_grouped import experts_ffn_grouped
from llmfoundry.kernels.late import LateGradients
from llmfoundry.kernels.low_rank import ExpertAdapters, LowRank, rounds_once

Backend = Literal["reference", "grouped_mm", "triton", "e4m3"]  # e4m3: by `precision` alone, not by moe_impl
E4M3_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")  # without clamps
log = logging.getLogger(__name__)


class ExpertKind(NamedTuple):
    """What every expert of a layer computes, as far as backends differ in it."""

    d_model: int
    hidden: int
    activation: str = "silu"
    biased: bool = False
    limit: float | None = None  # clamp of gate and up
    dropout: bool = False  # of what adapters see


@cache
def _say_once(message: str) -> None:
    log.warning(message)


@cache
def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None  # looks into folders: too slow for each forward


def _triton_refusal(kind: ExpertKind, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run these experts there, or None."""
    if not _is_installed("llmfoundry.kernels.experts_triton"):
        return "this build has no Triton kernels"
    if not _is_installed("triton"):
        return "triton is not installed"
    if dtype == torch.float64:
        return "the Triton kernels have no float64"
    if os.environ.get("TRITON_INTERPRET") != "1":
        if device.type != "cuda" or torch.version.hip is not None:
            return f"the Triton kernels need an NVIDIA GPU, found {device}"
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "the Triton kernels need compute capability 8.0"
    return _kind_refusal(kind, dtype)


def _kind_refusal(kind: ExpertKind, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot run these experts anywhere, or None."""
    if kind.dropout:
        return "the Triton kernels have no dropout (lora.dropout) in experts"
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
        ValueError: the backend asked for cannot run here. `auto` falls back instead, with one warning.
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


def e4m3_refusal(impl: str, kind: ExpertKind) -> str | None:
    """Why experts cannot compute in e4m3, or None."""
    if impl not in ("auto", "triton"):
        return f"moe_impl={impl}"
    if kind.d_model % 16 or kind.hidden % 16:
        return f"d_model={kind.d_model} and ffn_hidden_size={kind.hidden} are not multiples of 16"
    if kind.biased:
        return "experts with biases"
    if kind.limit is not None or kind.activation not in E4M3_ACTIVATIONS:
        return f"the activation {kind.activation} with limit={kind.limit}"
    return _kind_refusal(kind, torch.bfloat16)


def reads_on_host(backend: Backend, device: torch.device) -> bool:
    """Whether a backend reads the experts' loads on the host, so that no compiler can trace it."""
    return backend == "reference" or (backend in ("grouped_mm", "e4m3") and device.type == "cpu")


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
    adapters: ExpertAdapters | None = None,
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
        backend: as `resolve_backend` returned it, or e4m3 where `e4m3_refusal` returned None.
        limit: clamp of gate and up before the gated unit, or None.
        n_rows: a bound on the slots that have an expert, where the caller knows one below T*K: rows are
            allocated for that many. More slots with an expert than this is the caller's error.
        late: w1, w2, b1, b2 and the adapters came from its `weight`; backward defers their gradients to it.
            `reference` computes them at once, with the same result.
        adapters: low-rank matrices beside w1 and w2.

    Returns:
        (T, D) in the dtype of `x`, accumulated in float32 in the order of j: bitwise the same twice.

    Raises:
        ValueError: shapes or the activation do not fit, or the backend cannot compute these experts.
    """
    adapters = adapters or ExpertAdapters()
    _check(x, weights, experts, w1, w2, activation, gated, adapters)
    if backend == "reference":
        return _experts_ffn_reference(x, weights, experts, w1, w2, b1, b2, activation, gated, limit, adapters)
    if backend == "triton":
        kind = ExpertKind(w2.shape[1], w2.shape[2], dropout=adapters.dropout > 0)
        refusal = _kind_refusal(kind, w1.dtype)
        if refusal is not None:
            raise ValueError(f"moe_impl=triton: {refusal}; use moe_impl=auto")
    if x.numel() == 0 or experts.numel() == 0:
        # Depends on every weight: without tokens their gradients are zeros, not absent, on this rank as on others.
        of_adapters = [tensor for pair in adapters.pairs for tensor in pair]
        nothing = torch.stack([w[:0].sum() for w in (w1, w2, b1, b2, *of_adapters) if w is not None]).sum()
        return x * weights.sum(1, keepdim=True).to(x.dtype) + nothing.to(x.dtype)
    if backend == "e4m3":
        from llmfoundry.kernels.experts_scaled import experts_ffn_scaled

        return experts_ffn_scaled(
            x, weights, experts, w1, w2, activation=activation, gated=gated, n_rows=n_rows, late=late
        )
    if backend == "triton":
        # Imported here, not above: triton is not installed on every machine.
        from llmfoundry.kernels.experts_triton import experts_ffn_triton

        return experts_ffn_triton(
            x, weights, experts, w1, w2, b1=b1, b2=b2, activation=activation, gated=gated, limit=limit, n_rows=n_rows,
            late=late, adapters=adapters,
        )  # fmt: skip
    return experts_ffn_grouped(
        x, weights, experts, w1, w2, b1, b2, activation=activation, gated=gated, limit=limit, n_rows=n_rows, late=late,
        adapters=adapters,
    )  # fmt: skip


def _check(
    x: Tensor, weights: Tensor, experts: Tensor, w1: Tensor, w2: Tensor, activation: str, gated: bool,
    adapters: ExpertAdapters,
) -> None:  # fmt: skip
    n_experts, hidden, d_model = w2.shape[0], w2.shape[2], x.shape[-1]
    expected = (n_experts, hidden * (2 if gated else 1), d_model)
    if tuple(w1.shape) != expected or w2.shape[1] != d_model:
        raise ValueError(f"w1 {tuple(w1.shape)} does not fit w2 {tuple(w2.shape)}, d_model={d_model}, {gated=}")
    if weights.shape != experts.shape or weights.shape[0] != x.shape[0]:
        raise ValueError(f"weights {tuple(weights.shape)} and experts {tuple(experts.shape)} must be ({x.shape[0]}, K)")
    known = GLU_ACTIVATIONS if gated else tuple(ACTIVATIONS)
    if activation not in known:
        raise ValueError(f"activation={activation!r} with {gated=} is unknown; known: {', '.join(known)}")
    for name, pair, w in (("w1", adapters.up, w1), ("w2", adapters.down, w2)):
        if pair is not None and (
            pair.a.shape != (w.shape[0], pair.a.shape[1], w.shape[2]) or pair.b.shape != (*w.shape[:2], pair.a.shape[1])
        ):
            raise ValueError(
                f"adapter {tuple(pair.a.shape)}, {tuple(pair.b.shape)} does not fit {name} {tuple(w.shape)}"
            )


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
    adapters: ExpertAdapters,
) -> Tensor:
    """Expert by expert, as the formula reads; autograd does the backward. Reads values back to the host."""

    def linear(e: int, x: Tensor, w: Tensor, b: Tensor | None, pair: LowRank | None, x_dropped: Tensor) -> Tensor:
        matrix, bias = w[e], None if b is None else b[e]
        if pair is None:
            return F.linear(x, matrix, bias)
        u, up = F.linear(x_dropped, pair.a[e]), adapters.scale * pair.b[e]
        if rounds_once(x.dtype):
            return F.linear(torch.cat([x, u], 1), torch.cat([matrix, up], 1), bias)
        return F.linear(x, matrix, bias) + F.linear(u, up)

    by_slot = x.new_zeros(experts.numel(), x.shape[1])  # (T*K, D)
    x_dropped = F.dropout(x, adapters.dropout)
    for e in range(w1.shape[0]):
        slots = (experts.reshape(-1) == e).nonzero().squeeze(1)
        token = slots // experts.shape[1]
        h = linear(e, x[token], w1, b1, adapters.up, x_dropped[token])
        a = glu(h, activation, limit) if gated else ACTIVATIONS[activation](h)
        by_slot = by_slot.index_copy(0, slots, linear(e, a, w2, b2, adapters.down, F.dropout(a, adapters.dropout)))
    weighted = by_slot.view(*experts.shape, x.shape[1]) * weights.unsqueeze(-1)  # (T, K, D), float32 at least
    return weighted.sum(dim=1).to(x.dtype)
