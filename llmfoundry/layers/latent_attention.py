"""Multi-head latent attention: keys and values are expanded from one small latent per token (DeepSeek-V2 and V3).

Shapes: B rows, S sequence (queries of this call), P keys, D d_model, H heads, R kv_lora_rank, N qk_nope_head_dim, C
qk_rope_head_dim, V v_head_dim.
A head's query and key have N dims without position and C rotated ones; all heads share the rotated part of the key. The
cache holds only the normalized latent and that shared part, R + C numbers per token. For many queries, the latents are
expanded to keys and values. A single query is instead projected into the latent space, where all heads share keys and
values of R dims, so that the cache is read once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from llmfoundry.layers import flex
from llmfoundry.layers.attention import AttentionConfig, Mask
from llmfoundry.layers.kv_cache import KVCache
from llmfoundry.layers.lora import effective_weight
from llmfoundry.layers.norm import NormConfig, RMSNorm
from llmfoundry.layers.rope import Rope, YarnScaling, rotate, yarn_magnitude

_LATENT_EPS = 1e-6  # whatever the model's norm_eps is: the published checkpoints were trained with it


class LatentConfig(AttentionConfig, names=("multihead_latent_attention",)):
    """Multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434), with the keys of DeepSeek's config.json.

    `bias` applies to the down-projections to the latents, and `out_bias` to the output projection, as `attention_bias`
    in `transformers`. The up-projections, and a query projection without a latent, have no bias.
    """

    rope: bool = True  # rotary position embeddings
    rope_interleaved: bool = True  # rotate adjacent dims together, as in the checkpoints; False: dims i and i + C/2
    # Rank of the queries' latent; None: queries are projected from x
    q_lora_rank: int | None = Field(default=None, ge=1)
    kv_lora_rank: int = Field(ge=1)  # rank of the keys' and values' latent
    qk_nope_head_dim: int = Field(ge=1)  # dims of a query or key without position
    qk_rope_head_dim: int = Field(ge=2)  # dims of a query or key that RoPE rotates
    v_head_dim: int = Field(ge=1)  # dims of a value
    # None: 1 / sqrt(N + C), times the square of YaRN's magnitude for mscale_all_dim, if that is set.
    softmax_scale: float | None = Field(default=None, gt=0)

    @property
    def qk_head_dim(self) -> int:
        """Dims of a query or key, N + C."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def scale(self) -> float:
        """The factor on the scores."""
        if self.softmax_scale is not None:
            return self.softmax_scale
        yarn = self.rope_scaling
        if isinstance(yarn, YarnScaling) and yarn.mscale_all_dim:
            return self.qk_head_dim**-0.5 * yarn_magnitude(yarn.factor, yarn.mscale_all_dim) ** 2
        return self.qk_head_dim**-0.5

    def check(self, d_model: int, n_heads: int) -> None:
        """Raise ValueError if the sizes do not fit the model's."""
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim={self.qk_rope_head_dim} is odd; rope rotates dims in pairs")

    def rotary_dim(self, d_model: int, n_heads: int) -> int:
        """Return the number of dims per head that RoPE rotates, C."""
        return self.qk_rope_head_dim

    def score_dims(self, d_model: int, n_heads: int) -> float:
        """Return the mean of score dims and value dims, summed over heads, for training, where latents are expanded."""
        return n_heads * (self.qk_head_dim + self.v_head_dim) / 2

    def n_params(self, d_model: int, n_heads: int, norm: NormConfig, reuses_kv: bool = False) -> int:
        """Return the number of parameters in one layer; latent attention never reuses keys and values."""
        rank, q_rank = self.kv_lora_rank, self.q_lora_rank
        q_rows, down = n_heads * self.qk_head_dim, rank + self.qk_rope_head_dim
        keys_and_values = down * d_model + rank + rank * n_heads * (self.qk_nope_head_dim + self.v_head_dim)
        queries = q_rows * d_model if q_rank is None else q_rank * (d_model + 1 + q_rows)
        biases = down + (q_rank or 0) if self.bias else 0
        out = n_heads * self.v_head_dim * d_model + (d_model if self.out_bias else 0)
        return queries + keys_and_values + biases + out

    def build(self, d_model: int, n_heads: int, norm: NormConfig, reuses_kv: bool = False) -> LatentAttention:
        """Build the module."""
        return LatentAttention(self, d_model, n_heads)


