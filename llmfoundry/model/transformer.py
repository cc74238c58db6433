"""The decoder: embeddings, pre-norm blocks, head and loss.

Shapes: B rows, S sequence, T = B*S tokens, D d_model, E experts, V vocab, Lm MoE layers.
Forward is a function of weights and inputs: it writes nothing to `self` or to globals. Masks and the RoPE table are
computed once per forward and passed to the blocks. The model runs in the dtype of its parameters, and knows nothing of
meshes, activation recomputation or compilation, which are applied to `blocks[i]` from outside.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

import llmfoundry.layers.latent_attention  # noqa: F401  registers its attn_type
from llmfoundry.config import ConfigError
from llmfoundry.layers.attention import (
    FULL,
    Attention,
    AttentionConfig,
    GroupedQueryConfig,
    KeysAndValues,
    Mask,
    attention_mask,
)
from llmfoundry.layers.ffn import FFNConfig, MLPConfig, RouterStats
from llmfoundry.layers.kv_cache import KVCache
from llmfoundry.layers.lora import LoRAConfig, adapters, add_adapters, quantize_frozen
from llmfoundry.layers.norm import NormConfig, NormType
from llmfoundry.layers.rope import Rope, rope_table
from llmfoundry.model.config import InitConfig, ModelConfig
from llmfoundry.model.head import Head, logits_or_loss
from llmfoundry.moe.layer import MoEConfig
from llmfoundry.moe.router import layer_keys


class Output(NamedTuple):
    """The model's output: logits or, given labels, the loss."""

    logits: Tensor | None  # (B, S, V)
    loss_sum: Tensor | None  # () nats, float32, summed over labels that are not -100
    nats: Tensor | None  # (B, S) loss of each label; with a gradient if `by_token`
    router: RouterStats | None  # stacked over MoE layers, (Lm, E) or (Lm,); None for a dense model


class Cache:
    """A key-value cache for generation; each forward extends it.

    All rows have the same length. The first forward allocates `capacity` tokens; after that, buffers double.

    Args:
        n_layers: number of blocks.
        capacity: tokens to allocate at first.
        padding: (B,) int64, the number of padding tokens at the start of each row; they are masked, and the first real
            token has position 0. None: no padding.
    """

    def __init__(self, n_layers: int, capacity: int = 0, padding: Tensor | None = None) -> None:
        self.layers = [KVCache(capacity) for _ in range(n_layers)]
        self.padding = padding
        self.theirs: object | None = None  # the cache of a `transformers` module

    @property
    def length(self) -> int:
        """Number of cached tokens."""
        return self.layers[0].length

    def truncate(self, length: int) -> None:
        """Drop all but the first `length` tokens."""
        for layer in self.layers:
            layer.truncate(length)


class AdapterParams(NamedTuple):
    """Numbers of adapter parameters."""

    all: int
    active: int
    of_experts: int


