"""Causal self-attention: grouped queries, rotary positions or ALiBi, windows, documents, and the key-value cache.

Shapes: B rows, S sequence (queries of this call), P keys seen (P = S without a cache), D d_model, H query
heads, G kv heads, C head_dim.
The model builds the mask once per forward (`attention_mask`) for all layers with the same window. It is None for plain
causal attention, and for a single query that sees everything: torch's fused kernels are fastest without a mask.
Otherwise it is a FlexAttention `BlockMask` on CUDA and a boolean tensor elsewhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Literal, ParamSpec, Self, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention.flex_attention import (
    AuxOutput,
    AuxRequest,
    BlockMask,
    create_block_mask,
    flex_attention,
)

from llmfoundry.config import Choice
from llmfoundry.layers.norm import NormConfig
from llmfoundry.layers.rope import NoScaling, Rope, RopeScaling, rotate

P = ParamSpec("P")
R = TypeVar("R")
Mask = Tensor | BlockMask | None
FULL = -1  # the window that sees every earlier token


@functools.cache
def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Compile at first use: doing so at import would cost every command seconds."""
    return torch.compile(function)


class KVCache:
    """Keys and values of one layer's earlier tokens (or their latents), in buffers that grow by doubling."""

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = capacity
        self.length = 0
        self._buffers: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the newest keys and values.

        Args:
            k: (B, G, S, C).
            v: (B, G, S, C); its C may differ from that of `k`.

        Returns:
            All keys and values so far, (B, G, P, C) each; views of buffers that the next call extends.
        """
        end = self.length + k.shape[2]
        if self._buffers is None or end > self.capacity:
            self.capacity = max(end, self.capacity if self._buffers is None else 2 * self.capacity)
            self._buffers = (self._grown(k, 0), self._grown(v, 1))
        for buffer, new in zip(self._buffers, (k, v), strict=True):
            buffer[:, :, self.length : end] = new
        self.length = end
        return self._buffers[0][:, :, :end], self._buffers[1][:, :, :end]

    def _grown(self, new: Tensor, which: int) -> Tensor:
        buffer = new.new_empty(new.shape[0], new.shape[1], self.capacity, new.shape[3])
        if self._buffers is not None:
            buffer[:, :, : self.length] = self._buffers[which][:, :, : self.length]
        return buffer


class AttentionConfig(Choice, tag="attn_type"):
    """Root of the attention family: `attn_config` in the YAML, with the keys that all kinds share."""

    attn_type: str = "multihead_attention"  # how keys and values are made
    # auto: torch's fused kernels, FlexAttention where a mask needs it; flex: CUDA only
    attn_impl: Literal["auto", "sdpa", "flex"] = "auto"
    rope: bool = False  # rotary positions
    rope_theta: float = Field(10000.0, gt=0)  # base of the rotation's wavelengths
    rope_scaling: RopeScaling = NoScaling()  # for contexts longer than those trained on
    # Earlier tokens that a token sees besides itself, as in LLM Foundry; -1: all. `transformers` counts the token
    # too: its sliding_window is this plus 1.
    sliding_window_size: int = Field(default=FULL, ge=FULL)
    attn_uses_sequence_id: bool = False  # a token sees its own document only
    bias: bool | None = None  # of the projection in; None: as the model's no_bias says
    out_bias: bool | None = None  # of the projection out

    def filled(self, bias: bool) -> Self:
        """A copy with the model's value for each key that the YAML left out."""
        update = {key: bias for key in ("bias", "out_bias") if getattr(self, key) is None}
        return self.model_copy(update=update)

    @property
    def has_positions(self) -> bool:
        """Whether attention encodes positions itself, so that the model needs no learned position embedding."""
        return self.rope

    @property
    def needs_scores(self) -> bool:
        """Whether the scores are modified, which torch's fused kernels cannot do without a mask."""
        return False

    def check(self, d_model: int, n_heads: int) -> None:
        """Raise ValueError where the sizes do not fit the model's."""
        raise NotImplementedError

    def rotary_dim(self, d_model: int, n_heads: int) -> int:
        """Dims of a head that rotate."""
        raise NotImplementedError

    def n_params(self, d_model: int, n_heads: int, norm: NormConfig) -> int:
        """Parameters of one layer."""
        raise NotImplementedError

    def score_dims(self, d_model: int, n_heads: int) -> float:
        """Mean of score dims and value dims, summed over heads: what one pair of query and key costs."""
        raise NotImplementedError

    def build(self, d_model: int, n_heads: int, norm: NormConfig) -> nn.Module:
        """The module, whose forward is `(x, rope, mask, cache) -> (B, S, D)`."""
        raise NotImplementedError


