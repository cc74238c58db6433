"""Causal self-attention: grouped queries, RoPE or ALiBi, sliding windows and document masks.

Shapes: B rows, S sequence (queries of this call), P keys (P = S without a cache), D d_model, H query heads, G kv heads,
C head_dim.
The model builds the mask once per forward (`attention_mask`) for all layers with the same window. It is None for plain
causal attention, and for a single query that attends to everything, because PyTorch's fused kernels are fastest without
a mask. Otherwise it is a FlexAttention `BlockMask` on CUDA and a boolean tensor elsewhere.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from llmfoundry.config import Choice
from llmfoundry.kernels.norm_rotate import has_kernel, norm_rotate
from llmfoundry.layers import flex
from llmfoundry.layers.kv_cache import KVCache
from llmfoundry.layers.norm import NormConfig, NormType, RMSNorm
from llmfoundry.layers.rope import NoScaling, Rope, RopeScaling, rotate
from llmfoundry.layers.scores import alibi_bias, alibi_slopes, plain_attention

Mask = Tensor | BlockMask | None
FULL = -1  # no sliding window: attend to every earlier token


class AttentionConfig(Choice, tag="attn_type"):
    """Base class of the attention configs: `attn_config` in the YAML, with the keys that all types share."""

    attn_type: str = "multihead_attention"  # how keys and values are computed
    # auto: PyTorch's fused kernels (cuDNN's on Hopper), or FlexAttention where a mask needs it. flex: CUDA only, slower
    # than cuDNN, but bitwise reproducible
    attn_impl: Literal["auto", "sdpa", "flex"] = "auto"
    rope: bool = False  # rotary position embeddings
    rope_theta: float = Field(10000.0, gt=0)  # base of the wavelengths
    rope_scaling: RopeScaling = NoScaling()  # for contexts longer than in pretraining
    # Number of earlier tokens that a token attends to besides itself, as in LLM Foundry; -1: all. `transformers`
    # includes the token itself: its sliding_window is this plus 1.
    sliding_window_size: int = Field(default=FULL, ge=FULL)
    attn_uses_sequence_id: bool = False  # a token attends only to its own document
    bias: bool | None = None  # bias of the input projection; None: as the model's no_bias says
    out_bias: bool | None = None  # bias of the output projection; None: as no_bias

    def filled(self, bias: bool) -> Self:
        """Return a copy with the model's values for the keys that the YAML leaves out."""
        update = {key: bias for key in ("bias", "out_bias") if getattr(self, key) is None}
        return self.model_copy(update=update)

    @property
    def has_positions(self) -> bool:
        """Whether attention encodes positions itself, so that the model needs no learned position embeddings."""
        return self.rope

    @property
    def needs_scores(self) -> bool:
        """Whether the scores are modified, which PyTorch's fused kernels cannot do without a mask."""
        return False

    @property
    def dropout(self) -> float:
        """Dropout probability of the attention weights in training; FlexAttention does not support it."""
        return 0.0

    def check(self, d_model: int, n_heads: int) -> None:
        """Raise ValueError if the sizes do not fit the model's."""
        raise NotImplementedError

    def rotary_dim(self, d_model: int, n_heads: int) -> int:
        """Return the number of dims per head that RoPE rotates."""
        raise NotImplementedError

    def n_params(self, d_model: int, n_heads: int, norm: NormConfig, reuses_kv: bool = False) -> int:
        """Return the number of parameters in one layer, which may reuse the keys and values of another."""
        raise NotImplementedError

    def score_dims(self, d_model: int, n_heads: int) -> float:
        """Return the mean of score dims and value dims, summed over heads: the cost of one query-key pair."""
        raise NotImplementedError

    def build(self, d_model: int, n_heads: int, norm: NormConfig, reuses_kv: bool = False) -> nn.Module:
        """Build the module, whose forward is `(x, rope, mask, cache) -> (B, S, D)`."""
        raise NotImplementedError


