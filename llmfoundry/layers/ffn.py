"""Feed-forward blocks: the dense ones, and the interface of all types.

Shapes: B rows, S sequence, T = B*S tokens, D d_model, F ffn hidden size, E experts.
An `ffn_type` is one config class and one module. The mixture of experts registers itself by subclassing `FFNConfig` (in
moe/layer.py), and returns router statistics along with its output.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from llmfoundry.config import Choice, Config
from llmfoundry.kernels.activations import ACTIVATIONS, glu


class RouterStats(NamedTuple):
    """Statistics from one call of a router, for the balance losses and monitors.

    All are float32 SUMS over the tokens of the call, so that they can be added over microbatches and ranks. The model
    stacks them over its MoE layers: (Lm, E), (Lm, E), (Lm,), (Lm,).
    """

    load: Tensor  # (E,) tokens routed to each expert, counting each of a token's K slots; no gradient
    score_sum: Tensor  # (E,) sum over tokens of the scores, normalized to sum to 1 per token; with gradient
    z_sum: Tensor  # () sum over tokens of logsumexp(logits)^2; with gradient
    entropy_sum: Tensor  # () sum over tokens of the scores' entropy in nats; no gradient


class FFNOutput(NamedTuple):
    """The output of a feed-forward block."""

    y: Tensor  # (B, S, D)
    router: RouterStats | None  # None for a dense block


class Activation(Config):
    """`ffn_act_fn`, with LLM Foundry's keys: `{name: gelu, approximate: tanh}`."""

    # The function; swiglu_oss is that of gpt-oss
    name: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_oss"] = "gelu"
    approximate: Literal["none", "tanh"] = "none"  # gelu only

    @property
    def key(self) -> str:
        """The activation's name in `ACTIVATIONS`."""
        return "gelu_tanh" if self.name == "gelu" and self.approximate == "tanh" else self.name


class FFNConfig(Choice, tag="ffn_type"):
    """Base class of the feed-forward configs: `ffn_config` in the YAML.

    `ffn_hidden_size` and `bias` may be left out: the model fills them in (`filled`) before it counts or builds.
    """

    ffn_type: str = "mptmlp"  # the type of block
    ffn_hidden_size: int | None = Field(None, ge=1, le=2**28)  # F; None: the model's expansion_ratio * d_model
    ffn_act_fn: Activation = Activation()  # the activation
    bias: bool | None = None  # biases of the block; None: as the model's no_bias says

    def filled(self, ffn_hidden_size: int, bias: bool) -> Self:
        """Return a copy with the model's values for the keys that the YAML leaves out."""
        update: dict[str, int | bool] = {}
        if self.ffn_hidden_size is None:
            update["ffn_hidden_size"] = ffn_hidden_size
        if self.bias is None:
            update["bias"] = bias
        return self.model_copy(update=update)

    def for_layer(self, index: int) -> FFNConfig:
        """Return the config for layer `index` (from 0): itself, unless dense and MoE layers are mixed."""
        return self

    def n_params(self, d_model: int) -> int:
        """Return the number of parameters in one block."""
        raise NotImplementedError

    def n_active_params(self, d_model: int) -> int:
        """Return the number of active parameters in one block: those that one token uses."""
        return self.n_params(d_model)

    def build(self, d_model: int, n_layers: int, layer_index: int) -> nn.Module:
        """Build the module, whose forward is `(x (B, S, D), keys (B,) int64 | None) -> FFNOutput`.

        `keys` are the noise keys of the rows in this layer.
        """
        raise NotImplementedError


class MLPConfig(FFNConfig, names=("mptmlp", "mlp")):
    """A dense block: `w2(act(w1(x)))`."""

    gated: ClassVar[bool] = False

    @model_validator(mode="after")
    def _check_activation(self) -> Self:
        if not self.gated and self.ffn_act_fn.key not in ACTIVATIONS:
            raise ValueError(f"ffn_act_fn.name={self.ffn_act_fn.name} needs a gated block: mptglu")
        return self

    @property
    def hidden_size(self) -> int:
        """The hidden size F; it must have been filled in."""
        if self.ffn_hidden_size is None:
            raise ValueError("ffn_hidden_size is not set; take the config from the model's `ffn(layer)`")
        return self.ffn_hidden_size

    @property
    def rows(self) -> int:
        """Rows of w1: F, or 2F if gated."""
        return self.hidden_size * (2 if self.gated else 1)

    def n_params(self, d_model: int) -> int:
        """Return the number of parameters in one block."""
        biases = self.rows + d_model if self.bias else 0
        return (self.rows + self.hidden_size) * d_model + biases

    def build(self, d_model: int, n_layers: int, layer_index: int) -> MLP:
        """Build the dense block; it is the same in every layer."""
        return MLP(self, d_model)


class GLUConfig(MLPConfig, names=("mptglu", "glu")):
    """A gated dense block: `w2(act(gate) * up)` with `[gate; up] = w1(x)` (Shazeer 2020, arXiv:2002.05202)."""

    gated: ClassVar[bool] = True


class MLP(nn.Module):
    """A dense feed-forward block, gated or not."""

    def __init__(self, config: MLPConfig, d_model: int) -> None:
        super().__init__()
        self.gated = config.gated
        self.activation = config.ffn_act_fn.key
        self.w1 = nn.Linear(d_model, config.rows, bias=bool(config.bias))  # gate rows, then up rows
        self.w2 = nn.Linear(config.hidden_size, d_model, bias=bool(config.bias))

    def forward(self, x: Tensor, keys: Tensor | None = None) -> FFNOutput:
        """Apply the block to each token.

        Args:
            x: (B, S, D).
            keys: (B,) int64 noise keys; unused, because a dense block draws no noise.
        """
        h = self.w1(x)  # (B, S, 2F) or (B, S, F)
        h = glu(h, self.activation) if self.gated else ACTIVATIONS[self.activation](h)  # (B, S, F)
        return FFNOutput(self.w2(h), None)
