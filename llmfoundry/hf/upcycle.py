"""Turns a dense model into a mixture of experts that initially computes the same function.

Shapes: D d_model, F ffn hidden size, E experts, K top_k, G granularity, f = F / G hidden size of an expert.
Every expert is a copy of the dense block (Komatsuzaki et al. 2022, arXiv:2212.05055) or, with G > 1, one of its G
shards: f of its F hidden units. Expert e is shard e % G of copy e // G. The shards of a copy start with the same router
row, so a token that selects a copy selects all of its shards ("virtual groups", He et al. 2024, arXiv:2410.07524), that
is, K / G whole copies. The routing weights are normalized to sum to 1 and multiplied by G, so that the output equals
that of the dense block. During training the shards' router rows diverge.
Tensors are processed one at a time, so a checkpoint is streamed; only one stack of experts is held in memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from llmfoundry import runtime
from llmfoundry.config import Config, ConfigError, check, dump
from llmfoundry.dtensor import local_shard
from llmfoundry.layers.ffn import MLPConfig
from llmfoundry.model.init import draw_weight
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.moe.layer import MoEConfig

_FFN = re.compile(r"blocks\.(\d+)\.ffn\.(w1|w2)\.(weight|bias)")


class Upcycling(Config):
    """How to upcycle: the mixture's keys in `ffn_config`, and how the copies are perturbed."""

    moe_num_experts: int = Field(ge=2)
    moe_top_k: int = Field(ge=1)
    granularity: int = Field(default=1, ge=1)  # G: the number of experts that each dense block is split into
    first_k_dense: int = Field(default=0, ge=0)  # as in `ffn_config`: these layers stay dense,
    moe_layer_freq: int = Field(default=1, ge=1)  # and of the others, every n-th becomes a mixture
    # Where the factor G is applied: in moe_routed_scaling, or in the experts' w2, for formats without such a scaling
    # (Mixtral, Qwen3-MoE, OLMoE).
    scale_in: Literal["router", "weights"] = "router"
    router_std: float = Field(default=0.02, gt=0)
    # Both make the experts differ from the start, and the model from the dense one. Biases are unchanged.
    noise: float = Field(default=0.0, ge=0)  # standard deviation of added noise, relative to the expert matrix's
    drop: float = Field(default=0.0, ge=0, le=1)  # fraction of an expert's hidden units to redraw (arXiv:2502.19261)

    @model_validator(mode="after")
    def _check_whole_copies(self) -> Self:
        if self.moe_top_k == 1:
            raise ValueError(
                "moe_top_k=1 gives every token one expert with the weight 1, as the dense block needs: the loss gives "
                "the router no gradient and it learns nothing; write moe_top_k=2 or more"
            )
        for key in ("moe_num_experts", "moe_top_k"):
            if getattr(self, key) % self.granularity:
                raise ValueError(
                    f"{key}={getattr(self, key)} is not a multiple of granularity={self.granularity}: a token takes "
                    "whole copies of the dense block"
                )
        return self


def upcycled_config(dense: CausalLMConfig, plan: Upcycling) -> CausalLMConfig:
    """Return the config of the mixture that a dense model is upcycled to.

    Raises:
        ConfigError: if the model is not dense, or the granularity does not divide its hidden size.
    """
    block = _dense_block(dense)
    if block.hidden_size % plan.granularity:
        raise ConfigError(f"granularity={plan.granularity} does not divide the hidden size {block.hidden_size}")
    ffn: dict[str, object] = {
        "ffn_type": "moe",
        "ffn_hidden_size": block.hidden_size // plan.granularity,
        "dense_ffn_hidden_size": block.hidden_size,
        "ffn_act_fn": dump(block.ffn_act_fn),
        "bias": block.bias,
        "mlp_type": "glu" if block.gated else "mlp",
        "moe_num_experts": plan.moe_num_experts,
        "moe_top_k": plan.moe_top_k,
        "moe_normalize_expert_weights": 1.0,
        "moe_routed_scaling": float(plan.granularity) if plan.scale_in == "router" else 1.0,
        "first_k_dense": plan.first_k_dense,
        "moe_layer_freq": plan.moe_layer_freq,
    }
    return check(CausalLMConfig, dump(dense) | {"ffn_config": ffn})


