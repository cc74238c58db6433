"""The decoder: embeddings, pre-norm blocks, head and loss. One function of its weights and its input.

Shapes: B rows, S sequence, T = B*S tokens, D d_model, E experts, V vocab, Lm MoE layers.
Notable: nothing is written to `self` in forward and nothing global. Masks and rotary tables are made once and
handed to the blocks. The model runs in the dtype of its parameters, and knows nothing of meshes, recompute or
compile: those are applied to `blocks[i]` from outside.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmfoundry.kernels.cross_entropy import linear_cross_entropy
from llmfoundry.layers.attention import KVCache, Mask, attention_mask
from llmfoundry.layers.ffn import RouterStats
from llmfoundry.layers.rope import Rope, rope_table

if TYPE_CHECKING:
    from llmfoundry.model.config import CausalLMConfig


class Output(NamedTuple):
    """What the model returns: logits without labels, the loss with them."""

    logits: Tensor | None  # (B, S, V)
    loss_sum: Tensor | None  # () nats, float32, summed over labels that count
    router: RouterStats | None  # stacked over MoE layers, (Lm, E) or (Lm,); None for a dense model


class Cache:
    """Keys and values of a generation in progress: pass the same one to each forward, which extends it.

    All rows share one length. `capacity` tokens are allocated at the first forward; beyond, buffers double.
    """

    def __init__(self, n_layers: int, capacity: int = 0) -> None:
        self.layers = [KVCache(capacity) for _ in range(n_layers)]

    @property
    def length(self) -> int:
        """Tokens held."""
        return self.layers[0].length


class BlockOutput(NamedTuple):
    """What one block returns."""

    x: Tensor  # (B, S, D)
    router: RouterStats | None


class Block(nn.Module):
    """`x + attn(norm_1(x))`, then `x + ffn(norm_2(x))`."""

    def __init__(self, config: CausalLMConfig, layer: int) -> None:
        super().__init__()
        self.norm_1 = config.norm.build(config.d_model)
        self.attn = config.attention.build(config.d_model, config.n_heads, config.norm)
        self.norm_2 = config.norm.build(config.d_model)
        self.ffn = config.ffn(layer).build(config.d_model, config.n_layers, layer)

    def forward(
        self, x: Tensor, rope: Rope | None, mask: Mask, keys: Tensor | None, cache: KVCache | None
    ) -> BlockOutput:
        """Apply the block to (B, S, D); the arguments are those of the attention and of the ffn."""
        x = x + self.attn(self.norm_1(x), rope, mask, cache)
        y, router = self.ffn(self.norm_2(x), keys)
        return BlockOutput(x + y, router)


class Head(nn.Module):
    """An untied output head; the loss is computed inside its forward, where FSDP has gathered the weight."""

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))

    def forward(self, x: Tensor, labels: Tensor | None, softcap: float | None) -> Tensor:
        """Logits (B, S, V), or with labels the loss's sum ()."""
        return head(x, self.weight, labels, softcap)


def head(x: Tensor, weight: Tensor, labels: Tensor | None, softcap: float | None) -> Tensor:
    """Logits or loss of hidden states.

    Args:
        x: (B, S, D).
        weight: (V, D).
        labels: (B, S) int64, or None for logits.
        softcap: logits become `softcap * tanh(logit / softcap)`.

    Returns:
        (B, S, V) in the dtype of `x`, or () nats summed over labels that are not -100.
    """
    if labels is not None:
        return linear_cross_entropy(x.flatten(0, 1), weight, labels.flatten(), softcap)
    logits = F.linear(x, weight)
    if softcap is not None:
        dtype = torch.promote_types(x.dtype, torch.float32)
        logits = (softcap * torch.tanh(logits.to(dtype) / softcap)).to(x.dtype)
    return logits


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Give all parameters a dtype, in place.

    Buffers keep theirs: a router's bias is made of small steps, which bf16 would round away.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


class CausalLM(nn.Module):
    """A decoder-only language model."""

    def __init__(self, config: CausalLMConfig) -> None:
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.wpe = nn.Embedding(config.max_seq_len, config.d_model) if config.has_learned_positions else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm_f = config.norm.build(config.d_model)
        # Tied: no module, the head reads `wte.weight`, which FSDP must then gather with the root.
        self.lm_head = None if config.tie_word_embeddings else Head(config.vocab_size, config.d_model)

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        *,
        sequence_ids: Tensor | None = None,
        keys: Tensor | None = None,
        cache: Cache | None = None,
        last_only: bool = False,
    ) -> Output:
        """Logits of the next tokens, or the loss of given ones.

        Args:
            tokens: (B, S) int64.
            labels: (B, S) int64, what should follow each token, -100 where nothing is learned; None: return
            logits. sequence_ids: (B, S) int32 document numbers; used if attn_config.attn_uses_sequence_id.
            keys: (B,) int64 noise keys of the rows, for routers with jitter. cache: what came before
            `tokens`; it is extended by them. last_only: logits of the last token only, (B, 1, V): all that
            sampling needs of a long prompt.
        """
        offset = 0 if cache is None else cache.length
        x, rope, masks = self._prepare(tokens, sequence_ids, offset, cache is not None)
        stats: list[RouterStats] = []
        for layer, block in enumerate(self.blocks):
            past = None if cache is None else cache.layers[layer]
            x, router = block(x, rope, masks[self.config.window(layer)], keys, past)
            if router is not None:
                stats.append(router)
        x = self.norm_f(x[:, -1:] if last_only else x)
        softcap = self.config.final_logit_softcapping
        if self.lm_head is None:
            y = head(x, self.wte.weight, labels, softcap)
        else:
            y = self.lm_head(x, labels, softcap)
        router = RouterStats(*(torch.stack(field) for field in zip(*stats, strict=True))) if stats else None
        return Output(y, None, router) if labels is None else Output(None, y, router)

    def _prepare(
        self, tokens: Tensor, sequence_ids: Tensor | None, offset: int, cached: bool
    ) -> tuple[Tensor, Rope | None, dict[int, Mask]]:
        """What all blocks share: embeddings (B, S, D), the rotary table, and a mask for each window."""
        config, length = self.config, tokens.shape[1]
        attention = config.attention
        if not attention.attn_uses_sequence_id:
            sequence_ids = None
        if sequence_ids is not None and cached:
            raise ValueError("sequence_ids cannot be combined with a cache; generate from one document a row")
        positions = torch.arange(offset, offset + length, device=tokens.device)
        x = self.wte(tokens)
        if self.wpe is not None:
            if offset + length > config.max_seq_len:
                raise ValueError(f"{offset + length} tokens, but {config.max_seq_len} learned positions")
            x = x + self.wpe(positions)
        rope = None
        if attention.rope:
            dim = attention.rotary_dim(config.d_model, config.n_heads)
            rope = rope_table(attention.rope_scaling, attention.rope_theta, dim, positions)
        windows = {config.window(layer) for layer in range(config.n_layers)}
        masks = {
            window: attention_mask(attention, window, length, offset, sequence_ids, tokens.device) for window in windows
        }
        return x, rope, masks
