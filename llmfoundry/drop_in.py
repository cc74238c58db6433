"""Our experts in any MoE model of `transformers`: importing this module registers them.

    import llmfoundry.drop_in
    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-30B-A3B", experts_implementation="llmfoundry")

Router, attention, loss, trainer (HF Trainer, TRL, axolotl) and checkpoints stay those of the model; the experts'
forward and backward are ours, as with `moe_impl: auto` in a YAML. `llmfoundry_triton`, `llmfoundry_grouped_mm` and
`llmfoundry_reference` select one backend. `DistributedConfig(ep_implementation="llmfoundry")` uses our exchange, which
sends a token once to each rank that holds any of its experts; that of `transformers` sends it once per expert.

Shapes: T tokens, D hidden size, F intermediate size, E experts, K experts per token.

The kind of gated unit is recognised by its values, not by its name: `_apply_gate` and `act_fn` are run on a small
probe and compared with each unit that our kernels know. Experts that match no unit, or that have a norm after the
down projection, run through transformers' `grouped_mm`, with one warning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from llmfoundry.kernels.activations import ACTIVATIONS, GLU_ACTIVATIONS, glu
from llmfoundry.kernels.experts import Backend, ExpertKind, experts_ffn, resolve_backend
from llmfoundry.moe.all_to_all import AllToAll
from llmfoundry.moe.dispatch import return_rows

log = logging.getLogger(__name__)

NAME = "llmfoundry"
_KIND = "_llmfoundry_kind"  # the attribute of an experts module that stores what was recognized
BACKENDS = ("auto", "triton", "grouped_mm", "reference")
# The probe goes beyond every clamp in use (gpt-oss 7, DeepSeek-V4 10) on both sides, for gate and up independently.
_PROBE = torch.linspace(-12.0, 12.0, 24, dtype=torch.float64)


class TheirExperts(Protocol):
    """An experts module of `transformers`, as `use_experts_implementation` prepares it."""

    has_gate: bool
    has_bias: bool
    is_transposed: bool
    down_proj: Tensor
    down_proj_bias: Tensor
    act_fn: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]


class Gate(NamedTuple):
    """The computation between the two products, as arguments of `experts_ffn`."""

    activation: str
    gated: bool
    limit: float | None


def experts_forward(
    self: TheirExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *, backend: str = "auto"
) -> Tensor:
    """Run an experts module of `transformers` with this package's kernels; `ExpertsInterface` calls it as the forward.

    Args:
        self: the experts module: `gate_up_proj` or `up_proj`, `down_proj`, perhaps their biases, in any of the
            layouts that `use_experts_implementation` describes.
        hidden_states: (T, D) any float dtype.
        top_k_index: (T, K) expert ids; the number of this rank's experts, or more, means "not on this rank".
        top_k_weights: (T, K) routing weights.
        backend: one of `BACKENDS`.

    Returns:
        (T, D) in the dtype of `hidden_states`. Under autocast the products are computed in its dtype, as for
        `nn.Linear`; otherwise in the weights'.
    """
    name = _recognised(self)
    if name is None:
        return cast(Tensor, ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights))
    w1, b1 = _up(self)
    w2 = self.down_proj.transpose(1, 2) if self.is_transposed else self.down_proj  # (E, D, F)
    b2 = self.down_proj_bias if self.has_bias else None  # (E, D)
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else w2.dtype
    x, w1, w2 = (t.to(dtype) for t in (hidden_states, w1, w2))
    b1, b2 = (None if t is None else t.to(dtype) for t in (b1, b2))
    kind = _KINDS[name]
    y = experts_ffn(
        x, top_k_weights.to(torch.promote_types(top_k_weights.dtype, torch.float32)),
        top_k_index.clamp(max=w2.shape[0]), w1, w2, b1=b1, b2=b2, activation=kind.activation, gated=self.has_gate,
        limit=kind.limit, backend=_backend(backend, name, hidden_states.device, dtype),
    )  # fmt: skip
    return y.to(hidden_states.dtype)


def _up(experts: TheirExperts) -> tuple[Tensor, Tensor | None]:
    """w1 (E, 2F, D) or (E, F, D), gate rows first, and its bias."""
    name = "gate_up_proj" if experts.has_gate else "up_proj"
    w1 = getattr(experts, name)
    b1 = getattr(experts, f"{name}_bias") if experts.has_bias else None
    if experts.is_transposed:
        w1 = w1.transpose(1, 2)
    if experts.has_gate and not _concatenated(experts):  # gate and up rows alternate
        w1 = torch.cat([w1[:, ::2], w1[:, 1::2]], dim=1)
        b1 = None if b1 is None else torch.cat([b1[:, ::2], b1[:, 1::2]], dim=1)
    return w1, b1


def _concatenated(experts: TheirExperts) -> bool:
    return getattr(experts, "is_concatenated", True)  # an attribute since transformers 5.3


def prepare(model: nn.Module) -> None:
    """Recognise the experts of a model now instead of at its first forward.

    Needed before `torch.compile(model, fullgraph=True)`. Without `fullgraph`, the first call breaks the graph there and
    the second call compiles all of it.
    """
    for module in model.modules():
        if hasattr(module, "has_gate") and hasattr(module, "down_proj"):
            _recognise(cast(TheirExperts, module))


def kind_of(experts: TheirExperts) -> ExpertKind | None:
    """Return what an experts module computes as arguments of `experts_ffn`; None if `experts_ffn` cannot compute it."""
    name = _recognised(experts)
    return None if name is None else _KINDS[name]


def _recognised(experts: TheirExperts) -> str | None:
    # A module that was pickled whole may have the name of a kind that this process does not know.
    if getattr(experts, _KIND, "") not in _KINDS and getattr(experts, _KIND, "") is not None:
        _recognise(experts)
    return cast(str | None, getattr(experts, _KIND))


# Modules keep the name of their kind: torch.compile makes the numbers of a tuple that it meets on a module symbols.
_KINDS: dict[str, ExpertKind] = {}


@torch.compiler.assume_constant_result
def _backend(choice: str, name: str, device: torch.device, dtype: torch.dtype) -> Backend:
    return resolve_backend(choice, _KINDS[name], device, dtype)


@torch.compiler.disable
def _recognise(experts: TheirExperts) -> None:
    unit = None if getattr(experts, "has_post_expert_norm", False) else _match(experts)
    if unit is None:
        _say_once(
            f"{type(experts).__name__}: its activation, or a norm after its experts, is not supported by "
            "llmfoundry's kernels; it runs through transformers' grouped_mm"
        )
        setattr(experts, _KIND, None)
        return
    shape = experts.down_proj.shape
    d_model, hidden = (shape[2], shape[1]) if experts.is_transposed else (shape[1], shape[2])
    kind = ExpertKind(d_model, hidden, unit.activation, bool(experts.has_bias), unit.limit)
    _KINDS[repr(kind)] = kind
    setattr(experts, _KIND, repr(kind))


@torch.no_grad()
def _match(experts: TheirExperts) -> Gate | None:
    if not experts.has_gate:
        found = experts.act_fn(_PROBE.clone())
        names = (name for name, act in ACTIVATIONS.items() if _same(act(_PROBE), found))
        return next((Gate(name, False, None) for name in names), None)
    gate, up = torch.meshgrid(_PROBE, _PROBE, indexing="ij")
    h = torch.cat([gate, up], dim=1)  # (24, 48): gate and up of every pair
    theirs = h if _concatenated(experts) else torch.stack([gate, up], dim=2).flatten(1)
    found = experts._apply_gate(theirs)
    limits = {getattr(experts, name, None) for name in ("limit", "swiglu_limit")} | {None}
    for activation in GLU_ACTIVATIONS:
        for limit in limits:
            if (limit is None or isinstance(limit, int | float)) and _same(glu(h, activation, limit), found):
                return Gate(activation, True, limit)
    return None


def _same(ours: Tensor, theirs: Tensor) -> bool:
    # A unit that computes in float32 internally (Beam) matches as well, because this package does the same.
    return theirs.shape == ours.shape and torch.allclose(ours, theirs.to(ours.dtype), rtol=1e-5, atol=1e-6)


@cache
def _say_once(message: str) -> None:
    log.warning(message)


def _register() -> None:
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    for backend in BACKENDS[1:]:
        ALL_EXPERTS_FUNCTIONS.register(f"{NAME}_{backend}", partial(experts_forward, backend=backend))
    try:
        from transformers.distributed.expert_parallel import EPImplementationInterface
    except ImportError:  # before transformers 5.2x, the exchange cannot be chosen
        return
    EPImplementationInterface.register(NAME, _ep_implementation())


def _ep_implementation() -> type:
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from transformers.distributed.expert_parallel import EPImplementation

    class ExchangeEP(EPImplementation):
        """Expert parallelism by our exchange.

        A token travels once to each rank that holds any of its experts, and returns as one row, already weighted and
        summed.
        """

        def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            inputs, n_tokens, d = (hidden_states, top_k_index, top_k_weights), *hidden_states.shape
            if self.tp_mesh.size() > 1:  # ranks of one TP group share a batch: each sends its own slice of it
                hidden_states, top_k_index, top_k_weights = (
                    DTensor.from_local(t, self.tp_mesh, [Replicate()], run_check=False)
                    .redistribute(self.tp_mesh, [Shard(0)])
                    .to_local()
                    for t in inputs
                )
            n_local = cast(int, self.num_local_experts)
            weights = top_k_weights.to(torch.promote_types(top_k_weights.dtype, torch.float32))
            exchange = AllToAll(hidden_states, weights, top_k_index, n_local, self.ep_mesh.get_group())
            there = exchange.send(hidden_states.contiguous(), weights).wait()
            y = return_rows(self.experts_forward(there.x, there.experts, there.weights), exchange)
            if self.tp_mesh.size() == 1:
                return y
            shape = torch.Size((n_tokens, d))
            return DTensor.from_local(
                y.contiguous(), self.tp_mesh, [Shard(0)], shape=shape, stride=(d, 1)
            ).full_tensor()

    return ExchangeEP


_register()
