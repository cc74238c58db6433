"""The model's shape, and all arithmetic about it (parameters, active ones, FLOPs), without building it.

Shapes: B rows, S sequence, D d_model, H query heads, C head_dim, F ffn hidden size, V vocab, L layers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from pydantic import Field, model_validator

import llmfoundry.layers.latent_attention  # noqa: F401  registers its attn_type
from llmfoundry.config import Choice
from llmfoundry.layers.attention import FULL, AttentionConfig, GroupedQueryConfig
from llmfoundry.layers.ffn import FFNConfig, MLPConfig
from llmfoundry.layers.lora import LoRAConfig, adapters, add_adapters
from llmfoundry.layers.norm import NormConfig, NormType
from llmfoundry.model.init import InitConfig
from llmfoundry.model.transformer import CausalLM
from llmfoundry.moe.layer import MoEConfig


class ModelConfig(Choice, tag="name"):
    """Root of the models: `model` in the YAML."""

    name: str = "mpt_causal_lm"
    max_seq_len: int = Field(default=2048, ge=1)

    def n_params(self) -> int:
        """All parameters."""
        raise NotImplementedError

    def n_active_params(self) -> int:
        """Parameters that one token meets: of a layer's experts, those it is routed to."""
        raise NotImplementedError

    def n_trainable_params(self) -> int:
        """Parameters that training changes."""
        return self.n_params()

    def flops_per_token(self, seq_len: int | None = None) -> float:
        """Model FLOPs of forward and backward, a token, in sequences of `seq_len` (None: the longest)."""
        raise NotImplementedError

    def build(self) -> CausalLM:
        """The module, its weights not yet initialised; call it under `torch.device("meta")`."""
        raise NotImplementedError


class _AdapterParams(NamedTuple):
    """Parameters of a model's adapters."""

    all: int
    active: int


