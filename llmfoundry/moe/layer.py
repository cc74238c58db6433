"""The mixture of experts as a feed-forward block: router, exchange, experts, shared expert.

Shapes: B rows, S sequence, T = B*S tokens, D d_model, F ffn hidden size, E experts, K top_k.
Dropless (MegaBlocks, arXiv:2211.15841): every token is processed by all of its experts, however uneven the load.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from llmfoundry.dtensor import local_part
from llmfoundry.kernels.activations import ACTIVATIONS
from llmfoundry.kernels.experts import Backend, ExpertKind, e4m3_refusal, experts_ffn, resolve_backend
from llmfoundry.kernels.late import LateGradients
from llmfoundry.kernels.low_rank import ExpertAdapters, LowRank
from llmfoundry.layers.ffn import Activation, FFNConfig, FFNOutput, GLUConfig, MLPConfig
from llmfoundry.layers.nf4 import NF4Weight
from llmfoundry.moe.all_gather import AllGather
from llmfoundry.moe.all_to_all import AllToAll
from llmfoundry.moe.dispatch import Exchange, ExpertInputs, InFlight, return_rows
from llmfoundry.moe.router import Router, RouterConfig, statistics, within_capacity


class MoEConfig(FFNConfig, RouterConfig, names=("moe",)):
    """A mixture of experts in place of a dense block, with LLM Foundry's keys where it has them.

    `ffn_hidden_size` and `ffn_act_fn` apply to each expert.
    """

    mlp_type: Literal["mlp", "glu"] = "glu"  # type of each expert: with a gate (glu) or without
    # Where the biases are, if `bias` is set. experts: one for each matrix of each expert. output: one vector of d_model
    # per layer, added to the weighted sum, as in MegaBlocks; the expert kernels then run without biases.
    moe_bias: Literal["experts", "output"] = "experts"
    ffn_act_limit: float | None = Field(None, gt=0)  # clamp of gate and up; swiglu_oss defaults to 7
    moe_impl: Literal["auto", "triton", "grouped_mm", "reference"] = "auto"  # auto: the fastest available
    mlp_impl: Literal["grouped", "sparse"] = "grouped"  # LLM Foundry's; accepted, without effect
    # Above 0: an expert processes at most this many times its even share of the slots of one call, in token order, and
    # drops the rest (their weight becomes 0). null or 0: dropless.
    moe_capacity_factor: float | None = Field(None, ge=0)
    moe_loss_weight: float = Field(0.01, ge=0)  # weight of the load-balancing loss
    moe_zloss_weight: float = Field(0.0, ge=0)  # weight of the router's z-loss
    # The tokens over which the load is balanced. global_batch: the gradient does not depend on microbatches or ranks.
    moe_lbl_scope: Literal["microbatch", "global_batch"] = "global_batch"
    # For global_batch with several microbatches, see moe/balance.py. count: an extra forward pass counts the loads
    # first; keep: hold the activations of all microbatches; running: no cost, but the gradient depends on the
    # microbatch size.
    moe_lbl_accumulation: Literal["count", "keep", "running"] = "count"
    moe_lbl_layers: Literal["each", "together"] = "each"  # together: average the loads over layers before the loss
    shared_expert: bool = False  # a dense block beside the routed experts, applied to every token
    shared_expert_hidden_size: int | None = Field(None, ge=1, le=2**28)  # None: ffn_hidden_size
    shared_expert_gate: bool = False  # scale the shared expert by sigmoid(x @ gate), as in Qwen2-MoE
    first_k_dense: int = Field(0, ge=0)  # number of dense layers before the first mixture
    moe_layer_freq: int = Field(1, ge=1)  # after those, every n-th layer is a mixture, starting with the first
    # F of the dense blocks; None: the model's expansion_ratio * d_model
    dense_ffn_hidden_size: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _check_experts(self) -> Self:
        if not self.gated and self.ffn_act_fn.key not in ACTIVATIONS:
            raise ValueError(f"ffn_act_fn.name={self.ffn_act_fn.name} needs mlp_type: glu")
        if not self.gated and self.ffn_act_limit is not None:
            raise ValueError("ffn_act_limit needs mlp_type: glu")
        if not self.shared_expert and (self.shared_expert_gate or self.shared_expert_hidden_size):
            raise ValueError("shared_expert_gate and shared_expert_hidden_size need shared_expert: true")
        return self

    def filled(self, ffn_hidden_size: int, bias: bool) -> Self:
        """Return a copy with the model's values for the keys that the YAML leaves out."""
        copy = super().filled(ffn_hidden_size, bias)
        if copy.dense_ffn_hidden_size is None:
            copy = copy.model_copy(update={"dense_ffn_hidden_size": ffn_hidden_size})
        return copy

    def for_layer(self, index: int) -> FFNConfig:
        """Return the mixture, or a dense block, depending on `first_k_dense` and `moe_layer_freq`."""
        after_dense = index - self.first_k_dense
        if after_dense >= 0 and after_dense % self.moe_layer_freq == 0:
            return self
        return self._dense(self.dense_ffn_hidden_size)

    def n_params(self, d_model: int) -> int:
        """Return the number of parameters in one block."""
        return self._params_met(d_model, self.moe_num_experts)

    @property
    def has_output_bias(self) -> bool:
        """Whether the layer has a single bias of size d_model."""
        return bool(self.bias) and self.moe_bias == "output"

    def n_active_params(self, d_model: int) -> int:
        """Return the number of parameters that one token uses: those of K experts, and all that are not in experts."""
        return self._params_met(d_model, self.moe_top_k)

    def kind(self, d_model: int) -> ExpertKind:
        """Return the kind of experts, for the choice of kernels."""
        return _kind(d_model, self.expert.hidden_size, self.ffn_act_fn.key, bool(self.expert.bias), self.ffn_act_limit)

    def build(self, d_model: int, n_layers: int, layer_index: int) -> MoE:
        """Build the mixture; it is the same in every layer."""
        return MoE(self, d_model)

    @property
    def gated(self) -> bool:
        """Whether experts have a gate."""
        return self.mlp_type == "glu"

    @property
    def expert(self) -> MLPConfig:
        """The config of one expert, as a dense block."""
        return self._dense(self.ffn_hidden_size).model_copy(update={"bias": self.bias and not self.has_output_bias})

    @property
    def shared(self) -> MLPConfig | None:
        """The config of the shared expert; None if there is none."""
        hidden = self.shared_expert_hidden_size or self.ffn_hidden_size
        return self._dense(hidden) if self.shared_expert else None

    def _dense(self, hidden: int | None) -> MLPConfig:
        block = GLUConfig if self.gated else MLPConfig
        return block(ffn_hidden_size=hidden, ffn_act_fn=self.ffn_act_fn, bias=self.bias)

    def _params_met(self, d_model: int, n_experts: int) -> int:
        router = self.moe_num_experts * (d_model + (1 if self.moe_router_bias else 0))
        shared = self.shared.n_params(d_model) if self.shared is not None else 0
        gate = d_model if self.shared_expert_gate else 0
        bias = d_model if self.has_output_bias else 0
        return router + n_experts * self.expert.n_params(d_model) + shared + gate + bias


