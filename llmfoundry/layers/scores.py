"""Unfused attention, and ALiBi: used for modified scores, and as the reference of the fused kernels.

Shapes: B rows, S queries, P keys, H query heads, G kv heads, C head_dim.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute attention step by step, with float32 scores: the reference, and the path for modified scores off CUDA.

    Args:
        q: (B, H, S, C).
        k: (B, G, P, C).
        v: (B, G, P, C).
        mask: boolean, broadcast to (B, H, S, P), True where a query attends to a key; None: everywhere.
        scale: factor on the scores.
        softcap: scores become `softcap * tanh(score / softcap)`.
        sinks: (H,) one score per head that joins the softmax and has no value.
        bias: broadcast to (B, H, S, P), added to the scores after soft-capping.
        dropout: dropout probability of the attention weights.

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
    if dropout:
        weights = F.dropout(weights, dropout)
    return (weights @ v.to(dtype)).to(q.dtype)


def alibi_slopes(n_heads: int, bias_max: int, device: torch.device) -> Tensor:
    """Return the slope of each head, (H,) float32: 2^-(bias_max (h + 1) / H) for H a power of two.

    For any other H, as in MPT: the slopes of the next power of two, every second one first. The operations are those of
    `transformers`, so that the values are bitwise equal.
    """
    power = 2 ** math.ceil(math.log2(n_heads))
    exponents = torch.arange(1, power + 1, dtype=torch.float32, device=device) * (bias_max / power)
    slopes = 1.0 / torch.pow(2, exponents)
    return slopes if power == n_heads else torch.cat((slopes[1::2], slopes[::2]))[:n_heads]


def alibi_bias(slopes: Tensor, n_queries: int, n_keys: int) -> Tensor:
    """Return the bias on the scores, (H, S, P) float32: minus slope times distance. The last query is at the last
    key.
    """
    i = torch.arange(n_keys - n_queries, n_keys, device=slopes.device)[:, None]  # (S, 1)
    j = torch.arange(n_keys, device=slopes.device)  # (P,)
    return slopes[:, None, None] * (j - i)