class CausalLMConfig(ModelConfig, names=("mpt_causal_lm", "causal_lm")):
    """A pre-norm decoder. The keys and their defaults are LLM Foundry's."""

    d_model: int = Field(ge=1)
    n_heads: int = Field(ge=1)
    n_layers: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    expansion_ratio: float = Field(default=4.0, gt=0)  # ffn hidden size / d_model, where ffn_config gives no size
    no_bias: bool = False  # of every linear layer and norm, unless its own block says otherwise
    norm_type: NormType = "layernorm"
    norm_eps: float = Field(default=1e-5, gt=0)
    learned_pos_emb: bool | None = None  # None: exactly when attn_config has neither rope nor alibi
    tie_word_embeddings: bool = True
    final_logit_softcapping: float | None = Field(default=None, gt=0)
    # Windows of the layers in turn, e.g. [127, -1]: layer i has entry i modulo the length. None: the same for
    # all, attn_config.sliding_window_size.
    attn_window_pattern: list[int] | None = None
    attn_config: AttentionConfig = GroupedQueryConfig()
    ffn_config: FFNConfig = MLPConfig()
    init_config: InitConfig = InitConfig()
    lora: LoRAConfig | None = None  # train adapters, and nothing else; None: train everything

    @model_validator(mode="after")
    def _check_sizes(self) -> CausalLMConfig:
        self.attn_config.check(self.d_model, self.n_heads)
        if self.learned_pos_emb and self.attn_config.has_positions:
            which = "rope" if self.attn_config.rope else "alibi"
            raise ValueError(f"learned_pos_emb and attn_config.{which} are both on; keep one")
        if self.expansion_ratio * self.d_model < 1:
            raise ValueError(f"expansion_ratio={self.expansion_ratio} of d_model={self.d_model} leaves no hidden unit")
        pattern = self.attn_window_pattern
        if pattern is not None:
            if not pattern or min(pattern) < FULL:
                raise ValueError(f"attn_window_pattern={pattern} must list windows: -1 (all), or 0 and more")
            if self.attn_config.sliding_window_size != FULL:
                raise ValueError(
                    f"attn_window_pattern={pattern} and attn_config.sliding_window_size="
                    f"{self.attn_config.sliding_window_size} both set the windows; keep one"
                )
        if self.lora is not None:
            self._check_adapters()
        return self

    def _check_adapters(self) -> None:
        rate = self.ffn_config.moe_bias_update_rate if isinstance(self.ffn_config, MoEConfig) else None
        if rate:
            raise ValueError(
                f"lora trains adapters only: set ffn_config.moe_bias_update_rate={rate}, which moves the router, to 0"
            )
        try:
            self._adapter_params()
        except ValueError as error:
            raise ValueError(f"lora.{error}") from None

    @property
    def has_learned_positions(self) -> bool:
        """Whether there is a `wpe`."""
        return not self.attn_config.has_positions if self.learned_pos_emb is None else self.learned_pos_emb

    @property
    def norm(self) -> NormConfig:
        """Every norm of the model."""
        return NormConfig(norm_type=self.norm_type, eps=self.norm_eps, bias=not self.no_bias)

    @property
    def attention(self) -> AttentionConfig:
        """The attention of every layer, with the model's defaults filled in."""
        return self.attn_config.filled(not self.no_bias)

    def window(self, layer: int) -> int:
        """Earlier tokens that a token sees in this layer; -1: all."""
        pattern = self.attn_window_pattern
        return pattern[layer % len(pattern)] if pattern else self.attn_config.sliding_window_size

    def ffn(self, layer: int) -> FFNConfig:
        """The feed-forward block of this layer, with the model's defaults filled in."""
        hidden = int(self.expansion_ratio * self.d_model)
        return self.ffn_config.filled(hidden, not self.no_bias).for_layer(layer)

    def n_params(self) -> int:
        """All parameters."""
        layers = range(self.n_layers)
        blocks = sum(self.ffn(layer).n_params(self.d_model) for layer in layers)
        return self._shared_params() + blocks + self._adapter_params().all

    def n_active_params(self) -> int:
        """Parameters that one token meets: of a layer's experts, those it is routed to."""
        layers = range(self.n_layers)
        blocks = sum(self.ffn(layer).n_active_params(self.d_model) for layer in layers)
        return self._shared_params() + blocks + self._adapter_params().active

    def n_trainable_params(self) -> int:
        """Parameters that training changes: with `lora`, the adapters'."""
        return self.n_params() if self.lora is None else self._adapter_params().all

    def flops_per_token(self, seq_len: int | None = None) -> float:
        """Model FLOPs of forward and backward, a token, in sequences of `seq_len` (None: the longest).

        6 an active parameter (4 a frozen one, which has no gradient), embeddings that are only looked up left out,
        and 12 C H a layer and key seen: causal attention sees S / 2 keys on average, a window w of them w - w^2 / 2S.
        """
        looked_up = 0 if self.tie_word_embeddings else self.vocab_size * self.d_model
        if self.has_learned_positions:
            looked_up += self.max_seq_len * self.d_model
        length = seq_len or self.max_seq_len
        keys = 0.0
        for layer in range(self.n_layers):
            window = self.window(layer)
            seen = length if window == FULL else min(window + 1, length)  # the token itself counts
            keys += seen - seen * seen / (2 * length)
        score_dims = self.attention.score_dims(self.d_model, self.n_heads)
        multiplied = self.n_active_params() - looked_up
        frozen = 0 if self.lora is None else multiplied - self._adapter_params().active
        return 6.0 * multiplied - 2.0 * frozen + 12.0 * score_dims * keys

    def build(self) -> CausalLM:
        """The module, its weights not yet initialised; call it under `torch.device("meta")`."""
        model = CausalLM(self)
        if self.lora is not None:
            add_adapters(model, model.blocks, self.lora)
        return model

    def _adapter_params(self) -> _AdapterParams:
        """Parameters of all adapters, and those that one token meets: counted, on the meta device."""
        total = active = 0
        if self.lora is not None:
            with torch.device("meta"):
                model = self.build()
            for name, a, b in adapters(model):
                ffn = self.ffn(int(name.split(".")[1]))
                n = a.numel() + b.numel()
                total += n
                active += n // a.shape[0] * ffn.moe_top_k if a.dim() == 3 and isinstance(ffn, MoEConfig) else n
        return _AdapterParams(total, active)

    def _shared_params(self) -> int:
        """All but the feed-forward blocks."""
        d, norm = self.d_model, self.norm
        embeddings = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        if self.has_learned_positions:
            embeddings += self.max_seq_len * d
        layer = self.attention.n_params(d, self.n_heads, norm) + 2 * norm.n_params(d)
        return embeddings + self.n_layers * layer + norm.n_params(d)