class MegaBlocksConfig(MoEConfig, names=("mb_dmoe", "torch_dmoe", "mb_moe")):
    """The same mixture with the defaults of MegaBlocks, which LLM Foundry's YAMLs rely on.

    Source: `megablocks.layers.arguments.Arguments`, as LLM Foundry v0.22 fills it in.
    """

    mlp_type: Literal["mlp", "glu"] = "mlp"  # type of each expert: with a gate (glu) or without
    ffn_act_fn: Activation = Activation(name="gelu", approximate="tanh")  # the activation
    moe_bias: Literal["experts", "output"] = "output"
    moe_loss_weight: float = Field(0.1, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_kind(cls, data: Any) -> Any:
        """Set the defaults by type. `mb_moe` drops tokens beyond a capacity factor of 1; the others never drop.

        `torch_dmoe` is LLM Foundry's own: exact GELU, no balance loss, and no biases in the mixture, whatever the model
        has.
        """
        kind = data.get("ffn_type") if isinstance(data, dict) else None
        if kind == "mb_moe":
            return {"moe_capacity_factor": 1.0} | data
        if kind == "torch_dmoe":
            return {"ffn_act_fn": {"name": "gelu"}, "bias": False, "moe_loss_weight": 0.0} | data
        return data


# One object per kind: torch.compile compares constants by identity, and would compile each layer separately.
_kind = cache(ExpertKind)


class Experts(nn.Module):
    """The stacked weights of all experts, and their computation. Under expert parallelism, only this rank's experts."""

    frozen_w1: NF4Weight | None  # replace w1 and w2 with lora.quantize
    frozen_w2: NF4Weight | None
    w1_lora_A: nn.Parameter | None  # (E, r, D); the low-rank adapters of w1 and w2, if the model has them
    w1_lora_B: nn.Parameter | None  # (E, 2F, r)
    w2_lora_A: nn.Parameter | None  # (E, r, F)
    w2_lora_B: nn.Parameter | None  # (E, D, r)

    def __init__(self, config: MoEConfig, d_model: int) -> None:
        super().__init__()
        n_experts, expert = config.moe_num_experts, config.expert
        self.activation, self.gated = config.ffn_act_fn.key, config.gated
        self.limit, self.impl, self.kind = config.ffn_act_limit, config.moe_impl, config.kind(d_model)
        self.e4m3 = False
        self.w1 = nn.Parameter(torch.empty(n_experts, expert.rows, d_model))  # (E, 2F, D): gate, then up rows
        self.w2 = nn.Parameter(torch.empty(n_experts, d_model, expert.hidden_size))  # (E, D, F)
        self.register_module("frozen_w1", None)
        self.register_module("frozen_w2", None)
        self.b1 = nn.Parameter(torch.empty(n_experts, expert.rows)) if expert.bias else None  # (E, 2F)
        self.b2 = nn.Parameter(torch.empty(n_experts, d_model)) if expert.bias else None  # (E, D)
        self.lora_scale, self.lora_dropout, self.lora_off = 0.0, 0.0, False
        for slot in ("w1_lora_A", "w1_lora_B", "w2_lora_A", "w2_lora_B"):  # filled by layers/lora.py
            self.register_parameter(slot, None)

    def set_adapters(self, scale: float, dropout: float) -> None:
        """Enable the adapters, after their slots have been filled."""
        self.lora_scale, self.lora_dropout = scale, dropout
        self.kind = _kind(*self.kind._replace(dropout=dropout > 0))

    def use_e4m3(self) -> str | None:
        """Switch to e4m3, or return why it is not supported."""
        refusal = e4m3_refusal(self.impl, self.kind)
        self.e4m3 = refusal is None
        return refusal

    def backend(self, device: torch.device, dtype: torch.dtype) -> Backend:
        """Return the backend that `moe_impl` selects for this device and dtype."""
        if self.e4m3:
            return "e4m3"
        return resolve_backend(self.impl, self.kind, device, dtype)

    def forward(self, tokens: ExpertInputs | InFlight) -> Tensor:
        """Apply the experts to tokens that are here or in flight; (T, D) or (R, D)."""
        b1, b2, dtype = local_part(self.b1), local_part(self.b2), tokens.x.dtype
        w1 = local_part(self.w1) if self.frozen_w1 is None else self.frozen_w1(dtype)
        w2 = local_part(self.w2) if self.frozen_w2 is None else self.frozen_w2(dtype)
        adapters = ExpertAdapters() if self.lora_off else ExpertAdapters(
            _pair(self.w1_lora_A, self.w1_lora_B), _pair(self.w2_lora_A, self.w2_lora_B),
            self.lora_scale, self.lora_dropout if self.training else 0.0,
        )  # fmt: skip
        late = None
        if isinstance(tokens, InFlight):
            late = LateGradients()
            w1, w2 = late.weight("w1", w1), late.weight("w2", w2)
            b1, b2 = late.weight("b1", b1), late.weight("b2", b2)
            adapters = adapters.deferred(late)
            tokens = tokens.wait()
        return experts_ffn(
            tokens.x, tokens.weights, tokens.experts, w1, w2, b1=b1, b2=b2,
            activation=self.activation, gated=self.gated, limit=self.limit,
            backend=self.backend(tokens.x.device, tokens.x.dtype), n_rows=tokens.n_slots, late=late,
            adapters=adapters,
        )  # fmt: skip


def _pair(a: Tensor | None, b: Tensor | None) -> LowRank | None:
    return None if a is None or b is None else LowRank(local_part(a), local_part(b))


class MoE(nn.Module):
    """A dropless mixture of experts.

    `expert_group` and `gathers` are set from outside, before training. `expert_group` holds the P ranks that share the
    experts; rank r holds the experts from r * E / P on. None: this process holds all experts. `gathers`: exchange
    tokens by all-gather in training, where all ranks have equally many tokens. In evaluation and generation they may
    not, so all-to-all is used.
    """

    def __init__(self, config: MoEConfig, d_model: int) -> None:
        super().__init__()
        self.n_experts = config.moe_num_experts
        self.capacity_factor = config.moe_capacity_factor
        self.router = Router(config, d_model)
        self.experts = Experts(config, d_model)
        self.shared_expert = None if config.shared is None else config.shared.build(d_model, 0, 0)
        self.shared_expert_gate = nn.Linear(d_model, 1, bias=False) if config.shared_expert_gate else None
        self.output_bias = nn.Parameter(torch.empty(d_model)) if config.has_output_bias else None
        self.expert_group: dist.ProcessGroup | None = None
        self.gathers = False

    def forward(self, x: Tensor, keys: Tensor | None = None) -> FFNOutput:
        """Apply its experts to each token.

        Args:
            x: (B, S, D).
            keys: (B,) int64 noise keys of the rows in this layer; needed in training with `moe_jitter_eps`.
        """
        routing = self.router(x, keys)
        weights = routing.weights
        if self.capacity_factor:
            weights = weights * within_capacity(routing.experts, self.n_experts, self.capacity_factor)
        tokens = x.flatten(0, 1)  # (T, D)
        if self.expert_group is None or dist.get_world_size(self.expert_group) == 1:
            y = self.experts(ExpertInputs(tokens, weights, routing.experts))
            shared, stats = self._shared(x), statistics(routing)
        else:
            n_local = self.n_experts // dist.get_world_size(self.expert_group)
            way: type[Exchange] = AllGather if self.gathers and self.training else AllToAll
            exchange = way(tokens, weights, routing.experts, n_local, self.expert_group)
            stats = statistics(routing)  # overlaps with the exchange of counts
            there = exchange.send(tokens, weights)
            shared = self._shared(x)  # overlaps with the transfer of tokens
            y = return_rows(self.experts(there), exchange)
        y = y.view_as(x)
        if self.output_bias is not None:
            y = y + self.output_bias
        return FFNOutput(y if shared is None else y + shared, stats)

    def _shared(self, x: Tensor) -> Tensor | None:
        if self.shared_expert is None:
            return None
        y = self.shared_expert(x).y
        return y if self.shared_expert_gate is None else F.sigmoid(self.shared_expert_gate(x)) * y
