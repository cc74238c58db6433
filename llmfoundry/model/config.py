"""The configs of a model and of its initialization: `model` in the YAML, and `init_config` inside it.

Shapes: D d_model, L layers.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from pydantic import Field, field_validator, model_validator
from torch import nn

from llmfoundry.config import Choice, Config

_RESIDUAL = (".out_proj.weight", ".w2.weight", ".w2")  # their outputs are added to the residual stream
_EMBEDDING = ("wte.weight", "wpe.weight")


class ModelConfig(Choice, tag="name"):
    """Base class of the models: `model` in the YAML."""

    name: str = "causal_lm"  # the kind of model
    max_seq_len: int = Field(default=2048, ge=1, le=2**31)  # the longest row, in tokens; number of learned positions

    def n_params(self) -> int:
        """Return the number of parameters."""
        raise NotImplementedError

    def n_active_params(self) -> int:
        """Return the number of active parameters: those that one token uses, so only the experts it is routed to."""
        raise NotImplementedError

    def n_trainable_params(self) -> int:
        """Return the number of parameters that are trained."""
        return self.n_params()

    def flops_per_token(self, seq_len: int | None = None) -> float:
        """Return model FLOPs per token, forward and backward, for sequences of `seq_len` (None: `max_seq_len`)."""
        raise NotImplementedError

    def check_trainable(self) -> None:
        """Check that every part of the model can be trained.

        Raises:
            ConfigError: if a part would not learn.
        """

    def build(self) -> nn.Module:
        """Build the module, without initializing its weights; call it under `torch.device("meta")`."""
        raise NotImplementedError


class Draw(NamedTuple):
    """The distribution of a parameter's initial values."""

    std: float
    uniform: bool = False  # else normal
    mean: float = 0.0


class InitConfig(Config):
    """Weight initialization, with LLM Foundry's keys.

    Standard deviations: kaiming_* gain / sqrt(fan_in), or fan_out by `fan_mode`, with the gain of `init_nonlinearity`;
    xavier_* init_gain * sqrt(2 / (fan_in + fan_out)); baseline_ and normal_ `init_std`; small_init_ sqrt(2 / 5D);
    neox_init_ the same, but 2 / (L sqrt(D)) for residual outputs; default_ as PyTorch initializes a new layer: weights
    and biases uniform in +-1 / sqrt(fan_in), embeddings 1. Each attention head, and each of gate and up, counts as a
    layer of its own.
    """

    # How standard deviations are chosen
    name: Literal[
        "kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_", "baseline_", "normal_",
        "small_init_", "neox_init_", "default_",
    ] = "kaiming_normal_"  # fmt: skip
    init_std: float | None = Field(default=None, gt=0)  # for baseline_ and normal_, which require it
    fan_mode: Literal["fan_in", "fan_out"] = "fan_in"  # for kaiming_*
    init_nonlinearity: Literal["relu", "leaky_relu", "linear", "sigmoid", "tanh", "selu"] = "relu"  # kaiming_* only
    init_gain: float = 0.0  # kaiming_*: negative slope, for leaky_relu; xavier_*: the gain itself
    init_div_is_residual: bool | float = True  # divide residual outputs by sqrt(2 L), or by this number
    # Standard deviation of embeddings; None: as for other weights
    emb_init_std: float | None = Field(default=None, ge=0)
    emb_init_uniform_lim: float | list[float] | None = None  # embeddings uniform in +-lim, or in [low, high]

    @model_validator(mode="after")
    def _check_std(self) -> InitConfig:
        needs_std = self.name in ("baseline_", "normal_")
        if needs_std != (self.init_std is not None):
            raise ValueError(f"name={self.name} {'needs' if needs_std else 'does not use'} init_std")
        if self.name.startswith("xavier") and self.init_gain <= 0:
            raise ValueError(f"name={self.name} with init_gain={self.init_gain} makes all weights 0; set it, e.g. to 1")
        if self.emb_init_uniform_lim is not None:
            if self.emb_init_std is not None:
                raise ValueError("emb_init_std and emb_init_uniform_lim exclude each other; keep one")
            low, high = self._limits
            if low > high:
                raise ValueError(f"emb_init_uniform_lim={self.emb_init_uniform_lim} must be a limit, or [low, high]")
        elif self.name == "default_" and self.emb_init_std is not None:
            raise ValueError("name=default_ does not use emb_init_std")
        return self

    @field_validator("init_div_is_residual")
    @classmethod
    def _check_divisor(cls, divide: bool | float) -> bool | float:
        if not isinstance(divide, bool) and divide <= 0:
            raise ValueError(f"residual outputs cannot be divided by {divide}; write false for no division")
        return divide

    @field_validator("emb_init_uniform_lim")
    @classmethod
    def _check_limits(cls, limits: float | list[float] | None) -> float | list[float] | None:
        if isinstance(limits, list) and len(limits) != 2:
            raise ValueError(f"emb_init_uniform_lim={limits} must be a limit, or [low, high]")
        return limits

    @property
    def _limits(self) -> tuple[float, float]:
        limits = self.emb_init_uniform_lim
        assert limits is not None
        return (limits[0], limits[1]) if isinstance(limits, list) else (-limits, limits)

    def draw(self, name: str, fan_in: int, fan_out: int, d_model: int, n_layers: int) -> Draw:
        """Return the distribution of a weight of two or more dims.

        Args:
            name: the parameter's name in the model.
            fan_in: number of columns.
            fan_out: number of rows that belong to one layer.
            d_model: width of the residual stream.
            n_layers: number of blocks.
        """
        if name in _EMBEDDING and self.emb_init_std is not None:
            return Draw(self.emb_init_std)
        if name in _EMBEDDING and self.emb_init_uniform_lim is not None:
            low, high = self._limits
            return Draw((high - low) / math.sqrt(12), True, (low + high) / 2)
        if self.name == "default_":
            return Draw(1.0) if name in _EMBEDDING else Draw(1 / math.sqrt(3 * fan_in), True)
        std = self._std(fan_in, fan_out, d_model)
        if name.endswith(_RESIDUAL):
            divide = self.init_div_is_residual
            if self.name == "neox_init_":
                std = 2 / n_layers / math.sqrt(d_model)
            elif divide is not False:
                std /= math.sqrt(2 * n_layers) if divide is True else divide
        return Draw(std, self.name.endswith("uniform_"))

    def _std(self, fan_in: int, fan_out: int, d_model: int) -> float:
        if self.name in ("small_init_", "neox_init_"):
            return math.sqrt(2 / (5 * d_model))
        if self.init_std is not None:
            return self.init_std
        if self.name.startswith("xavier"):
            return self.init_gain * math.sqrt(2 / (fan_in + fan_out))
        gain = nn.init.calculate_gain(self.init_nonlinearity, self.init_gain)
        return gain / math.sqrt(fan_in if self.fan_mode == "fan_in" else fan_out)
