"""Expert load balancing: the auxiliary losses, the loss-free bias, and the routing metrics.

Shapes: L MoE layers, E experts, K top_k. All functions work on `RouterStats` stacked over layers. These are sums over
tokens, so the sums of several microbatches and ranks are added first.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from llmfoundry.layers.ffn import FFNConfig, RouterStats
from llmfoundry.moe.layer import MoEConfig
from llmfoundry.moe.router import Router


class _Layers(Protocol):
    """What `Balance.of` needs from a model's config."""

    @property
    def n_layers(self) -> int: ...

    def ffn(self, layer: int) -> FFNConfig: ...


class Balance(NamedTuple):
    """How the load of a model's experts is balanced.

    The balance loss multiplies each expert's mean score P, which has a gradient, by its share f of the slots, which has
    none. `scope` selects the tokens over which f is computed. `global_batch`: all tokens of the step, on all ranks. The
    gradient is then that of the loss of the whole batch, whatever the microbatch size and the number of ranks; sharing
    the loads costs one all-reduce of (L, E) per step. With one microbatch, the loads are known after its forward. With
    several, all microbatches must be routed before the first backward, and `accumulation` says how:

    - `count`: a forward without gradient counts the loads of all microbatches but the first. It needs no memory. With n
      microbatches it costs (n - 1) / n of a forward pass, without the head.
    - `keep`: all forwards run before the first backward, so nothing is computed twice, but the activations of all
      microbatches are held at once. With `recompute: full` that is one input per block and microbatch.
    - `running`: f is computed over the microbatches so far, on all ranks (Qiu et al. 2025, arXiv:2501.11873). It costs
      one all-reduce per microbatch and nothing else, but the gradient then depends on the microbatch size.

    The first two give the same gradient. `microbatch` computes f over the tokens of one microbatch on one rank, as
    MegaBlocks does: the gradient depends on the microbatch size and on the number of ranks.
    """

    top_k: int
    loss_weight: float
    z_loss_weight: float
    scope: Literal["microbatch", "global_batch"]
    accumulation: Literal["count", "keep", "running"]
    bias_update_rate: float
    together: bool = False  # compute f and P as means over layers

    @property
    def counts_ahead(self) -> bool:
        """Whether several microbatches need an extra forward without gradient."""
        return self.scope == "global_batch" and self.accumulation == "count"

    @classmethod
    def of(cls, model: _Layers) -> Self | None:
        """Return the settings of a model's config; None for a dense model."""
        for layer in range(model.n_layers):
            ffn = model.ffn(layer)
            if isinstance(ffn, MoEConfig):
                return cls(
                    top_k=ffn.moe_top_k,
                    loss_weight=ffn.moe_loss_weight,
                    z_loss_weight=ffn.moe_zloss_weight,
                    scope=ffn.moe_lbl_scope,
                    accumulation=ffn.moe_lbl_accumulation,
                    bias_update_rate=ffn.moe_bias_update_rate or 0.0,
                    together=ffn.moe_lbl_layers == "together",
                )
        return None


def load_balance_loss(score_sum: Tensor, load: Tensor, together: bool = False) -> Tensor:
    """Compute the Switch load-balancing loss, averaged over layers and summed over the tokens of `score_sum`.

    Per token it is `E * sum_i f_i P_i`, which is 1 if the load is even: f_i is the share of all slots that went to
    expert i, and P_i its mean score. Divide by the tokens of the global batch; then the losses of microbatches and
    ranks add up to the loss of the whole batch.

    Args:
        score_sum: (L, E) sum of the scores over some tokens, with gradient.
        load: (L, E) slots per expert, over the same tokens or over more, such as the global batch.
        together: average f and P over layers, and multiply once, as `transformers` does (its loss is K times this one).
            Layers with different loads can then offset each other.

    Returns:
        () float32.

    Source: Fedus et al. 2021, arXiv:2101.03961; over the global batch: Qiu et al. 2025, arXiv:2501.11873.
    """
    if together:
        score_sum, load = score_sum.mean(0, keepdim=True), load.mean(0, keepdim=True)  # (1, E)
    share = load / load.sum(1, keepdim=True).clamp(min=1)  # (L, E), f: every token has K slots; 0 without tokens
    return score_sum.shape[1] * (share * score_sum).sum(1).mean()


def z_loss(z_sum: Tensor) -> Tensor:
    """Compute the router z-loss `logsumexp(logits)^2`, averaged over layers and summed over tokens: (L,) -> ().

    Source: Zoph et al. 2022, arXiv:2202.08906.
    """
    return z_sum.mean()


def updated_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """Return the bias of the next step: `rate` higher for experts below the mean load, `rate` lower for those above.

    Args:
        bias: (E,).
        load: (E,) slots over the global batch.
        rate: the step size of the bias.

    Source: Wang et al. 2024, arXiv:2408.15664.
    """
    return bias + rate * torch.sign(load.mean() - load).to(bias.dtype)


@torch.no_grad()
def update_expert_bias(model: nn.Module, load: Tensor, balance: Balance, updated: Tensor | None = None) -> None:
    """Update the bias of every router in place, once per step, from the loads of the global batch.

    Args:
        model: the model; its MoE layers are in the order of `load`.
        load: (L, E) slots over the global batch, the same on every rank.
        balance: contains the update rate.
        updated: () bool, False leaves biases unchanged; None: True.
    """
    if not balance.bias_update_rate:
        return
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router, of_layer in zip(routers, load, strict=True):
        if router.expert_bias is not None:
            new = updated_bias(router.expert_bias, of_layer, balance.bias_update_rate)
            router.expert_bias.copy_(new if updated is None else torch.where(updated, new, router.expert_bias))


def summary(stats: RouterStats, tokens: int, balance: Balance) -> Tensor:
    """Compute the routing metrics of one step, on the device; `named` describes them.

    Args:
        stats: (L, E), (L, E), (L,), (L,) sums over `tokens` tokens.
        tokens: number of tokens.
        balance: contains the number of slots per token.

    Returns:
        (5 + E,) float64.
    """
    load, score_sum, z_sum, entropy_sum = (part.detach().double() for part in stats)
    share = load / (tokens * balance.top_k)  # (L, E)
    shown = torch.stack(
        [
            load_balance_loss(score_sum, load, balance.together) / tokens,
            z_loss(z_sum) / tokens,
            entropy_sum.mean() / tokens,
            share.max() * share.shape[1],
            share.min() * share.shape[1],
        ]
    )
    return torch.cat([shown, share.mean(0)])


def named(values: list[float]) -> dict[str, float | list[float]]:
    """Return the routing metrics by name.

    Args:
        values: from `summary`, copied to the host.

    Returns:
        `moe/load_balance_loss` and `moe/z_loss` (unweighted, per token, averaged over layers); `moe/router_entropy`
        (nats per token, averaged over layers); `moe/max_load` and `moe/min_load` (the highest and lowest load of any
        expert of any layer, divided by the mean load); `moe/load` (each expert's share of the slots, averaged over
        layers).
    """
    names = ("moe/load_balance_loss", "moe/z_loss", "moe/router_entropy", "moe/max_load", "moe/min_load")
    metrics: dict[str, float | list[float]] = dict(zip(names, values[: len(names)], strict=True))
    return metrics | {"moe/load": [round(value, 6) for value in values[len(names) :]]}