class CausalLMConfig(ModelConfig, names=("causal_lm", "mpt_causal_lm")):
    """A pre-norm decoder, with LLM Foundry's keys and defaults."""

    d_model: int = Field(ge=1, le=2**24)  # width of the residual stream
    n_heads: int = Field(ge=1, le=2**20)  # number of query heads
    n_layers: int = Field(ge=1, le=1000)  # number of blocks
    vocab_size: int = Field(ge=1, le=2**31)  # rows of the embedding; at least the tokenizer's
    expansion_ratio: float = Field(default=4.0, gt=0)  # ffn hidden size / d_model, if ffn_config gives no size
    no_bias: bool = False  # for every linear layer and norm, unless its own block says otherwise
    norm_type: NormType = "layernorm"  # type of the norms in the blocks and before the head
    norm_eps: float = Field(default=1e-5, gt=0)  # added to a norm's mean square or variance
    learned_pos_emb: bool | None = None  # None: exactly when attn_config has neither rope nor alibi
    tie_word_embeddings: bool = True  # the head uses the embedding's weight
    final_logit_softcapping: float | None = Field(default=None, gt=0)  # logits become c * tanh(logit / c), as Gemma 2
    # Factor on the logits, before soft-capping; inv_sqrt_d_model: 1 / sqrt(d_model).
    logit_scale: Annotated[float, Field(gt=0)] | Literal["inv_sqrt_d_model"] | None = None
    # Factor on the embeddings' gradient (GLM-130B: Zeng et al. 2022, arXiv:2210.02414).
    embedding_fraction: float = Field(default=1.0, gt=0, le=1)
    # Dropout of the output of attention and feed-forward blocks, before it is added to the residual stream. The dropout
    # of attention weights is attn_config.attn_pdrop.
    resid_pdrop: float = Field(default=0.0, ge=0, lt=1)
    emb_pdrop: float = Field(default=0.0, ge=0, lt=1)  # dropout of the embeddings
    # Sliding windows of the layers in turn, e.g. [127, -1]: layer i uses entry i modulo the length. None:
    # attn_config.sliding_window_size for all.
    attn_window_pattern: list[int] | None = None
    # Whether each layer, in turn, encodes positions: false turns off rope or ALiBi. None: all do.
    attn_position_pattern: list[bool] | None = None
    # Whose keys and values each layer, in turn, attends to: 0 its own, -1 those of the previous layer, -2 of the one
    # before that. A layer that reuses keys and values only projects queries. If the source reuses too, its source is
    # used.
    attn_reuse_kv_pattern: list[int] | None = None
    attn_config: AttentionConfig = GroupedQueryConfig()
    ffn_config: FFNConfig = MLPConfig()
    init_config: InitConfig = InitConfig()
    lora: LoRAConfig | None = None  # train adapters only; None: train everything

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
        self._check_patterns()
        if self.lora is not None:
            self._check_adapters()
        return self

    def _check_patterns(self) -> None:
        positions, reuse = self.attn_position_pattern, self.attn_reuse_kv_pattern
        if positions is not None and not (positions and self.attn_config.has_positions):
            raise ValueError(f"attn_position_pattern={positions} turns off rope or alibi, and neither is on")
        if reuse is None:
            return
        if not reuse or max(reuse) > 0 or any(self._kv_step(layer) + layer < 0 for layer in range(self.n_layers)):
            raise ValueError(
                f"attn_reuse_kv_pattern={reuse} must lead to earlier layers: 0 (own), -1, ..., within them"
            )
        if not isinstance(self.attn_config, GroupedQueryConfig):
            raise ValueError(f"attn_reuse_kv_pattern: attn_type={self.attn_config.attn_type} cannot share keys")

    def check_trainable(self) -> None:
        """Check that the router can be trained, unless only adapters are."""
        if self.lora is None and isinstance(self.ffn_config, MoEConfig):
            try:
                self.ffn_config.check_trainable()
            except ValueError as error:
                raise ConfigError(f"model.ffn_config.{error}") from None

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
        """Whether the model has learned position embeddings (`wpe`)."""
        return not self.attn_config.has_positions if self.learned_pos_emb is None else self.learned_pos_emb

    @property
    def has_dropout(self) -> bool:
        """Whether a forward in training draws random numbers."""
        adapters = 0.0 if self.lora is None else self.lora.dropout
        return max(self.resid_pdrop, self.emb_pdrop, self.attn_config.dropout, adapters) > 0

    @property
    def logits_factor(self) -> float:
        """The factor on the logits."""
        return self.d_model**-0.5 if self.logit_scale == "inv_sqrt_d_model" else self.logit_scale or 1.0

    @property
    def norm(self) -> NormConfig:
        """The config of every norm."""
        return NormConfig(norm_type=self.norm_type, eps=self.norm_eps, bias=not self.no_bias)

    @property
    def attention(self) -> AttentionConfig:
        """The attention config of every layer, with the model's defaults filled in."""
        return self.attn_config.filled(not self.no_bias)

    def window(self, layer: int) -> int:
        """Return how many earlier tokens a token attends to in this layer; -1: all."""
        pattern = self.attn_window_pattern
        return pattern[layer % len(pattern)] if pattern else self.attn_config.sliding_window_size

    def encodes_positions(self, layer: int) -> bool:
        """Return whether this layer applies RoPE or ALiBi, if the model has either."""
        pattern = self.attn_position_pattern
        return pattern is None or pattern[layer % len(pattern)]

    def kv_source(self, layer: int) -> int | None:
        """Return the layer whose keys and values this one attends to; None: its own."""
        step = self._kv_step(layer)
        if step == 0:
            return None
        source = self.kv_source(layer + step)
        return layer + step if source is None else source

    def _kv_step(self, layer: int) -> int:
        pattern = self.attn_reuse_kv_pattern
        return 0 if pattern is None else pattern[layer % len(pattern)]

    def attention_of(self, layer: int) -> AttentionConfig:
        """Return the attention config of a layer."""
        if self.encodes_positions(layer):
            return self.attention
        return self.attention.model_copy(
            update={key: False for key in ("rope", "alibi") if hasattr(self.attention, key)}
        )

    def ffn(self, layer: int) -> FFNConfig:
        """Return the feed-forward config of a layer, with the model's defaults filled in."""
        hidden = int(self.expansion_ratio * self.d_model)
        return self.ffn_config.filled(hidden, not self.no_bias).for_layer(layer)

    def n_params(self) -> int:
        """Return the number of parameters."""
        layers = range(self.n_layers)
        blocks = sum(self.ffn(layer).n_params(self.d_model) for layer in layers)
        return self._shared_params() + blocks + self._adapter_params().all

    def n_active_params(self) -> int:
        """Return the number of active parameters: those that one token uses, so only the experts it is routed to."""
        layers = range(self.n_layers)
        blocks = sum(self.ffn(layer).n_active_params(self.d_model) for layer in layers)
        return self._shared_params() + blocks + self._adapter_params().active

    def n_trainable_params(self) -> int:
        """Return the number of parameters that are trained: with `lora`, only the adapters'."""
        return self.n_params() if self.lora is None else self._adapter_params().all

    def flops_per_token(self, seq_len: int | None = None) -> float:
        """Return model FLOPs per token, forward and backward, for sequences of `seq_len` (None: `max_seq_len`).

        This is 6 per active parameter (4 if it is frozen and has no gradient), excluding embeddings that are only
        looked up, plus 12 C H per layer and attended key. A causal query attends to S / 2 keys on average, or to w -
        w^2 / 2S with a window of w.
        """
        looked_up = 0 if self.tie_word_embeddings else self.vocab_size * self.d_model
        if self.has_learned_positions:
            looked_up += self.max_seq_len * self.d_model
        length = seq_len or self.max_seq_len
        keys = 0.0
        for layer in range(self.n_layers):
            window = self.window(layer)
            seen = length if window == FULL else min(window + 1, length)  # includes the token itself
            keys += seen - seen * seen / (2 * length)
        score_dims = self.attention.score_dims(self.d_model, self.n_heads)
        multiplied = self.n_active_params() - looked_up
        frozen = 0 if self.lora is None else multiplied - self._adapter_params().active
        return 6.0 * multiplied - 2.0 * frozen + 12.0 * score_dims * keys

    def build(self) -> CausalLM:
        """Build the module, without initializing its weights; call it under `torch.device("meta")`."""
        model = CausalLM(self)
        if self.lora is not None:
            add_adapters(model, model.blocks, self.lora)
            if self.lora.quantize is not None:
                quantize_frozen(model.blocks)
        return model

    @property
    def adapts_experts(self) -> bool:
        """Whether experts have adapters."""
        return self._adapter_params().of_experts > 0

    def _adapter_params(self) -> AdapterParams:
        """Count adapter parameters by building the model on the meta device."""
        total = active = of_experts = 0
        if self.lora is not None:
            with torch.device("meta"):
                model = self.build()
            for name, a, b in adapters(model):
                ffn = self.ffn(int(name.split(".")[1]))
                n = a.numel() + b.numel()
                total += n
                of_experts += n if a.dim() == 3 else 0
                active += n // a.shape[0] * ffn.moe_top_k if a.dim() == 3 and isinstance(ffn, MoEConfig) else n
        return AdapterParams(total, active, of_experts)

    def _shared_params(self) -> int:
        """Count all parameters except those of feed-forward blocks and adapters."""
        d, norm = self.d_model, self.norm
        embeddings = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        if self.has_learned_positions:
            embeddings += self.max_seq_len * d
        attention = sum(self.attention_params(layer) for layer in range(self.n_layers))
        return embeddings + attention + (2 * self.n_layers + 1) * norm.n_params(d)

    def attention_params(self, layer: int) -> int:
        """Return the number of parameters in one layer's attention."""
        return self.attention.n_params(self.d_model, self.n_heads, self.norm, self.kv_source(layer) is not None)