class GroupedQueryConfig(
    AttentionConfig, names=("multihead_attention", "grouped_query_attention", "multiquery_attention")
):
    """Softmax attention with H query heads over G key-value heads (Ainslie et al. 2023, arXiv:2305.13245)."""

    kv_n_heads: int | None = Field(default=None, ge=1)  # grouped_query_attention only
    head_dim: int | None = Field(default=None, ge=1)  # None: d_model / n_heads
    softmax_scale: float | None = None  # None: 1 / sqrt(head_dim)
    qk_norm: bool = False  # normalise each head of queries and keys, as Qwen3
    qk_ln: bool = False  # normalise all heads of queries (of keys) together, as OLMoE
    clip_qkv: float | None = Field(default=None, gt=0)  # clamp queries, keys and values to -x ... x
    clip_qkv_after_norm: bool = False  # as OLMoE in `transformers`; LLM Foundry and OLMo clip first
    attn_logit_softcapping: float | None = Field(default=None, gt=0)  # scores become c * tanh(score / c), as Gemma 2
    sinks: bool = False  # a learned score per head that joins the softmax and has no value, as gpt-oss
    alibi: bool = False  # scores fall with distance, one slope per head (Press et al. 2021, arXiv:2108.12409)
    alibi_bias_max: int = Field(default=8, ge=1)  # the smallest slope is 2^-alibi_bias_max

    @property
    def has_positions(self) -> bool:
        """Whether attention encodes positions itself, so that the model needs no learned position embedding."""
        return self.rope or self.alibi

    @property
    def needs_scores(self) -> bool:
        """Whether the scores are modified, which torch's fused kernels cannot do without a mask."""
        return self.needs_plain or self.alibi

    @property
    def needs_plain(self) -> bool:
        """Whether the scores are modified in a way that no mask can express."""
        return self.attn_logit_softcapping is not None or self.sinks

    def check(self, d_model: int, n_heads: int) -> None:
        """Raise ValueError where the sizes do not fit the model's."""
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

    def kv_heads(self, n_heads: int) -> int:
        """Key-value heads, G."""
        if self.attn_type == "grouped_query_attention":
            return self.kv_n_heads or n_heads
        return 1 if self.attn_type == "multiquery_attention" else n_heads

    def rotary_dim(self, d_model: int, n_heads: int) -> int:
        """Dims of a head that rotate: all of them, C."""
        return self.head_dim or d_model // n_heads

    def score_dims(self, d_model: int, n_heads: int) -> int:
        """As in `AttentionConfig`: H * C."""
        return n_heads * self.rotary_dim(d_model, n_heads)

    def n_params(self, d_model: int, n_heads: int, norm: NormConfig) -> int:
        """Parameters of one layer."""
        head, kv = self.rotary_dim(d_model, n_heads), self.kv_heads(n_heads)
        rows, columns = (n_heads + 2 * kv) * head, n_heads * head
        biases = (rows if self.bias else 0) + (d_model if self.out_bias else 0)
        norms = 2 * norm.n_params(head) if self.qk_norm else 0
        if self.qk_ln:
            norms = norm.n_params(n_heads * head) + norm.n_params(kv * head)
        return (rows + columns) * d_model + biases + norms + (n_heads if self.sinks else 0)

    def build(self, d_model: int, n_heads: int, norm: NormConfig) -> Attention:
        """The module."""
        return Attention(self, d_model, n_heads, norm)


