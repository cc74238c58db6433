"""The language-modeling head: logits, or the loss given labels.

Shapes: B rows, S sequence, D d_model, V vocab.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmfoundry.kernels.cross_entropy import CrossEntropy, cross_entropy_by_token, cross_entropy_of_tokens


class Head(nn.Module):
    """An untied head. The loss is computed in its forward, where FSDP has gathered the weight."""

    def __init__(self, vocab_size: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))

    def forward(
        self, x: Tensor, labels: Tensor | None, softcap: float | None, by_token: bool = False
    ) -> Tensor | CrossEntropy:
        """Call `logits_or_loss` with this weight."""
        return logits_or_loss(x, self.weight, labels, softcap, by_token)


def logits_or_loss(
    x: Tensor, weight: Tensor, labels: Tensor | None, softcap: float | None, by_token: bool = False
) -> Tensor | CrossEntropy:
    """Compute logits or, given labels, the loss.

    Args:
        x: (B, S, D).
        weight: (V, D).
        labels: (B, S) int64, or None for logits.
        softcap: logits become `softcap * tanh(logit / softcap)`.
        by_token: each label's loss gets a gradient too, at the cost of one more product with the weight.

    Returns:
        (B, S, V) logits in the dtype of `x`, or the loss of the labels that are not -100.
    """
    if labels is not None and by_token:
        nats = cross_entropy_by_token(x.flatten(0, 1), weight, labels.flatten(), softcap)
        return CrossEntropy(nats.sum(), nats)
    if labels is not None:
        return cross_entropy_of_tokens(x.flatten(0, 1), weight, labels.flatten(), softcap)
    logits = F.linear(x, weight)  # (B, S, V)
    if softcap is not None:
        dtype = torch.promote_types(x.dtype, torch.float32)
        logits = (softcap * torch.tanh(logits.to(dtype) / softcap)).to(x.dtype)
    return logits