class BlockOutput(NamedTuple):
    """The output of a block."""

    x: Tensor  # (B, S, D)
    router: RouterStats | None
    kv: KeysAndValues | None  # if later layers reuse them


class Block(nn.Module):
    """A pre-norm block: `x + attn(norm_1(x))`, then `x + ffn(norm_2(x))`."""

    def __init__(self, config: CausalLMConfig, layer: int) -> None:
        super().__init__()
        self.norm_1 = config.norm.build(config.d_model)
        self.encodes_positions = config.encodes_positions(layer)
        self.gives_kv = layer in {config.kv_source(later) for later in range(layer + 1, config.n_layers)}
        reuses_kv = config.kv_source(layer) is not None
        self.attn = config.attention_of(layer).build(config.d_model, config.n_heads, config.norm, reuses_kv)
        self.norm_2 = config.norm.build(config.d_model)
        self.ffn = config.ffn(layer).build(config.d_model, config.n_layers, layer)
        self.dropout = config.resid_pdrop

    def forward(
        self,
        x: Tensor,
        rope: Rope | None,
        mask: Mask,
        keys: Tensor | None,
        kv: KeysAndValues | None,
        cache: KVCache | None,
    ) -> BlockOutput:
        """Apply the block.

        Args:
            x: (B, S, D).
            rope: the RoPE table of the S positions, or None.
            mask: for this layer's window.
            keys: (B,) int64 noise keys of the rows in this layer, for a router with jitter.
            kv: keys and values of an earlier layer, if this one reuses them.
            cache: this layer's cached keys and values; it is extended.
        """
        h, rope = self.norm_1(x), rope if self.encodes_positions else None
        if kv is not None or self.gives_kv:
            assert isinstance(self.attn, Attention)
            y, kv = self.attn.attend(h, rope, mask, cache, kv)  # (B, S, D)
        else:
            y = self.attn(h, rope, mask, cache)  # (B, S, D)
        x = x + self._kept(y)
        y, router = self.ffn(self.norm_2(x), keys)  # (B, S, D)
        return BlockOutput(x + self._kept(y), router, kv if self.gives_kv else None)

    def _kept(self, y: Tensor) -> Tensor:
        return F.dropout(y, self.dropout, self.training) if self.dropout else y


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert all parameters to a dtype, in place.

    Buffers keep their dtype: a router's bias sums up small steps, which bf16 would round away.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


