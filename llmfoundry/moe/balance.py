"""Keeping experts busy: balance losses, the loss-free bias, and what a monitor shows.

Shapes: L MoE layers, E experts, K top_k. Functions of `RouterStats` stacked over layers, which are sums over
tokens: those of microbatches and of ranks add up first.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from llmfoundry.layers.ffn import FFNConfig, RouterStats
from llmfoundry.moe.layer import MoEConfig
from llmfoundry.moe.router import Router


class _Layers(Protocol):
    """What `Balance.of` asks of a model's config."""

    @property
    def n_layers(self) -> int: ...

    def ffn(self, layer: int) -> FFNConfig: ...


class Balance(NamedTuple):
    """How a model's experts are kept busy."""

    top_k: int
    loss_weight: float
    z_loss_weight: float
    scope: Literal["microbatch", "global_batch"]
    bias_update_rate: float
    together: bool = False  # all layers balanced as one

    @classmethod
    def of(cls, model: _Layers) -> Self | None:
        """As the config of a model says; None if none of its layers is a mixture."""
        for layer in range(model.n_layers):
            ffn = model.ffn(layer)
            if isinstance(ffn, MoEConfig):
                return cls(
                    top_k=ffn.moe_top_k,
                    loss_weight=ffn.moe_loss_weight,
                    z_loss_weight=ffn.moe_zloss_weight,
                    scope=ffn.moe_lbl_scope,
                    bias_update_rate=ffn.moe_bias_update_rate or 0.0,
                    together=ffn.moe_lbl_layers == "together",
                )
        return None


def load_balance_loss(
    score_sum: Tensor, load: Tensor, tokens: Tensor | int, top_k: int, together: bool = False
) -> Tensor:
    """The Switch load-balancing loss, mean over layers, summed over the tokens of `score_sum`.

    `E * sum_i f_i P_i` a token, 1 when all is even: f_i is the share of slots that expert i got, P_i its mean
    score. Divide by the tokens of the global batch; the parts of microbatches and ranks then add up.

    Args:
        score_sum: (L, E) sum of the scores over some tokens; the gradient goes through it.
        load: (L, E) slots an expert got, over the same tokens or over more, as a whole global batch.
        tokens: how many tokens `load` counts.
        top_k: K.
        together: f and P are means over layers, and there is one product, as in `transformers` (whose loss is
            K times this one). Layers whose loads differ can then make up for each other.

    Returns:
        () float32.

    Source: Fedus et al. 2021, arXiv:2101.03961; over the global batch: Qiu et al., arXiv:2501.11873.
    """
    if together:
        score_sum, load = score_sum.mean(0, keepdim=True), load.mean(0, keepdim=True)  # (1, E)
    share = load / (tokens * top_k)  # (L, E), f
    return score_sum.shape[1] * (share * score_sum).sum(1).mean()


def z_loss(z_sum: Tensor) -> Tensor:
    """The router's z-loss `logsumexp(logits)^2`, mean over layers, summed over tokens: (L,) -> ().

    Source: Zoph et al. 2022, arXiv:2202.08906.
    """
    return z_sum.mean()


def updated_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """The bias for the next step: up by `rate` where an expert got less than the mean load, down where more.

    Args:
        bias: (E,). load: (E,) slots over the global batch.

    Source: Wang et al. 2024, arXiv:2408.15664.
    """
    return bias + rate * torch.sign(load.mean() - load).to(bias.dtype)


@torch.no_grad()
def update_expert_bias(model: nn.Module, load: Tensor, balance: Balance) -> None:
    """Move the bias of every router, in place: once a step, from the loads of the global batch.

    Args:
        model: its MoE layers, in order, are those of `load`.
        load: (L, E) slots over the global batch, the same on every rank.
    """
    if not balance.bias_update_rate:
        return
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router, of_layer in zip(routers, load, strict=True):
        if router.expert_bias is not None:
            router.expert_bias.copy_(updated_bias(router.expert_bias, of_layer, balance.bias_update_rate))


def summary(stats: RouterStats, tokens: int, balance: Balance) -> dict[str, float | list[float]]:
    """What a step's metrics show of routing. Reads the device once.

    Args:
        stats: (L, E), (L, E), (L,), (L,) sums over `tokens` tokens.

    Returns:
        `moe/load_balance_loss` and `moe/z_loss` (unweighted, a token, mean over layers),
        `moe/router_entropy` (nats a token, mean over layers), `moe/max_load` and `moe/min_load` (the busiest
        and the idlest expert of any layer over the mean one), `moe/load` (each expert's share of the slots,
        mean over layers).
    """
    load, score_sum, z_sum, entropy_sum = (part.detach().double() for part in stats)
    share = load / (tokens * balance.top_k)  # (L, E)
    shown = torch.stack(
        [
            load_balance_loss(score_sum, load, tokens, balance.top_k, balance.together) / tokens,
            z_loss(z_sum) / tokens,
            entropy_sum.mean() / tokens,
            share.max() * share.shape[1],
            share.min() * share.shape[1],
        ]
    )
    values = torch.cat([shown, share.mean(0)]).tolist()
    names = ("moe/load_balance_loss", "moe/z_loss", "moe/router_entropy", "moe/max_load", "moe/min_load")
    metrics: dict[str, float | list[float]] = dict(zip(names, values[: len(names)], strict=True))
    return metrics | {"moe/load": [round(value, 6) for value in values[len(names) :]]}
