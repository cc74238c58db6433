"""The router: selects the experts of each token, and their weights.

Shapes: B rows, S sequence, T = B*S tokens, D d_model, E experts, K top_k.
A pure function of its input: it keeps no counts and no losses. Its output contains what the balance losses and monitors
need. It computes in float32 (float64 for float64 input), because bf16 scores often tie, and near-ties flip.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Self, cast

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from llmfoundry.config import Config
from llmfoundry.kernels.activations import accumulation_dtype
from llmfoundry.kernels.top_k import top_k_ids
from llmfoundry.layers.exact import ExactBuffers
from llmfoundry.layers.ffn import RouterStats

_COUNTERS = 64  # number of rows in which `statistics` counts


class RouterOutput(NamedTuple):
    """The routing of T tokens to K of E experts."""

    weights: Tensor  # (T, K) float32, the factor on each expert's output
    experts: Tensor  # (T, K) int64, expert ids, distinct per token, best first
    scores: Tensor  # (T, E) float32, each in (0, 1)
    logits: Tensor  # (T, E) float32


class RouterConfig(Config):
    """The router's keys in `ffn_config`; LLM Foundry's names where it has them."""

    moe_num_experts: int = Field(ge=1, le=2**16)  # number of routed experts per layer
    moe_top_k: int = Field(1, ge=1)  # number of experts per token
    moe_score_fn: Literal["softmax", "sigmoid"] = "softmax"  # maps the router's logits to scores
    # Divide a token's weights by their p-norm: 1 makes them sum to 1 (Mixtral), null leaves them unchanged (OLMoE).
    moe_normalize_expert_weights: float | None = Field(None, gt=0)
    moe_routed_scaling: float = Field(1.0, gt=0)  # factor on the weights, applied last
    moe_jitter_eps: float | None = Field(None, gt=0, lt=1)  # in training: router input times U(1 - eps, 1 + eps)
    # Loss-free balancing: experts are chosen by score + bias, and each step moves the bias by this much towards an even
    # load. null: no bias; 0: a constant bias (of a finished model).
    moe_bias_update_rate: float | None = Field(None, ge=0)
    moe_n_groups: int = Field(1, ge=1)  # number of groups that the experts are divided into
    moe_topk_groups: int | None = Field(None, ge=1)  # a token only uses experts of this many best groups; null: all
    moe_router_bias: bool = False  # a learned bias on the logits (gpt-oss)
    uniform_expert_assignment: bool = False  # for benchmarks only: assign experts in turn, whatever the scores

    @model_validator(mode="after")
    def _check_router(self) -> Self:
        n_experts, top_k, n_groups = self.moe_num_experts, self.moe_top_k, self.moe_n_groups
        if top_k > n_experts:
            raise ValueError(f"moe_top_k={top_k} exceeds moe_num_experts={n_experts}; lower moe_top_k or add experts")
        if n_experts % n_groups:
            raise ValueError(f"moe_num_experts={n_experts} does not divide into moe_n_groups={n_groups}")
        topk_groups = n_groups if self.moe_topk_groups is None else self.moe_topk_groups
        if topk_groups > n_groups:
            raise ValueError(f"moe_topk_groups={topk_groups} exceeds moe_n_groups={n_groups}")
        if topk_groups * (n_experts // n_groups) < top_k:
            raise ValueError(
                f"moe_topk_groups={topk_groups} groups of {n_experts // n_groups} hold fewer than "
                f"moe_top_k={top_k} experts; raise moe_topk_groups"
            )
        return self

    def check_trainable(self) -> None:
        """Check that training can change the router; a finished model with such a router can still be used.

        Raises:
            ValueError: if every weight is 1, whatever the scores.
        """
        norm = self.moe_normalize_expert_weights
        if self.moe_top_k == 1 and self.moe_num_experts > 1 and norm is not None:
            raise ValueError(
                f"moe_normalize_expert_weights={norm:g} with moe_top_k=1 makes every weight 1, so that the loss gives "
                "the router no gradient and it learns nothing; write moe_normalize_expert_weights: null, or moe_top_k: "
                "2 or more"
            )


class Router(ExactBuffers):
    """Token-choice top-k routing (Shazeer et al. 2017, arXiv:1701.06538)."""

    def __init__(self, config: RouterConfig, d_model: int) -> None:
        super().__init__()
        self.config = config
        n_experts = config.moe_num_experts
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))  # (E, D)
        self.bias = nn.Parameter(torch.empty(n_experts)) if config.moe_router_bias else None  # (E,)
        self.expert_bias: Tensor | None  # (E,) not a parameter: `update_expert_bias` updates it
        has_expert_bias = config.moe_bias_update_rate is not None
        self.register_buffer("expert_bias", torch.zeros(n_experts) if has_expert_bias else None)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> RouterOutput:
        """Route tokens.

        Args:
            x: (B, S, D) any float dtype.
            keys: (B,) int64 noise keys of the rows in this layer (`layer_keys`), only used by jitter.

        Raises:
            ValueError: if jitter is used in training without keys.
        """
        config = self.config
        if self.training and config.moe_jitter_eps is not None:
            if keys is None:
                raise ValueError("moe_jitter_eps draws its noise from `keys`: hand them to the model's forward")
            x = x * _jitter(x, keys, config.moe_jitter_eps)
        logits = router_logits(x.flatten(0, 1), self.weight, self.bias)  # (T, E)
        scores = logits.softmax(-1) if config.moe_score_fn == "softmax" else logits.sigmoid()
        experts = self._choose(scores.detach())  # (T, K)
        weights = scores.gather(1, experts)  # (T, K)
        if config.uniform_expert_assignment:  # as in MegaBlocks: assign experts in turn, with the weights of the best
            slots = torch.arange(experts.numel(), device=experts.device)
            experts = (slots % config.moe_num_experts).view_as(experts)
        if config.moe_normalize_expert_weights is not None:
            norm = torch.linalg.vector_norm(weights, config.moe_normalize_expert_weights, -1, keepdim=True)
            weights = weights / (norm + 1e-20)
        if config.moe_routed_scaling != 1.0:
            weights = weights * config.moe_routed_scaling
        return RouterOutput(weights, experts, scores, logits)

    def _choose(self, scores: Tensor) -> Tensor:
        """Choose experts: (T, E) scores -> (T, K) expert ids."""
        config = self.config
        if self.expert_bias is not None:
            # The bias only affects the choice, not the weights, so it needs no gradient (arXiv:2408.15664).
            scores = scores + self.expert_bias.to(scores.dtype)
        n_groups, topk_groups = config.moe_n_groups, config.moe_topk_groups
        if topk_groups is not None and topk_groups < n_groups:
            scores = _mask_groups(scores, n_groups, topk_groups, config.moe_score_fn)
        return top_k_ids(scores, config.moe_top_k)


def _mask_groups(scores: Tensor, n_groups: int, topk_groups: int, score_fn: str) -> Tensor:
    """Return scores with -inf outside each token's best groups; expert i is in group i // (E / groups).

    A group is ranked by its two best experts under sigmoid (DeepSeek-V3, arXiv:2412.19437), and by its best one under
    softmax (DeepSeek-V2, arXiv:2405.04434).
    """
    grouped = scores.view(scores.shape[0], n_groups, -1)  # (T, groups, E / groups)
    counted = min(2 if score_fn == "sigmoid" else 1, grouped.shape[2])
    by_group = grouped.topk(counted, dim=-1).values.sum(-1)  # (T, groups)
    kept = torch.zeros_like(by_group, dtype=torch.bool)
    kept = kept.scatter(1, top_k_ids(by_group, topk_groups), True)
    return grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(1)


def within_capacity(experts: Tensor, n_experts: int, factor: float) -> Tensor:
    """Return which slots fit an expert's capacity: its first `int(factor * T * K / E)`, in token order.

    Args:
        experts: (T, K) ids.
        n_experts: E.
        factor: the capacity factor.

    Returns:
        (T, K) bool.

    Source: Switch Transformer, Fedus et al. 2021, arXiv:2101.03961.
    """
    slots = experts.reshape(-1)
    by_expert, order = slots.sort(stable=True)
    first = torch.searchsorted(by_expert, torch.arange(n_experts, device=slots.device, dtype=slots.dtype))
    place = torch.empty_like(slots)
    place[order] = torch.arange(slots.numel(), device=slots.device, dtype=slots.dtype) - first[by_expert].to(
        slots.dtype
    )
    return (place < int(factor * slots.numel() / n_experts)).view_as(experts)


def statistics(routing: RouterOutput) -> RouterStats:
    """Compute the sums over tokens for balance losses and monitors."""
    scores, n_experts = routing.scores, routing.scores.shape[1]
    log_sum = routing.logits.logsumexp(-1)  # (T,)
    share = scores / scores.sum(-1, keepdim=True)  # sigmoid scores do not sum to 1
    chosen = routing.experts.reshape(-1)
    # Integer atomics are deterministic, because the order of the sum does not matter. A GPU serializes those on one
    # address (40 ns each on an H100), so neighboring slots count in different rows.
    at = torch.arange(chosen.numel(), device=chosen.device) % _COUNTERS * n_experts + chosen
    load = torch.zeros(_COUNTERS * n_experts, dtype=torch.int32, device=chosen.device)
    load.scatter_add_(0, at, torch.ones_like(at, dtype=torch.int32))
    return RouterStats(
        load=load.view(_COUNTERS, n_experts).sum(0).to(scores.dtype),
        score_sum=share.sum(0),
        z_sum=log_sum.square().sum(),
        entropy_sum=torch.special.entr(share.detach()).sum(),
    )


def router_logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `x @ weight.T + bias` in float32 (float64 for float64 `x`): (T, D), (E, D), (E,) -> (T, E)."""
    dtype = accumulation_dtype(x.dtype)
    if x.dtype == dtype:
        return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
    logits = cast(Tensor, _UpcastLinear.apply(x, weight))
    return logits if bias is None else logits + bias.to(dtype)


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]


