"""The configs of a model and of its initial weights: `model` in the YAML, and `init_config` inside it.

Shapes: D d_model, L layers.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import nn

from llmfoundry.config import Choice, Config

_RESIDUAL = (".out_proj.weight", ".w2.weight", ".w2")  # their outputs are added to the residual stream
_EMBEDDING = ("wte.weight", "wpe.weight")


class ModelConfig(Choice, tag="name"):
    """Root of the models: `model` in the YAML."""

    name: str = "mpt_causal_lm"  # the kind of model
    max_seq_len: int = Field(default=2048, ge=1)  # the longest row, in tokens; sizes learned positions

    def n_params(self) -> int:
        """All parameters."""
        raise NotImplementedError

    def n_active_params(self) -> int:
        """Active parameters: those that one token uses. Of a layer's experts, these are the ones it is routed to."""
        raise NotImplementedError

    def n_trainable_params(self) -> int:
        """Parameters that training changes."""
        return self.n_params()

    def flops_per_token(self, seq_len: int | None = None) -> float:
        """Model FLOPs per token, forward and backward, in sequences of `seq_len` (None: `max_seq_len`)."""
        raise NotImplementedError

    def check_trainable(self) -> None:
        """Refuse a model that can be used but not trained.

        Raises:
            ConfigError: a part of the model could not learn.
        """

    def build(self) -> nn.Module:
        """The module, its weights not yet initialised; call it under `torch.device("meta")`."""
        raise NotImplementedError


class InitConfig(Config):
    """`init_config`, in LLM Foundry's words.

    Standard deviations: kaiming_* sqrt(2 / fan_in), or fan_out by `fan_mode`; baseline_ and normal_ `init_std`;
    small_init_ sqrt(2 / 5D); neox_init_ the same, but 2 / (L sqrt(D)) for residual outputs.
    """

    # The rule of the standard deviations
    name: Literal[
        "kaiming_normal_", "kaiming_uniform_", "baseline_", "normal_", "small_init_", "neox_init_"
    ] = "kaiming_normal_"  # fmt: skip
    init_std: float | None = Field(default=None, gt=0)  # of baseline_ and normal_, which need it
    fan_mode: Literal["fan_in", "fan_out"] = "fan_in"  # of kaiming_*
    init_gain: float = 0.0  # kaiming_* only: negative slope of the leaky ReLU that the gain is for
    init_div_is_residual: bool | float = True  # residual outputs divided by sqrt(2 L), or by this number
    emb_init_std: float | None = Field(default=None, ge=0)  # of embeddings; None: as for all other weights

    @model_validator(mode="after")
    def _check_std(self) -> InitConfig:
        needs_std = self.name in ("baseline_", "normal_")
        if needs_std != (self.init_std is not None):
            raise ValueError(f"name={self.name} {'needs' if needs_std else 'does not use'} init_std")
        return self

    @field_validator("init_div_is_residual")
    @classmethod
    def _check_divisor(cls, divide: bool | float) -> bool | float:
        if not isinstance(divide, bool) and divide <= 0:
            raise ValueError(f"residual outputs cannot be divided by {divide}; write false for no division")
        return divide

    @property
    def uniform(self) -> bool:
        """Whether values are uniform; otherwise they are normal."""
        return self.name == "kaiming_uniform_"

    def std(self, name: str, shape: torch.Size, d_model: int, n_layers: int) -> float:
        """Standard deviation of a weight of two or more dims.

        Args:
            name: the parameter's name in the model.
            shape: of the whole parameter.
        """
        is_residual = name.endswith(_RESIDUAL)
        if name in _EMBEDDING and self.emb_init_std is not None:
            return self.emb_init_std
        if self.name in ("small_init_", "neox_init_"):
            std = math.sqrt(2 / (5 * d_model))
        elif self.init_std is not None:
            std = self.init_std
        else:
            fan = shape[-1] if self.fan_mode == "fan_in" else shape[-2]
            std = math.sqrt(2 / (1 + self.init_gain**2) / fan)
        if self.name == "neox_init_":
            return 2 / n_layers / math.sqrt(d_model) if is_residual else std
        divide = self.init_div_is_residual
        if is_residual and divide is not False:
            std /= math.sqrt(2 * n_layers) if divide is True else divide
        return std