class GroupedQueryConfig(
    AttentionConfig, names=("multihead_attention", "grouped_query_attention", "multiquery_attention")
):
    """Softmax attention with H query heads over G key-value heads (Ainslie et al. 2023, arXiv:2305.13245)."""

    kv_n_heads: int | None = Field(default=None, ge=1)  # number of key-value heads, for grouped_query_attention only
    head_dim: int | None = Field(default=None, ge=1)  # None: d_model / n_heads
    softmax_scale: float | None = None  # None: 1 / sqrt(head_dim)
    qk_norm: bool = False  # normalize each head of q and k, as in Qwen3
    qk_ln: bool = False  # normalize all heads of q (of k) together, as in OLMoE
    norm_type: NormType | None = None  # type of qk_norm and qk_ln; None: the model's norm_type
    norm_eps: float | None = Field(default=None, gt=0)  # eps of qk_norm and qk_ln; None: the model's norm_eps
    clip_qkv: float | None = Field(default=None, gt=0)  # clamp q, k and v to [-x, x]
    clip_qkv_after_norm: bool = False  # as OLMoE in `transformers`; LLM Foundry and OLMo clip first
    attn_logit_softcapping: float | None = Field(default=None, gt=0)  # scores become c * tanh(score / c), as in Gemma 2
    # Dropout of the attention weights in training. With windows, documents or ALiBi on a GPU, it uses a dense mask
    # instead of FlexAttention.
    attn_pdrop: float = Field(default=0.0, ge=0, lt=1)
    sinks: bool = False  # a learned score per head that joins the softmax and has no value, as in gpt-oss
    alibi: bool = False  # scores decrease with distance, one slope per head (Press et al. 2021, arXiv:2108.12409)
    alibi_bias_max: int = Field(default=8, ge=1)  # the smallest slope is 2^-alibi_bias_max

    @property
    def has_positions(self) -> bool:
        """Whether attention encodes positions itself, so that the model needs no learned position embeddings."""
        return self.rope or self.alibi

    @property
    def needs_scores(self) -> bool:
        """Whether the scores are modified, which PyTorch's fused kernels cannot do without a mask."""
        return self.needs_plain or self.alibi

    @property
    def needs_plain(self) -> bool:
        """Whether the scores are modified in a way that no mask can express."""
        return self.attn_logit_softcapping is not None or self.sinks

    @property
    def dropout(self) -> float:
        """Dropout probability of the attention weights in training; FlexAttention does not support it."""
        return self.attn_pdrop

    def head_norm(self, norm: NormConfig) -> NormConfig:
        """Return the config of the q and k norms, given the model's norm."""
        return norm.model_copy(
            update={"norm_type": self.norm_type or norm.norm_type, "eps": self.norm_eps or norm.eps},
        )

    def check(self, d_model: int, n_heads: int) -> None:
        """Raise ValueError if the sizes do not fit the model's."""
        if self.qk_norm and self.qk_ln:
            raise ValueError("qk_norm (each head) and qk_ln (all heads) exclude each other; keep one")
        if self.head_dim is None and d_model % n_heads:
            raise ValueError(f"d_model={d_model} is not divisible by n_heads={n_heads}; change one or set head_dim")
        if self.attn_type == "grouped_query_attention":
            if self.kv_n_heads is None:
                raise ValueError("attn_type=grouped_query_attention needs kv_n_heads")
        elif self.kv_n_heads not in (None, self.kv_heads(n_heads)):
            raise ValueError(
                f"kv_n_heads={self.kv_n_heads} contradicts attn_type={self.attn_type}; "
                "set attn_type: grouped_query_attention"
            )
        if n_heads % self.kv_heads(n_heads):
            raise ValueError(f"n_heads={n_heads} is not divisible by kv_n_heads={self.kv_n_heads}")
        if self.rope and self.rotary_dim(d_model, n_heads) % 2:
            raise ValueError(f"head_dim={self.rotary_dim(d_model, n_heads)} is odd; rope rotates dims in pairs")
        if self.rope and self.alibi:
            raise ValueError("attn_config.rope and attn_config.alibi are both on; keep one")
        if self.attn_impl == "sdpa" and self.needs_plain:
            raise ValueError("attn_impl=sdpa can neither softcap scores nor add sinks; use auto")
        if self.attn_impl == "flex" and self.dropout:
            raise ValueError(f"attn_impl=flex cannot drop weights (attn_pdrop={self.attn_pdrop}); use auto")
        if (self.norm_type or self.norm_eps) and not (self.qk_norm or self.qk_ln):
            raise ValueError("norm_type and norm_eps belong to qk_norm or qk_ln, which are off; set those of the model")

    def kv_heads(self, n_heads: int) -> int:
        """Return the number of key-value heads, G."""
        if self.attn_type == "grouped_query_attention":
            return self.kv_n_heads or n_heads
        return 1 if self.attn_type == "multiquery_attention" else n_heads

    def rotary_dim(self, d_model: int, n_heads: int) -> int:
        """Return the number of dims per head that RoPE rotates: all of them, C."""
        return self.head_dim or d_model // n_heads

    def score_dims(self, d_model: int, n_heads: int) -> int:
        """Return H * C; see `AttentionConfig`."""
        return n_heads * self.rotary_dim(d_model, n_heads)

    def n_params(self, d_model: int, n_heads: int, norm: NormConfig, reuses_kv: bool = False) -> int:
        """Return the number of parameters in one layer, which may reuse the keys and values of another."""
        head, kv = self.rotary_dim(d_model, n_heads), 0 if reuses_kv else self.kv_heads(n_heads)
        rows, columns = (n_heads + 2 * kv) * head, n_heads * head
        biases = (rows if self.bias else 0) + (d_model if self.out_bias else 0)
        norm = self.head_norm(norm)
        norms = (1 if reuses_kv else 2) * norm.n_params(head) if self.qk_norm else 0
        if self.qk_ln:
            norms = norm.n_params(n_heads * head) + norm.n_params(kv * head)
        return (rows + columns) * d_model + biases + norms + (n_heads if self.sinks else 0)

    def build(self, d_model: int, n_heads: int, norm: NormConfig, reuses_kv: bool = False) -> Attention:
        """Build the module."""
        return Attention(self, d_model, n_heads, norm, reuses_kv)