class Attention(nn.Module):
    """Grouped-query attention. `wqkv` holds the rows of queries, then keys, then values."""

    def __init__(self, config: GroupedQueryConfig, d_model: int, n_heads: int, norm: NormConfig) -> None:
        super().__init__()
        self.config = config
        self.n_heads, self.kv_heads = n_heads, config.kv_heads(n_heads)
        self.head_dim = config.rotary_dim(d_model, n_heads)
        self.scale = self.head_dim**-0.5 if config.softmax_scale is None else config.softmax_scale
        rows = (n_heads + 2 * self.kv_heads) * self.head_dim
        self.wqkv = nn.Linear(d_model, rows, bias=bool(config.bias))
        self.out_proj = nn.Linear(n_heads * self.head_dim, d_model, bias=bool(config.out_bias))
        if config.qk_norm or config.qk_ln:
            each = not config.qk_ln
            self.q_norm = norm.build(self.head_dim if each else n_heads * self.head_dim)
            self.k_norm = norm.build(self.head_dim if each else self.kv_heads * self.head_dim)
        self.sinks = nn.Parameter(torch.zeros(n_heads)) if config.sinks else None

    def forward(self, x: Tensor, rope: Rope | None, mask: Mask, cache: KVCache | None = None) -> Tensor:
        """Attend from each token of `x` to those before it.

        Args:
            x: (B, S, D).
            rope: the table of these S positions, or None.
            mask: what `attention_mask` made for this layer's window.
            cache: keys and values of the tokens before `x`; those of `x` are added.

        Returns:
            (B, S, D).
        """
        q, k, v = self._project(x, rope)  # (B, S, H, C), (B, S, G, C) twice
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, S, C), (B, G, S, C) twice
        if cache is not None:
            k, v = cache.append(k, v)  # (B, G, P, C)
        bias = None
        if self.config.alibi and not isinstance(mask, BlockMask):
            bias = alibi_bias(self._slopes(q.device), q.shape[2], k.shape[2])  # (H, S, P)
        if isinstance(mask, BlockMask):
            y = self._flex(q, k, v, mask)  # (B, H, S, C)
        elif self.config.needs_plain:
            y = plain_attention(q, k, v, mask, self.scale, self.config.attn_logit_softcapping, self.sinks, bias)
        else:
            if bias is not None:
                mask = (bias if mask is None else bias.masked_fill(~mask, float("-inf"))).to(q.dtype)
            grouped = self.kv_heads != self.n_heads
            if grouped and mask is not None:  # torch's fused kernels take groups or a mask, not both
                k, v = (each.repeat_interleave(self.n_heads // self.kv_heads, dim=1) for each in (k, v))  # (B, H, P, C)
                grouped = False
            causal = mask is None and q.shape[2] > 1  # one query sees all keys
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=self.scale, enable_gqa=grouped)
        return self.out_proj(y.transpose(1, 2).flatten(2))  # (B, S, H C) -> (B, S, D)

    def _project(self, x: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, normalised, clipped and rotated as the config says."""
        config, clip = self.config, self.config.clip_qkv
        qkv = self.wqkv(x)  # (B, S, (H + 2G) C)
        if clip is not None and not config.clip_qkv_after_norm:
            qkv = qkv.clamp(-clip, clip)
        heads = qkv.unflatten(-1, (-1, self.head_dim))  # (B, S, H + 2G, C)
        q, k, v = heads.split((self.n_heads, self.kv_heads, self.kv_heads), dim=2)  # (B, S, H, C), (B, S, G, C) twice
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if config.qk_ln:
            q, k = self.q_norm(q.flatten(2)).view_as(q), self.k_norm(k.flatten(2)).view_as(k)
        if clip is not None and config.clip_qkv_after_norm:
            q, k, v = q.clamp(-clip, clip), k.clamp(-clip, clip), v.clamp(-clip, clip)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return q, k, v

    def _slopes(self, device: torch.device) -> Tensor:  # (H,)
        return alibi_slopes(self.n_heads, self.config.alibi_bias_max, device)

    def _flex(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        """(B, H, S, C), (B, G, S, C) twice -> (B, H, S, C), by FlexAttention."""
        cap = self.config.attn_logit_softcapping
        slopes = self._slopes(q.device) if self.config.alibi else None

        def changed(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            score = score if cap is None else cap * torch.tanh(score / cap)
            return score if slopes is None else score + slopes[h] * (j - i)

        attend: Callable[..., tuple[Tensor, AuxOutput]] = flex_attention
        if not torch.compiler.is_compiling():
            attend = compiled(flex_attention)
        y, aux = attend(
            q, k, v,
            score_mod=None if cap is None and slopes is None else changed,
            block_mask=mask,
            scale=self.scale,
            enable_gqa=self.kv_heads != self.n_heads,
            return_aux=AuxRequest(lse=self.sinks is not None),
        )  # fmt: skip
        if self.sinks is not None and aux.lse is not None:  # lse (B, H, S); a sink shrinks all weights
            y = (y * torch.sigmoid(aux.lse - self.sinks.float()[:, None])[..., None]).to(q.dtype)
        return y


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention step by step, with float32 scores: the reference, and what modified scores use off CUDA.

    Args:
        q: (B, H, S, C).
        k: (B, G, P, C).
        v: (B, G, P, C).
        mask: boolean, broadcast to (B, H, S, P), True where seen; None: all seen.
        softcap: scores become `softcap * tanh(score / softcap)`.
        sinks: (H,) one score per head that joins the softmax and has no value.
        bias: broadcast to (B, H, S, P), added to the scores after the cap.

    Returns:
        (B, H, S, C) in the dtype of `q`.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)  # (B, H, P, C)
    scores = (q.to(dtype) @ k.to(dtype).transpose(-1, -2)) * scale  # (B, H, S, P)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.to(dtype).view(-1, 1, 1).expand(*scores.shape[:-1], 1)  # (B, H, S, 1)
        weights = torch.cat((scores, column), dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights @ v.to(dtype)).to(q.dtype)


def alibi_slopes(n_heads: int, bias_max: int, device: torch.device) -> Tensor:
    """How fast each head's scores fall, (H,) float32: 2^-(bias_max (h + 1) / H) for H a power of two.

    For any other H, as in MPT: the slopes of the next power of two, every second one first. The operations are those of
    `transformers`, so that the bits are the same.
    """
    power = 2 ** math.ceil(math.log2(n_heads))
    exponents = torch.arange(1, power + 1, dtype=torch.float32, device=device) * (bias_max / power)
    slopes = 1.0 / torch.pow(2, exponents)
    return slopes if power == n_heads else torch.cat((slopes[1::2], slopes[::2]))[:n_heads]


def alibi_bias(slopes: Tensor, n_queries: int, n_keys: int) -> Tensor:
    """Bias on the scores, (H, S, P) float32: minus slope times distance; the last query is at the last key."""
    i = torch.arange(n_keys - n_queries, n_keys, device=slopes.device)[:, None]  # (S, 1)
    j = torch.arange(n_keys, device=slopes.device)  # (P,)
    return slopes[:, None, None] * (j - i)


def attention_mask(
    config: AttentionConfig,
    window: int,
    n_queries: int,
    offset: int,
    sequence_ids: Tensor | None,
    device: torch.device,
) -> Mask:
    """The mask of one forward for the layers with this window.

    Args:
        window: earlier tokens seen besides the token itself; -1: all.
        n_queries: S.
        offset: tokens in the cache; query i is at position offset + i.
        sequence_ids: (B, S) int32 document numbers, or None where tokens see other documents.

    Returns:
        None, a `BlockMask`, or a boolean tensor that broadcasts to (B, H, S, P), True where seen.

    Raises:
        ValueError: for attn_impl=flex off CUDA.
    """
    if config.attn_impl == "flex" and device.type != "cuda":
        raise ValueError(f"attn_config.attn_impl=flex needs a CUDA device, found {device.type}; use auto")
    windowed = window != FULL and window < offset + n_queries - 1
    plain = not windowed and sequence_ids is None
    fused = config.attn_impl != "flex" and not config.needs_scores
    if plain and (n_queries == 1 or (offset == 0 and fused)):
        return None
    if device.type == "cuda" and config.attn_impl != "sdpa" and offset == 0:
        return _block_mask(window if windowed else n_queries, n_queries, sequence_ids, device)
    i = torch.arange(offset, offset + n_queries, device=device)[:, None]  # (S, 1)
    j = torch.arange(offset + n_queries, device=device)  # (P,)
    seen = j <= i  # (S, P)
    if windowed:
        seen = seen & (i - j <= window)
    if sequence_ids is not None:
        seen = seen & (sequence_ids[:, :, None] == sequence_ids[:, None, :])  # (B, S, S)
        return seen[:, None]  # (B, 1, S, S)
    return seen[None, None]  # (1, 1, S, P)


def _block_mask(window: int, length: int, sequence_ids: Tensor | None, device: torch.device) -> BlockMask:
    def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j <= window)

    def near_in_document(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert sequence_ids is not None
        return (j <= i) & (i - j <= window) & (sequence_ids[b, i] == sequence_ids[b, j])

    create = compiled(create_block_mask)  # not compiled, it would hold all (B, S, S) entries
    if sequence_ids is None:
        return create(near, None, None, length, length, device=device)
    return create(near_in_document, len(sequence_ids), None, length, length, device=device)
