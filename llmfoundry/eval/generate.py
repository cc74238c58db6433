"""Text from a model: one prompt, a key-value cache, temperature and top-p.

Shapes: S tokens so far, V vocab.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmfoundry import runtime
from llmfoundry.config import ConfigError
from llmfoundry.model.transformer import Cache, CausalLM


@torch.no_grad()
def generate(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> str:
    """Continue a prompt until the end-of-text token or `max_new_tokens`.

    Args:
        model: every rank of a sharded one must call this, and all get the same text.
        prompt: an empty one begins a new document.
        temperature: 0 takes the likeliest token.
        top_p: sample among the likeliest tokens whose probabilities reach this sum (nucleus sampling,
            Holtzman et al. 2020, arXiv:1904.09751).
        seed: of the sampling; the draws are the same on every device.

    Returns:
        The prompt and its continuation.

    Raises:
        ConfigError: they may need more positions than the model has learned.
    """
    place = next(model.parameters()).device
    ids = encoded(tokenizer, prompt)
    positions = len(ids) + max_new_tokens - 1  # the last token is written and not read
    if model.config.has_learned_positions and positions > model.config.max_seq_len:
        raise ConfigError(
            f"a prompt of {len(ids)} tokens and {max_new_tokens} new ones need {positions} positions, and the model "
            f"has learned {model.config.max_seq_len}; shorten the prompt or ask for fewer new tokens"
        )
    cache = Cache(model.config.n_layers, capacity=len(ids) + max_new_tokens)
    dice = runtime.generator("cpu", seed, "generate")
    was_training = model.training
    model.eval()
    fresh = torch.tensor([ids], device=place)  # (1, S) tokens that the cache has not seen
    for _ in range(max_new_tokens):
        logits = model(fresh, cache=cache, last_only=True).logits[0, -1]  # (V,)
        token = sample(logits.float().cpu(), temperature, top_p, dice)
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
        fresh = torch.tensor([[token]], device=place)
    model.train(was_training)
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def encoded(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The token ids that `generate` continues, one at least: the end of text, which opens a document."""
    return list(tokenizer.encode(prompt, add_special_tokens=False)) or [tokenizer.eos_token_id]


def sample(logits: Tensor, temperature: float, top_p: float, dice: torch.Generator) -> int:
    """Draw a token id from (V,) logits; `temperature` 0 takes the highest, the lowest id among equals."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = (logits / temperature).softmax(-1).sort(descending=True, stable=True)
    # The first token past the sum stays in, so that there is always one.
    probabilities[probabilities.cumsum(-1) - probabilities > top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=dice)])
