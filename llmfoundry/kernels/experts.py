"""The experts of a MoE layer: dropless, every token is processed by its K experts and their outputs summed by weight.

Shapes: T tokens, D d_model, F ffn hidden size, E experts, K top_k, R rows in expert order.
Three backends share one interface. `reference` defines the computation, slowly. `grouped_mm` sorts rows by expert, runs
one grouped product for all experts and keeps only x and the pre-activation h for backward. `triton` fuses this. Each
backend computes adapters beside the weights (low_rank.py).

Backward relies on two identities (also in SonicMoE, arXiv:2512.14080). The routing weight s scales the activation, a' =
s * a, so the combine is a plain sum of rows and dW2 uses a' directly. And with da' = dy @ W2, the gradient of the
weight is ds = rowsum(da' * a), so no expert outputs are kept.
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

Backend = Literal["reference", "grouped_mm", "triton", "e4m3"]  # e4m3 is selected by `precision`, not by moe_impl
E4M3_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")  # without clamps
log = logging.getLogger(__name__)


class ExpertKind(NamedTuple):
    """The properties of a layer's experts that determine which backends support them."""

    d_model: int
    hidden: int
    activation: str = "silu"
    biased: bool = False
    limit: float | None = None  # clamp of gate and up
    dropout: bool = False  # whether adapters use dropout


@cache
def _say_once(message: str) -> None:
    log.warning(message)


@cache
def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None  # searches folders: too slow for each forward


def _triton_refusal(kind: ExpertKind, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the Triton kernels cannot run these experts on this device, or None if they can."""
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
    """Return why the Triton kernels cannot run these experts on any device, or None if they can."""
    if kind.dropout:
        return "the Triton kernels have no dropout (lora.dropout) in experts"
    step = 16 // dtype.itemsize  # TMA needs rows of a multiple of 16 bytes
    if kind.d_model % step or kind.hidden % step:
        return f"d_model={kind.d_model} and ffn_hidden_size={kind.hidden} must be multiples of {step}"
    return None


def _grouped_mm_refusal(kind: ExpertKind, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why `F.grouped_mm` cannot run these experts on this device, or None if it can."""
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
    """Return the backend that `choice` selects for these experts, device and dtype.

    Not traced by torch.compile, because it reads the environment.

    Args:
        choice: `auto`, `triton`, `grouped_mm` or `reference`.
        kind: of the experts.
        device: where they run.
        dtype: of their computation.

    Raises:
        ValueError: if the requested backend cannot run here. `auto` falls back instead, with one warning.
    """
    refusals = {
        "triton": _triton_refusal(kind, device, dtype),
        "grouped_mm": _grouped_mm_refusal(kind, device, dtype),
        "reference": None,
    }
    on_gpu = device.type == "cuda"
    if choice == "auto":
        # Without a GPU the Triton kernels run in the interpreter, which is only for tests.
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
    """Return why experts cannot be computed in e4m3, or None if they can."""
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
    """Return whether a backend reads the experts' loads on the host, so that it cannot be traced."""
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
        weights: (T, K) float32 (float64 if `x` is).
        experts: (T, K) int32 or int64. The id E means "no expert" and adds nothing.
        w1: (E, 2F, D) gate rows then up rows, or (E, F, D) without a gate.
        w2: (E, D, F).
        b1: (E, 2F) or (E, F), or None.
        b2: (E, D) or None.
        activation: one of `GLU_ACTIVATIONS` if gated, else one of `ACTIVATIONS`.
        gated: whether w1 holds a gate.
        backend: from `resolve_backend`, or e4m3 if `e4m3_refusal` returned None.
        limit: clamp of gate and up before the gated unit, or None.
        n_rows: an upper bound on the number of slots with an expert, if the caller knows one below T*K: only so many
            rows are allocated. The caller must not exceed it.
        late: w1, w2, b1, b2 and the adapters were passed through its `weight`; backward defers their gradients to it.
            `reference` computes them immediately, with the same result.
        adapters: low-rank matrices beside w1 and w2.

    Returns:
        (T, D) in the dtype of `x`, accumulated in float32 in the order of j: bitwise deterministic.

    Raises:
        ValueError: if shapes or the activation do not fit, or the backend does not support these experts.
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
        # Depends on every weight: without tokens, this rank's weight gradients must be zeros, not None, as on other
        # ranks.
        of_adapters = [tensor for pair in adapters.pairs for tensor in pair]
        nothing = torch.stack([w[:0].sum() for w in (w1, w2, b1, b2, *of_adapters) if w is not None]).sum()
        return x * weights.sum(1, keepdim=True).to(x.dtype) + nothing.to(x.dtype)
    if backend == "e4m3":
        from llmfoundry.kernels.experts_scaled import experts_ffn_scaled

        return experts_ffn_scaled(
            x, weights, experts, w1, w2, activation=activation, gated=gated, n_rows=n_rows, late=late
        )
    if backend == "triton":
        # imported here because Triton may not be installed
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
    """Compute expert by expert, as in the formula; autograd does the backward. Synchronizes with the host."""

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