class _UpcastLinear(torch.autograd.Function):
    """A float32 product of a bf16 input. It saves the bf16 input instead of a float32 copy of twice the size."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        if x.is_cuda and weight.dtype == x.dtype:
            # bf16 products are exact in float32, so this is the float32 product, without copies.
            return torch.mm(x, weight.t(), out_dtype=torch.float32)
        return x.float() @ weight.float().t()

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        (x, weight), (need_x, need_weight) = ctx.saved_tensors, ctx.needs_input_grad
        dx = dweight = None
        if grad.is_cuda and weight.dtype == x.dtype:
            # Split the float32 gradient into two bf16 numbers (16 bits of its mantissa), for the bf16 tensor cores.
            high = grad.to(x.dtype)
            parts = torch.cat([high, (grad - high).to(x.dtype)], dim=1)  # (T, 2E)
            if need_x:
                dx = parts @ weight.repeat(2, 1)
            if need_weight:  # not for a frozen router
                dweight = torch.mm(parts.t(), x, out_dtype=torch.float32).view(2, *weight.shape).sum(0)
        else:
            if need_x:
                dx = (grad @ weight.float()).to(x.dtype)
            if need_weight:
                dweight = grad.t() @ x.float()
        return dx, None if dweight is None else dweight.to(weight.dtype)


def layer_keys(keys: Tensor, layer: int) -> Tensor:
    """Return the noise keys of rows, (B,) int64, in one layer. Computed outside the blocks, which share a graph."""
    return keys + ((layer + 1) * 0x632BE59BD9B4E019) % 2**63


def _jitter(x: Tensor, keys: Tensor, eps: float) -> Tensor:
    """Return (B, S, D) factors in [1 - eps, 1 + eps) in the dtype of `x`: a hash of (key, position, channel).

    Without a generator, they are the same on every mesh, for every microbatch, and in recomputation.
    """
    position = torch.arange(x.shape[1], device=x.device)
    channel = torch.arange(x.shape[2], device=x.device)
    row = _mix64(keys.to(x.device))  # (B,)
    token = _mix64(row.unsqueeze(1) + position).int()  # (B, S), the low 32 bits
    bits = token.unsqueeze(2) ^ _mix64(~channel).int()  # (B, S, D)
    # The finalizer of murmur3; its constants are written as the int32 values that they wrap to.
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * -2048144789
    bits = (bits ^ ((bits >> 13) & 0x7FFFF)) * -1028477387
    bits = bits ^ ((bits >> 16) & 0xFFFF)
    uniform = (bits & 0xFFFFFF).to(accumulation_dtype(x.dtype)) / 2**24  # [0, 1)
    return (1 - eps + 2 * eps * uniform).to(x.dtype)


def _mix64(value: Tensor) -> Tensor:
    """The finalizer of splitmix64 on int64, with wraparound; its constants are written as they wrap."""
    value = (value ^ ((value >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    value = (value ^ ((value >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return value ^ ((value >> 31) & 0x1FFFFFFFF)