class CausalLM(nn.Module):
    """A decoder-only language model."""

    own_blocks = True  # whether `blocks` holds `Block`s

    def __init__(self, config: CausalLMConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.wpe = nn.Embedding(config.max_seq_len, config.d_model) if config.has_learned_positions else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm_f = config.norm.build(config.d_model)
        # A tied head has no module of its own; it uses `wte.weight`, which FSDP then gathers with the root.
        self.lm_head = None if config.tie_word_embeddings else Head(config.vocab_size, config.d_model)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        *,
        sequence_ids: Tensor | None = None,
        positions: Tensor | None = None,
        keys: Tensor | None = None,
        cache: Cache | None = None,
        last_only: bool = False,
        by_token: bool = False,
        at: Tensor | None = None,
    ) -> Output:
        """Compute the logits of the next tokens or, given labels, the loss.

        Args:
            tokens: (B, S) int64.
            labels: (B, S) int64, the next token of each, or -100 to ignore it; None: return logits.
            sequence_ids: (B, S) int32 document numbers; used if attn_config.attn_uses_sequence_id.
            positions: (B, S) int64, for learned position embeddings; None: positions in the row. RoPE and ALiBi depend
                only on differences, which are the same in the row and in a document.
            keys: (B,) int64 noise keys of the rows, for routers with jitter.
            cache: keys and values of the preceding tokens; it is extended.
            last_only: return only the logits of the last token, (B, 1, V), for sampling.
            by_token: whether each label's loss gets a gradient.
            at: (N,) int64 indices into the B * S tokens: return only their logits, (1, N, V).
        """
        x, rope, masks = self._prepare(tokens, sequence_ids, positions, cache)  # x (B, S, D)
        stats: list[RouterStats] = []
        shared: dict[int, KeysAndValues] = {}  # by layer
        for layer, block in enumerate(self.blocks):
            past = None if cache is None else cache.layers[layer]
            noise = None if keys is None else layer_keys(keys, layer)
            source = self.config.kv_source(layer)
            kv = None if source is None else shared[source]
            x, router, kv = block(x, rope, masks[self.config.window(layer)], noise, kv, past)
            if kv is not None:
                shared[layer] = kv
            if router is not None:
                stats.append(router)
        if at is not None:
            x = x.flatten(0, 1)[at].unsqueeze(0)  # (1, N, D)
        x = self.norm_f(x[:, -1:] if last_only else x)  # (B, S, D), or (B, 1, D)
        if self.config.logits_factor != 1:
            x = x * self.config.logits_factor
        softcap = self.config.final_logit_softcapping
        if self.lm_head is None:
            y = logits_or_loss(x, self.wte.weight, labels, softcap, by_token)
        else:
            y = self.lm_head(x, labels, softcap, by_token)
        router = RouterStats(*(torch.stack(field) for field in zip(*stats, strict=True))) if stats else None
        if isinstance(y, Tensor):
            return Output(y, None, None, router)
        return Output(None, y.total, y.by_token.view_as(tokens), router)

    def init_buffers(self) -> None:
        """Initialize buffers that are not weights, after `to_empty`; this model has none."""

    def _prepare(
        self, tokens: Tensor, sequence_ids: Tensor | None, learned: Tensor | None, cache: Cache | None
    ) -> tuple[Tensor, Rope | None, dict[int, Mask]]:
        """Compute what the blocks share: embeddings (B, S, D), the RoPE table, and a mask for each window."""
        config, length = self.config, tokens.shape[1]
        attention, offset = config.attention, 0 if cache is None else cache.length
        if not attention.attn_uses_sequence_id:
            sequence_ids = None
        if sequence_ids is not None and cache is not None:
            raise ValueError("sequence_ids cannot be combined with a cache; generate from one document per row")
        positions = torch.arange(offset, offset + length, device=tokens.device)  # (S,)
        if cache is not None and cache.padding is not None:  # padding counts as a separate document
            start = cache.padding[:, None]  # (B, 1)
            sequence_ids = (torch.arange(offset + length, device=tokens.device) >= start).int()  # (B, P)
            positions = (positions - start).clamp(min=0)  # (B, S)
        x = self.wte(tokens)  # (B, S, D)
        if self.wpe is not None:
            if offset + length > config.max_seq_len:
                raise ValueError(f"{offset + length} tokens exceed the {config.max_seq_len} learned positions")
            x = x + self.wpe(positions if learned is None else learned)
        if config.embedding_fraction != 1:
            still = x.detach()
            x = still + config.embedding_fraction * (x - still)  # leaves the values bitwise unchanged
        if config.emb_pdrop:
            x = F.dropout(x, config.emb_pdrop, self.training)
        rope = None
        if attention.rope:
            dim = attention.rotary_dim(config.d_model, config.n_heads)
            rope = rope_table(attention.rope_scaling, attention.rope_theta, dim, positions)
        windows = {config.window(layer) for layer in range(config.n_layers)}
        masks = {
            window: attention_mask(attention, window, length, offset, sequence_ids, tokens.device) for window in windows
        }
        return x, rope, masks
