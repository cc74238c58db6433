"""How a model's experts treat a fixed batch of text: confidence, churn, co-activation, and their tokens.

Shapes: L MoE layers, T tokens of the probe, E experts, K top_k.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.moe.layer import MoEConfig
from llmfoundry.moe.router import Router, RouterOutput

TOP_TOKENS = 20
MOST_BYTES = 4  # of a UTF-8 character
KINDS = ("word", "word part", "number", "punctuation", "space", "other")


class Routing(NamedTuple):
    """How a model routed a batch."""

    experts: Tensor  # (L, T, K) int16, on the CPU
    weights: Tensor  # (L, T, K) float32, on the CPU: the factor on each expert's output
    confidence: Tensor  # (L,) mean over tokens of the highest score, as a fraction of all scores


class ExpertTokens(NamedTuple):
    """The tokens that one expert of one layer receives."""

    tokens: list[str]  # decoded, most typical first, at most TOP_TOKENS
    kinds: list[float]  # fraction of its slots for each of KINDS


def mixture_layers(config: CausalLMConfig) -> list[int]:
    """Return the numbers of the MoE layers, in the order of `Routing`."""
    return [layer for layer in range(config.n_layers) if isinstance(config.ffn(layer), MoEConfig)]


@torch.no_grad()
def route(
    model: nn.Module, tokens: Tensor, sequence_ids: Tensor | None = None, rows_at_once: int | None = None
) -> Routing:
    """Route a batch and record the routers' choices. Under expert parallelism, all ranks call it with the same batch.

    Args:
        model: a `CausalLM`, in any mode; the mode is kept.
        tokens: (B, S) int64 on the model's device.
        rows_at_once: rows per forward; None: all.
    """
    training, size = model.training, rows_at_once or len(tokens)
    model.eval()
    parts = [
        _routed(model, tokens[i : i + size], None if sequence_ids is None else sequence_ids[i : i + size])
        for i in range(0, len(tokens), size)
    ]
    model.train(training)
    return Routing(
        torch.cat([part.experts for part in parts], dim=1),
        torch.cat([part.weights for part in parts], dim=1),
        torch.stack([part.confidence * part.experts.shape[1] for part in parts]).sum(0) / tokens.numel(),
    )


def _routed(model: nn.Module, tokens: Tensor, sequence_ids: Tensor | None) -> Routing:
    with _kept(model) as outputs, torch.compiler.set_stance("force_eager"):
        model(tokens, sequence_ids=sequence_ids, last_only=True)
    experts = torch.stack([output.experts.to(torch.int16) for output in outputs])
    shares = [(output.scores / output.scores.sum(-1, keepdim=True)).amax(-1).mean() for output in outputs]
    weights = torch.stack([output.weights for output in outputs])
    return Routing(experts.cpu(), weights.float().cpu(), torch.stack(shares).float().cpu())


@contextmanager
def _kept(model: nn.Module) -> Iterator[list[RouterOutput]]:
    """Record the outputs of all routers that run inside the block."""
    outputs: list[RouterOutput] = []
    handles = [
        router.register_forward_hook(lambda _, __, output: outputs.append(output))
        for router in model.modules()
        if isinstance(router, Router)
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def fingerprints(experts: Tensor, n_experts: int) -> Tensor:
    """Return a number for each token's set of experts, whatever their order: (L, T, K) ids -> (L, T) int32.

    Each expert has a random number, and a set has the sum of its experts' numbers (Zobrist 1970). Two different sets
    have the same number with probability 2^-32.
    """
    dice = torch.Generator().manual_seed(0)
    numbers = torch.randint(-(2**31), 2**31, (n_experts,), generator=dice)  # int64
    return numbers[experts.long()].sum(-1).to(torch.int32)


def churn(before: Tensor, now: Tensor) -> list[float]:
    """Return the share of tokens whose set of experts has changed, per layer: fingerprints (L, T), (L, T) -> (L,)."""
    return (before != now).double().mean(1).tolist()


def coactivation(experts: Tensor, n_experts: int) -> NDArray[np.float64]:
    """Return how often two experts receive the same token, relative to independent choices.

    Args:
        experts: (T, K) ids of one layer.

    Returns:
        (E, E), 1 for independent choices. The diagonal is 0, as are pairs with an expert that received no token.
    """
    chosen = torch.zeros(len(experts), n_experts, dtype=torch.float64)
    chosen.scatter_(1, experts.long(), 1.0)
    together = (chosen.T @ chosen).numpy()
    alone = chosen.sum(0).numpy()
    expected = np.outer(alone, alone) / max(1, len(experts))
    ratio = np.divide(together, expected, out=np.zeros_like(together), where=expected > 0)
    np.fill_diagonal(ratio, 0.0)
    return ratio


def tokens_of_experts(
    experts: Tensor, tokens: Tensor, n_experts: int, tokenizer: PreTrainedTokenizerBase
) -> list[ExpertTokens]:
    """Find the tokens that are typical of each expert of one layer.

    A token is typical of an expert that receives it more often than the expert's share of all slots would give. Tokens
    are ordered by n * log(n / expected), their contribution to the divergence between the expert's tokens and all
    tokens.

    Args:
        experts: (T, K) ids.
        tokens: (T,) token ids.
    """
    ids, position = np.unique(tokens.numpy(), return_inverse=True)
    texts = decoded(ids.tolist(), tokenizer)
    kinds = np.array([KINDS.index(kind(text)) for text in texts])
    counts = np.zeros((n_experts, len(ids)))
    np.add.at(counts, (experts.numpy().astype(np.int64), position[:, None]), 1.0)
    expected = counts.sum(1, keepdims=True) * counts.sum(0, keepdims=True) / max(1.0, counts.sum())
    ratio = np.divide(counts, expected, out=np.ones_like(counts), where=(counts > 0) & (expected > 0))
    typical = counts * np.log(ratio)
    found = []
    for expert in range(n_experts):
        order = np.argsort(-typical[expert], kind="stable")[:TOP_TOKENS]
        by_kind = np.bincount(kinds, weights=counts[expert], minlength=len(KINDS))
        found.append(
            ExpertTokens(
                [texts[i] for i in order if typical[expert, i] > 0],
                [round(float(share), 4) for share in by_kind / max(1.0, counts[expert].sum())],
            )
        )
    return found


def sources_of_experts(experts: Tensor, sources: Tensor, n_experts: int, n_sources: int) -> NDArray[np.float64]:
    """Return how often an expert receives tokens of each source, relative to the expert's share of all slots.

    Args:
        experts: (T, K) ids of one layer.
        sources: (T,) the source of each token.

    Returns:
        (E, n_sources), 1 for an expert that does not distinguish sources; 0 where nothing can be compared.
    """
    slots = experts.long() * n_sources + sources.unsqueeze(1)  # (T, K)
    counts = np.bincount(slots.flatten().numpy(), minlength=n_experts * n_sources).reshape(n_experts, n_sources)
    expected = np.outer(counts.sum(1), counts.sum(0)) / max(1, counts.sum())
    return np.divide(counts, expected, out=np.zeros(counts.shape), where=expected > 0)


def kind(text: str) -> str:
    """Return the kind of a decoded token, one of KINDS."""
    bare = text.strip()
    if not bare:
        return "space"
    if all(letter.isalpha() or letter in "'_" for letter in bare):
        return "word" if text[0].isspace() else "word part"
    if all(letter.isdigit() or letter in ".," for letter in bare) and any(map(str.isdigit, bare)):
        return "number"
    if all(unicodedata.category(letter)[0] in "PS" for letter in bare):
        return "punctuation"
    return "other"


def decoded(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Decode each token by itself."""
    return [str(tokenizer.decode([token])) for token in tokens]


def pieces(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the text of each token; joined, they are the whole text.

    A character made of several tokens belongs to the last of them, and the others have empty texts. Each token is
    decoded after the one before it, because some tokenizers drop a leading space.
    """
    found, before, done = [], 0, 0
    for end in range(1, len(tokens) + 1):
        old = str(tokenizer.decode(list(tokens[before:done])))
        new = str(tokenizer.decode(list(tokens[before:end])))
        is_whole = end == len(tokens) or not new.endswith("\N{REPLACEMENT CHARACTER}") or end - done >= MOST_BYTES
        found.append(new[len(old) :] if is_whole else "")
        if is_whole:
            before, done = done, end
    return found