class KeysAndValues(NamedTuple):
    """Keys and values that layers can share: normalized, clipped and rotated."""

    k: Tensor  # (B, G, P, C)
    v: Tensor  # (B, G, P, C)


class Attended(NamedTuple):
    """The output of attention, with the keys and values that it used."""

    y: Tensor  # (B, S, D)
    kv: KeysAndValues


class Attention(nn.Module):
    """Grouped-query attention. The rows of `wqkv` are queries, then keys, then values.

    A layer that reuses the keys and values of an earlier one has `wq` instead.
    """

    def __init__(
        self, config: GroupedQueryConfig, d_model: int, n_heads: int, norm: NormConfig, reuses_kv: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.n_heads, self.kv_heads = n_heads, config.kv_heads(n_heads)
        self.head_dim = config.rotary_dim(d_model, n_heads)
        self.scale = self.head_dim**-0.5 if config.softmax_scale is None else config.softmax_scale
        self.reuses_kv = reuses_kv
        rows = (n_heads + (0 if reuses_kv else 2 * self.kv_heads)) * self.head_dim
        if reuses_kv:
            self.wq = nn.Linear(d_model, rows, bias=bool(config.bias))
        else:
            self.wqkv = nn.Linear(d_model, rows, bias=bool(config.bias))
        self.out_proj = nn.Linear(n_heads * self.head_dim, d_model, bias=bool(config.out_bias))
        if config.qk_norm or config.qk_ln:
            each, norm = not config.qk_ln, config.head_norm(norm)
            self.q_norm = norm.build(self.head_dim if each else n_heads * self.head_dim)
            if not reuses_kv:
                self.k_norm = norm.build(self.head_dim if each else self.kv_heads * self.head_dim)
        self.sinks = nn.Parameter(torch.zeros(n_heads)) if config.sinks else None
        self.dropout = config.dropout

    def forward(self, x: Tensor, rope: Rope | None, mask: Mask, cache: KVCache | None = None) -> Tensor:
        """Attend from each token of `x` to itself and the tokens before it.

        Args:
            x: (B, S, D).
            rope: the RoPE table of these S positions, or None.
            mask: from `attention_mask`, for this layer's window.
            cache: keys and values of the preceding tokens; those of `x` are appended.

        Returns:
            (B, S, D).
        """
        return self.attend(x, rope, mask, cache, None).y

    def attend(
        self, x: Tensor, rope: Rope | None, mask: Mask, cache: KVCache | None, kv: KeysAndValues | None
    ) -> Attended:
        """As `forward`, for layers that share keys and values.

        Args:
            kv: keys and values of the layer that this one reuses, including cached tokens; the cache is then not
                changed.
        """
        q, own = self._project(x, rope)  # (B, H, S, C), (B, G, S, C) twice
        if kv is None:
            assert own is not None
            kv = own if cache is None else KeysAndValues(*cache.append(own.k, own.v))  # (B, G, P, C)
        return Attended(self.out_proj(self._weighted(q, kv, mask)), kv)

    def _weighted(self, q: Tensor, kv: KeysAndValues, mask: Mask) -> Tensor:
        """Compute the weighted values of all heads: (B, H, S, C) -> (B, S, H C)."""
        k, v = kv
        bias, drop = None, self.dropout if self.training else 0.0
        if self.config.alibi and not isinstance(mask, BlockMask):
            bias = alibi_bias(self._slopes(q.device), q.shape[2], k.shape[2])  # (H, S, P)
        if isinstance(mask, BlockMask):
            y = self._flex(q, k, v, mask)  # (B, H, S, C)
        elif self.config.needs_plain:
            softcap = self.config.attn_logit_softcapping
            y = plain_attention(q, k, v, mask, self.scale, softcap, self.sinks, bias, drop)
        else:
            if bias is not None:
                mask = (bias if mask is None else bias.masked_fill(~mask, float("-inf"))).to(q.dtype)
            grouped = self.kv_heads != self.n_heads
            if grouped and mask is not None:  # PyTorch's fused kernels support groups or a mask, not both
                k, v = (each.repeat_interleave(self.n_heads // self.kv_heads, dim=1) for each in (k, v))  # (B, H, P, C)
                grouped = False
            # One query sees all keys. A bool even in a graph for any length, which a symbolic value would break.
            causal = True if mask is None and q.shape[2] > 1 else False
            y = F.scaled_dot_product_attention(
                q, k, v, mask, dropout_p=drop, is_causal=causal, scale=self.scale, enable_gqa=grouped
            )
        return y.transpose(1, 2).flatten(2)  # (B, S, H C)

    def _project(self, x: Tensor, rope: Rope | None) -> tuple[Tensor, KeysAndValues | None]:
        """Compute queries and, unless reused, keys and values: normalized, clipped and rotated as configured."""
        config, clip = self.config, self.config.clip_qkv
        qkv = self.wq(x) if self.reuses_kv else self.wqkv(x)  # (B, S, (H + 2G) C)
        if rope is not None and self._in_one_pass(qkv):
            weights = self.q_norm.weight, self.k_norm.weight
            q, k, v = norm_rotate(qkv, *weights, *rope, self.n_heads, self.kv_heads, self.q_norm.eps)
            return q.transpose(1, 2), KeysAndValues(k.transpose(1, 2), v.transpose(1, 2))
        if clip is not None and not config.clip_qkv_after_norm:
            qkv = qkv.clamp(-clip, clip)
        heads = qkv.unflatten(-1, (-1, self.head_dim))  # (B, S, H + 2G, C)
        if self.reuses_kv:
            return self._finished(heads, "q_norm", rope), None
        q, k, v = heads.split((self.n_heads, self.kv_heads, self.kv_heads), dim=2)  # (B, S, H, C), (B, S, G, C) twice
        if clip is not None and config.clip_qkv_after_norm:
            v = v.clamp(-clip, clip)
        k = self._finished(k, "k_norm", rope)  # (B, G, S, C)
        return self._finished(q, "q_norm", rope), KeysAndValues(k, v.transpose(1, 2))

    def _in_one_pass(self, qkv: Tensor) -> bool:
        """Whether the fused Triton kernel can normalize and rotate."""
        config = self.config
        normed = (config.qk_norm or config.qk_ln) and not self.reuses_kv and isinstance(self.q_norm, RMSNorm)
        return normed and config.clip_qkv is None and has_kernel(qkv)

    def _finished(self, heads: Tensor, norm: str, rope: Rope | None) -> Tensor:
        """Normalize, clip (if configured after the norm) and rotate q or k: (B, S, H, C) -> (B, H, S, C)."""
        config, clip = self.config, self.config.clip_qkv
        if config.qk_norm:
            heads = getattr(self, norm)(heads)
        if config.qk_ln:
            heads = getattr(self, norm)(heads.flatten(2)).view_as(heads)
        if clip is not None and config.clip_qkv_after_norm:
            heads = heads.clamp(-clip, clip)
        return (heads if rope is None else rotate(heads, rope)).transpose(1, 2)

    def _slopes(self, device: torch.device) -> Tensor:  # (H,)
        return alibi_slopes(self.n_heads, self.config.alibi_bias_max, device)

    def _flex(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        """Attend with FlexAttention: (B, H, S, C), (B, G, S, C) twice -> (B, H, S, C)."""
        cap = self.config.attn_logit_softcapping
        slopes = self._slopes(q.device) if self.config.alibi else None

        def changed(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            score = score if cap is None else cap * torch.tanh(score / cap)
            return score if slopes is None else score + slopes[h] * (j - i)

        score = None if cap is None and slopes is None else changed
        y, lse = flex.attend(q, k, v, mask, self.scale, score, lse=self.sinks is not None)
        if self.sinks is not None and lse is not None:  # a sink scales down all weights
            y = (y * torch.sigmoid(lse - self.sinks.float()[:, None])[..., None]).to(q.dtype)
        return y


def attention_mask(
    config: AttentionConfig,
    window: int,
    n_queries: int,
    offset: int,
    sequence_ids: Tensor | None,
    device: torch.device,
) -> Mask:
    """Build the mask of one forward for the layers with this window.

    Args:
        config: of attention.
        window: number of earlier tokens to attend to besides the token itself; -1: all.
        n_queries: S.
        offset: number of cached tokens; query i is at position offset + i.
        sequence_ids: (B, P) document numbers, or None to attend across documents.
        device: of the mask.

    Returns:
        None, a `BlockMask`, or a boolean tensor that broadcasts to (B, H, S, P), True where a query attends to a key.

    Raises:
        ValueError: for attn_impl=flex on a device other than CUDA.
    """
    if config.attn_impl == "flex" and device.type != "cuda":
        raise ValueError(f"attn_config.attn_impl=flex needs a CUDA device, found {device.type}; use auto")
    windowed = window != FULL and window < offset + n_queries - 1
    plain = not windowed and sequence_ids is None
    fused = config.attn_impl != "flex" and not config.needs_scores
    if plain and (n_queries == 1 or (offset == 0 and fused)):
        return None
    if device.type == "cuda" and config.attn_impl != "sdpa" and offset == 0 and not config.dropout:
        return flex.block_mask(window if windowed else flex.NO_WINDOW, n_queries, sequence_ids, device)
    i = torch.arange(offset, offset + n_queries, device=device)[:, None]  # (S, 1)
    j = torch.arange(offset + n_queries, device=device)  # (P,)
    seen = j <= i  # (S, P)
    if windowed:
        seen = seen & (i - j <= window)
    if sequence_ids is not None:
        seen = seen & (sequence_ids[:, offset:, None] == sequence_ids[:, None, :])  # (B, S, P)
        return seen[:, None]  # (B, 1, S, P)
    return seen[None, None]  # (1, 1, S, P)
