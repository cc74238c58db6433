"""A mixture-of-experts layer for any model: `from llmfoundry import MoE`.

    layer = MoE(1024, ffn_hidden_size=512, moe_num_experts=64, moe_top_k=8, device="cuda", dtype=torch.bfloat16)
    y, loss, load = layer(x)            # x (..., 1024)
    (task_loss(y) + loss).backward()

Shapes: D d_model, F ffn hidden size, E experts, K top_k, T tokens. Settings are the keys of `ffn_config` in a YAML,
with the same checks and defaults.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llmfoundry.config import ConfigError, check
from llmfoundry.layers.ffn import FFNConfig
from llmfoundry.moe import layer
from llmfoundry.moe.balance import load_balance_loss, updated_bias, z_loss


class MoEOutput(NamedTuple):
    """What `MoE` returns."""

    y: Tensor  # (..., D), the shape and dtype of x; under autocast its dtype, as of nn.Linear
    loss: Tensor  # () float32, the weighted auxiliary losses of this call, mean over its tokens; add it to your loss
    load: Tensor  # (E,) float32, slots routed to each expert, T*K in all; no gradient


def autocast_call(module: layer.MoE, x: Tensor, *args: object) -> object:
    """Run a forward under autocast: all but the router in its dtype, as `nn.Linear` would.

    Returns:
        The result of `module(x, *args)` without autocast, with cast weights; gradients reach the original weights.
    """
    dtype = torch.get_autocast_dtype(x.device.type)
    cast = {name: p.to(dtype) for name, p in module.named_parameters() if not name.startswith("router.")}
    with torch.autocast(x.device.type, enabled=False):
        return torch.func.functional_call(module, cast, (x.to(dtype), *args))


def check_input(module: layer.MoE, x: Tensor) -> None:
    """Raise ValueError if x does not fit the weights."""
    w2 = module.experts.w2  # (E, D, F)
    if x.dim() < 1 or x.shape[-1] != w2.shape[1]:
        raise ValueError(f"x has the shape {tuple(x.shape)}; its last size must be d_model={w2.shape[1]}")
    if x.dtype != w2.dtype:
        raise ValueError(f"x is {x.dtype} and the layer {w2.dtype}; convert one, or run it under torch.autocast")


# Keys of `ffn_config` that say something about several layers or microbatches, with the value that one layer has.
_OF_A_MODEL = {
    "first_k_dense": 0, "moe_layer_freq": 1, "dense_ffn_hidden_size": None, "moe_lbl_layers": "each",
    "moe_lbl_scope": "microbatch", "moe_lbl_accumulation": None,
}  # fmt: skip


def _checked(settings: dict[str, object]) -> layer.MoEConfig:
    """The config of one layer. Raises ConfigError for another type of block, and for keys of a whole model."""
    settings = {"ffn_type": "moe"} | settings
    member = FFNConfig.member(settings)
    if member is None or not issubclass(member, layer.MoEConfig):
        kinds = ", ".join(name for name, kind in FFNConfig._members.items() if issubclass(kind, layer.MoEConfig))
        raise ConfigError(f"ffn_type={settings['ffn_type']!r} is not a mixture of experts; write one of {kinds}")
    for key, value in _OF_A_MODEL.items():
        if key in settings and settings[key] != value:
            raise ConfigError(f"{key}={settings[key]!r} belongs to a whole model, and this is one layer; leave it out")
    return check(member, settings)


class MoE(layer.MoE):
    """A dropless mixture of experts with its own initial weights.

    Parameters: `router.weight` (E, D), `experts.w1` (E, 2F, D) with gate rows first, or (E, F, D) for
    `mlp_type: mlp`, `experts.w2` (E, D, F), and with `bias: true` `experts.b1`, `experts.b2`.

    Args:
        d_model: D.
        expert_group: its P ranks divide the experts, and rank r holds E / P of them, starting at r * E / P. Every rank
            has the router. None: this process has all experts. You must sum the gradients of the router and of all
            other parameters that ranks share.
        init_std: standard deviation of the normal initial weights; biases start at 0.
        seed: seed of the initial weights. Ranks of one group must use the same.
        device: device of the parameters.
        dtype: dtype of the parameters. The router always computes in float32.
        settings: keys of `ffn_config`: ffn_hidden_size, moe_num_experts, moe_top_k, mlp_type, ffn_act_fn, moe_impl,
            moe_loss_weight, shared_expert, ... `ffn_type: mb_dmoe` has MegaBlocks' defaults. The balance loss is
            computed over the tokens of one call. Keys that concern a whole model (first_k_dense, ...) are refused.

    Raises:
        ConfigError: a setting is unknown or impossible; the message says what to write.
        ValueError: d_model is not a valid size, or E is not divisible by the number of ranks of `expert_group`.

    Source: Gale et al. 2022, MegaBlocks, arXiv:2211.15841.
    """

    def __init__(
        self,
        d_model: int,
        *,
        expert_group: dist.ProcessGroup | None = None,
        init_std: float = 0.02,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: object,
    ) -> None:
        if not isinstance(d_model, int) or d_model < 1:
            raise ValueError(f"d_model={d_model!r}: must be a whole number, 1 or more")
        config = _checked(settings).filled(4 * d_model, bias=False)
        config.check_trainable()
        with torch.device("meta"):
            super().__init__(config, d_model)
        self.config = config
        if expert_group is not None:
            self._keep_own_experts(expert_group)
        self.to(dtype=dtype or torch.get_default_dtype())
        self.to_empty(device=device or torch.get_default_device())
        self._initialise(init_std, seed)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> MoEOutput:  # type: ignore[override]
        """Apply the layer to each token.

        Args:
            x: (..., D).
            keys: noise keys of `moe_jitter_eps`, (B,) int64 for x (B, S, D); None: random.

        Raises:
            ValueError: x has another width or, without autocast, another dtype than the weights.
        """
        if torch.is_autocast_enabled(x.device.type):
            out = autocast_call(self, x, keys)
            assert isinstance(out, MoEOutput)
            return out
        check_input(self, x)
        rows = x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])
        if keys is None and self.training and self.config.moe_jitter_eps is not None:
            keys = torch.randint(2**62, rows.shape[:1], device=x.device)
        y, stats = super().forward(rows, keys)
        assert stats is not None
        balance = load_balance_loss(stats.score_sum.unsqueeze(0), stats.load.unsqueeze(0))
        total = self.config.moe_loss_weight * balance + self.config.moe_zloss_weight * z_loss(stats.z_sum)
        return MoEOutput(y.view_as(x), total / max(1, rows.shape[0] * rows.shape[1]), stats.load)

    @torch.no_grad()
    def update_expert_bias(self, load: Tensor) -> None:
        """Update the bias that helps to select experts (`moe_bias_update_rate`), once per step after the optimizer.

        Args:
            load: (E,) slots of the whole batch: the `load` of its forwards, summed over microbatches and ranks.

        Raises:
            ValueError: the layer has no such bias.
        """
        bias, rate = self.router.expert_bias, self.config.moe_bias_update_rate
        if bias is None or rate is None:
            raise ValueError("update_expert_bias: the layer has no bias to move; give it moe_bias_update_rate")
        bias.copy_(updated_bias(bias, load, rate))

    def _keep_own_experts(self, group: dist.ProcessGroup) -> None:
        ranks = dist.get_world_size(group)
        if self.n_experts % ranks:
            raise ValueError(f"moe_num_experts={self.n_experts} do not divide among the {ranks} ranks of expert_group")
        for name, whole in list(self.experts.named_parameters(recurse=False)):
            own = whole.new_empty(self.n_experts // ranks, *whole.shape[1:])
            self.experts.register_parameter(name, nn.Parameter(own))
        self.expert_group = group

    @torch.no_grad()
    def _initialise(self, std: float, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        first = 0 if self.expert_group is None else dist.get_rank(self.expert_group)
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2 or name.endswith((".b1", ".b2")):
                parameter.zero_()
                continue
            # Expert by expert, those of other ranks too: the values do not depend on the number of ranks.
            stacked = name.startswith("experts.")
            n_own = parameter.shape[0] if stacked else 1
            for expert in range(self.n_experts if stacked else 1):
                shape = parameter.shape[1:] if stacked else parameter.shape
                drawn = torch.empty(shape).normal_(0.0, std, generator=generator)
                if not stacked:
                    parameter.copy_(drawn)
                elif first * n_own <= expert < (first + 1) * n_own:
                    parameter[expert - first * n_own].copy_(drawn)
        for buffer in self.buffers():
            buffer.zero_()