class LatentAttention(nn.Module):
    """Multi-head latent attention. `wkv_b` holds, for each head, the rows of its key and then of its value."""

    def __init__(self, config: LatentConfig, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.config, self.n_heads = config, n_heads
        q_rank, rank, bias = config.q_lora_rank, config.kv_lora_rank, bool(config.bias)
        if q_rank is None:
            self.wq = nn.Linear(d_model, n_heads * config.qk_head_dim, bias=False)
        else:
            self.wq_a = nn.Linear(d_model, q_rank, bias=bias)
            self.q_norm = RMSNorm(q_rank, _LATENT_EPS)
            self.wq_b = nn.Linear(q_rank, n_heads * config.qk_head_dim, bias=False)
        self.wkv_a = nn.Linear(d_model, rank + config.qk_rope_head_dim, bias=bias)
        self.kv_norm = RMSNorm(rank, _LATENT_EPS)
        self.wkv_b = nn.Linear(rank, n_heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False)
        self.out_proj = nn.Linear(n_heads * config.v_head_dim, d_model, bias=bool(config.out_bias))

    def forward(self, x: Tensor, rope: Rope | None, mask: Mask, cache: KVCache | None = None) -> Tensor:
        """Attend from each token of `x` to itself and the tokens before it.

        Args:
            x: (B, S, D).
            rope: the RoPE table of these S positions, or None.
            mask: from `attention_mask`, for this layer's window.
            cache: latents and rotated keys of the preceding tokens; those of `x` are appended.

        Returns:
            (B, S, D).
        """
        q_nope, q_rope = self._queries(x, rope)  # (B, H, S, N), (B, H, S, C)
        latent, k_rope = self._latents(x, rope)  # (B, 1, S, R), (B, 1, S, C)
        if cache is not None:
            latent, k_rope = cache.append(latent, k_rope)  # (B, 1, P, R), (B, 1, P, C)
        if cache is not None and x.shape[1] == 1 and not isinstance(mask, BlockMask):
            y = self._attend_to_latents(q_nope, q_rope, latent, k_rope, mask)  # (B, H, 1, V)
        else:
            y = self._attend(q_nope, q_rope, latent, k_rope, mask)  # (B, H, S, V)
        return self.out_proj(y.transpose(1, 2).flatten(2))  # (B, S, H V) -> (B, S, D)

    def _queries(self, x: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor]:
        """Compute the queries: (B, H, S, N) without position, and (B, H, S, C) rotated."""
        config = self.config
        q = self.wq(x) if config.q_lora_rank is None else self.wq_b(self.q_norm(self.wq_a(x)))
        heads = q.unflatten(-1, (self.n_heads, -1))  # (B, S, H, N + C)
        q_nope, q_rope = heads.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
        if rope is not None:
            q_rope = rotate(q_rope, rope, config.rope_interleaved)
        return q_nope.transpose(1, 2), q_rope.transpose(1, 2)

    def _latents(self, x: Tensor, rope: Rope | None) -> tuple[Tensor, Tensor]:
        """Compute the normalized latent (B, 1, S, R), and the rotated part of all heads' keys (B, 1, S, C)."""
        config = self.config
        latent, k_rope = self.wkv_a(x).split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        k_rope = k_rope.unsqueeze(2)  # (B, S, 1, C)
        if rope is not None:
            k_rope = rotate(k_rope, rope, config.rope_interleaved)
        return self.kv_norm(latent).unsqueeze(1), k_rope.transpose(1, 2)

    def _attend(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Mask) -> Tensor:
        """Attend after expanding the latents to each head's keys and values: (B, H, S, V)."""
        config = self.config
        expanded = self.wkv_b(latent.squeeze(1)).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)  # (B, H, P, N + V)
        k_nope, v = expanded.split((config.qk_nope_head_dim, config.v_head_dim), dim=-1)  # (B, H, P, N), (B, H, P, V)
        q = torch.cat((q_nope, q_rope), dim=-1)  # (B, H, S, N + C)
        k = torch.cat((k_nope, k_rope.expand(-1, self.n_heads, -1, -1)), dim=-1)  # (B, H, P, N + C)
        if isinstance(mask, BlockMask):
            return flex.attend(q, k, v, mask, config.scale).y
        causal = mask is None and q.shape[2] > 1  # a single query attends to all keys
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=config.scale)

    def _attend_to_latents(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attend to the latents themselves, for one query per row: (B, H, 1, V).

        `q . (W_k c) = (W_k^T q) . c`, and `sum_p a_p (W_v c_p) = W_v (sum_p a_p c_p)`: no latent is expanded.
        """
        config = self.config
        weight = effective_weight(self.wkv_b, latent.dtype).unflatten(0, (self.n_heads, -1))  # (H, N + V, R)
        w_k, w_v = weight.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)  # (H, N, R), (H, V, R)
        scores = (q_nope @ w_k) @ latent.transpose(-1, -2) + q_rope @ k_rope.transpose(-1, -2)  # (B, H, 1, P)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * config.scale
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        seen = scores.softmax(-1).to(latent.dtype) @ latent  # (B, H, 1, R)
        return seen @ w_v.transpose(-1, -2)