def upcycle(
    weights: Iterable[tuple[str, Tensor]], dense: CausalLMConfig, plan: Upcycling, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield the mixture's weights, made from the dense model's weights one tensor at a time.

    Args:
        weights: names and tensors of the dense model, in any order.
        dense: its config.
        plan: how to upcycle.
        seed: for the routers, the noise and the redrawn units. Each value depends only on the seed and the tensor's
            name.

    Yields:
        Names and tensors of the model that `upcycled_config` describes, in the dtype of the source tensors.
    """
    grown, gated = upcycled_config(dense, plan), _dense_block(dense).gated
    for name, tensor in weights:
        found = _FFN.fullmatch(name)
        if found is None or not isinstance(grown.ffn(int(found[1])), MoEConfig):
            yield name, tensor
            continue
        block, matrix, leaf = f"blocks.{found[1]}.ffn", found[2], found[3]
        if leaf == "weight":
            stacked = f"{block}.experts.{matrix}"
            yield stacked, _experts(tensor, block, stacked, matrix, gated, plan, seed)
        else:
            yield f"{block}.experts.{matrix.replace('w', 'b')}", _biases(tensor, matrix, gated, plan)
        if (matrix, leaf) == ("w1", "weight"):
            router = f"{block}.router.weight"
            yield router, _router(router, tensor, plan, seed)


def _dense_block(dense: CausalLMConfig) -> MLPConfig:
    if dense.name == "transformers":
        raise ConfigError(
            "this model runs as the module of transformers, whose blocks cannot be replaced; models that can be "
            "upcycled: docs/checkpoints.md, Families"
        )
    block = dense.ffn(0)
    if not isinstance(block, MLPConfig):
        raise ConfigError(f"ffn_config.ffn_type={block.ffn_type}: only a dense model can be upcycled")
    return block


def _shards(tensor: Tensor, matrix: str, gated: bool, g: int) -> Tensor:
    """Split w1 (2F, D), b1 (2F,) or w2 (D, F) along the hidden units: (G, 2f, D), (G, 2f) or (G, D, f)."""
    if matrix == "w2":
        return tensor.unflatten(1, (g, -1)).transpose(0, 1)
    halves = 2 if gated else 1  # gate rows, then up rows; each shard gets its part of both
    return tensor.unflatten(0, (halves, g, -1)).transpose(0, 1).flatten(1, 2)


def _experts(tensor: Tensor, block: str, name: str, matrix: str, gated: bool, plan: Upcycling, seed: int) -> Tensor:
    """Return the stacked weight of all experts: (E, 2f, D) or (E, D, f)."""
    g = plan.granularity
    shards = _shards(tensor, matrix, gated, g)
    if matrix == "w2" and plan.scale_in == "weights":
        shards = shards * g
    experts = shards.repeat(plan.moe_num_experts // g, 1, 1)
    for e, expert in enumerate(experts):
        if plan.drop:
            # Unit indices are drawn by the block's name: gate, up and w2 are processed separately but must agree.
            hidden = expert.shape[1] if matrix == "w2" else expert.shape[0] // (2 if gated else 1)
            order = torch.randperm(hidden, generator=runtime.generator("cpu", seed, block, "drop", e))
            dice = runtime.generator("cpu", seed, name, "drop", e)
            for part in expert.T[None] if matrix == "w2" else expert.unflatten(0, (-1, hidden)):
                _draw_anew(part, order[: round(plan.drop * hidden)], dice)
        if plan.noise:
            dice = runtime.generator("cpu", seed, name, "noise", e)
            drawn = torch.randn(expert.shape, generator=dice) * (plan.noise * expert.float().std(correction=0))
            expert.add_(drawn.to(expert.dtype))
    return experts


def _draw_anew(units_first: Tensor, units: Tensor, dice: torch.Generator) -> None:
    """Replace some rows by normal values of the same mean and standard deviation, in place."""
    if len(units) == 0:
        return
    old = units_first[units].float()
    drawn = torch.randn(old.shape, generator=dice) * old.std(correction=0) + old.mean()
    units_first[units] = drawn.to(units_first.dtype)


def _biases(tensor: Tensor, matrix: str, gated: bool, plan: Upcycling) -> Tensor:
    """Return the stacked bias of all experts: (E, 2f) or (E, D). The G shards of a copy each add b2 / G."""
    g, copies = plan.granularity, plan.moe_num_experts // plan.granularity
    if matrix == "w1":
        return _shards(tensor, matrix, gated, g).repeat(copies, 1)
    part = tensor if plan.scale_in == "weights" else tensor / g
    return part.expand(plan.moe_num_experts, -1).clone()


def _router(name: str, like: Tensor, plan: Upcycling, seed: int) -> Tensor:
    """Return router weights (E, D) in the dtype of `like` (2F, D): normal, the same row for all shards of a copy."""
    copies = torch.empty(plan.moe_num_experts // plan.granularity, like.shape[1])
    with ThreadPoolExecutor(1) as threads:
        draw_weight(local_shard(copies), plan.router_std, False, seed, name, threads)
    return copies.repeat_interleave(plan.granularity, dim=0).to(like.dtype)
