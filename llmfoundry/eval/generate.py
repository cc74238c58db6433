"""Generate text from one prompt, with a key-value cache, temperature, top-k and top-p.

Shapes: B rows, S tokens so far, V vocab.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llmfoundry import runtime
from llmfoundry.config import ConfigError
from llmfoundry.data.tokenizer import PLAIN_TEXT, Encoder, SpecialTokens
from llmfoundry.eval.written import Stream
from llmfoundry.model.transformer import Cache, CausalLM, CausalLMConfig

log = logging.getLogger(__name__)


class Sampling(NamedTuple):
    """The sampling settings of a continuation."""

    max_new_tokens: int
    temperature: float = 1.0  # 0 takes the likeliest token
    top_p: float = 1.0  # sample among the likeliest tokens whose probabilities reach this sum
    seed: int = 0
    top_k: int = 0  # sample among this many of the likeliest tokens; 0: among all

    def dice(self, number: int) -> torch.Generator:
        """Return the random generator for text `number` of several: it depends only on the seed and the number."""
        return runtime.generator("cpu", self.seed, "generate", number)

    def drawing(self, number: int) -> Callable[[Tensor], int]:
        """Return the function that chooses an id from (V,) logits."""
        return partial(sample, temperature=self.temperature, top_p=self.top_p, dice=self.dice(number), top_k=self.top_k)


def generate(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    top_k: int = 0,
    number: int = 0,
    special: SpecialTokens = PLAIN_TEXT,
    stop: Collection[int] = (),
    emit: Callable[[str], object] | None = None,
) -> str:
    """Continue a prompt until a stop token or `max_new_tokens`.

    Args:
        model: every rank of a sharded model must call this; rank 0 samples, and all ranks get the same text.
        prompt: an empty prompt starts a new document.
        temperature: 0 takes the likeliest token.
        top_p: sample among the likeliest tokens whose probabilities reach this sum (nucleus sampling,
            Holtzman et al. 2020, arXiv:1904.09751).
        seed: seed of the sampling; the draws are the same on every device.
        top_k: sample among this many of the likeliest tokens, before `top_p` narrows them; 0: all.
        number: index of the prompt among several; each has its own draws.
        special: the rule for special tokens that the model was trained with.
        stop: ids that end the text, besides the tokenizer's end of text.
        emit: called with the text as it grows, first with the prompt, in whole characters.

    Returns:
        The prompt and its continuation.

    Raises:
        ConfigError: if the text may need more positions than the model has learned, or a token of the prompt has no
            row in the embedding.
    """
    ids = encoded(tokenizer, prompt, special)
    check_ids(max(ids), model.config.vocab_size)
    check_room(model.config, "a prompt", len(ids), max_new_tokens, "shorten the prompt or ask for fewer new tokens")
    warn_of_length(model.config, "the prompt", len(ids))
    stream = Stream(tokenizer, ids, emit) if emit is not None else None
    cache = Cache(model.config.n_layers, capacity=len(ids) + max_new_tokens)
    draw = Sampling(max_new_tokens, temperature, top_p, seed, top_k).drawing(number)
    was_training = model.training
    model.eval()
    for token in new_tokens(model, ids.copy(), cache, max_new_tokens, draw, {tokenizer.eos_token_id, *stop}):
        ids.append(token)
        if stream is not None:
            stream.advance()
    model.train(was_training)
    if stream is not None:
        stream.advance(last=True)
    return str(tokenizer.decode(ids, skip_special_tokens=True))


@torch.no_grad()
def new_tokens(
    model: CausalLM, fresh: list[int], cache: Cache, limit: int, draw: Callable[[Tensor], int], stop: Collection[int]
) -> Iterator[int]:
    """Yield the tokens that follow, one at a time, until a stop token or `limit`.

    Args:
        model: in evaluation mode; every rank of a sharded model must call this; rank 0 samples.
        fresh: the tokens that the cache does not have yet, at least one.
        cache: is extended by all tokens but the last one.
        stop: ids that end the text and are not part of it.
    """
    place = next(model.parameters()).device
    for _ in range(limit):
        tokens = torch.tensor([fresh], device=place)  # (1, S)
        logits = model(tokens, cache=cache, last_only=True).logits[0, -1]  # (V,)
        token = runtime.on_rank0(partial(draw, logits))
        if token in stop:
            return
        yield token
        fresh = [token]


def encoded(tokenizer: PreTrainedTokenizerBase, prompt: str, special: SpecialTokens = PLAIN_TEXT) -> list[int]:
    """Return the token ids that `generate` continues, at least one: the id that opens a document."""
    (ids,) = Encoder(tokenizer, special).encode([prompt])
    if special.bos is not None and ids[:1] != [special.bos]:
        return [special.bos, *ids]
    return ids or [tokenizer.eos_token_id]


def check_ids(largest: int, vocab_size: int) -> None:
    """Refuse a token that has no row in the model's embedding; raise ConfigError."""
    if largest >= vocab_size:
        raise ConfigError(
            f"the tokenizer gave id {largest}, and the model's embedding has {vocab_size} rows (model.vocab_size); "
            f"add rows to it with model.vocab_size={largest + 1} or more: each begins as the mean of the others"
        )


def room(config: CausalLMConfig, tokens: int) -> int:
    """Return how many tokens may follow `tokens` tokens. The last one is written but not read."""
    return config.max_seq_len - tokens + 1 if config.has_learned_positions else sys.maxsize


def check_room(config: CausalLMConfig, what: str, tokens: int, new: int, advice: str) -> None:
    """Refuse a text that needs more positions than the model has learned; raise ConfigError."""
    if new > room(config, tokens):
        raise ConfigError(
            f"{what} of {tokens} tokens and {new} new ones need {tokens + new - 1} positions, and the model has "
            f"learned {config.max_seq_len}; {advice}"
        )


def warn_of_length(config: CausalLMConfig, what: str, tokens: int) -> None:
    """Warn that a prompt is longer than any text in training. Models without learned positions can still read it.

    Args:
        what: what is too long, e.g. "a prompt".
    """
    if tokens > config.max_seq_len:
        log.warning("%s has %s tokens, and the model was made for %s (max_seq_len); its text may get worse",
                    what, f"{tokens:,}", f"{config.max_seq_len:,}")  # fmt: skip


def sample(logits: Tensor, temperature: float, top_p: float, dice: torch.Generator, top_k: int = 0) -> int:
    """Draw a token id from (V,) logits; see `sample_rows`."""
    return sample_rows(logits[None], temperature, top_p, [dice], top_k)[0]


def sample_rows(
    logits: Tensor, temperature: float, top_p: float, dice: Sequence[torch.Generator], top_k: int = 0
) -> list[int]:
    """Draw a token id for each row.

    One number between 0 and 1 is drawn per row, and selects a token in the order of ids. In an order by probability,
    the last bit of a logit, which may differ between batches, could swap two tokens.

    Args:
        logits: (B, V), any float dtype, on any device.
        temperature: 0 takes the highest logit, and of equal ones the lowest id.
        top_p: sample among the likeliest tokens whose probabilities reach this sum.
        dice: B generators on the CPU.
        top_k: sample among this many of the likeliest tokens; their probabilities then sum to 1 for `top_p`. 0: all.
    """
    if temperature == 0:
        return logits.argmax(-1).tolist()
    temperature = max(temperature, 1e-30)  # smaller values are 0 in float32
    probabilities, order = (logits.float() / temperature).softmax(-1).sort(descending=True, stable=True)
    if top_k:
        probabilities[:, top_k:] = 0
        probabilities /= probabilities.sum(-1, keepdim=True)
    # The first token past the sum is kept, so that there is always one.
    beyond = probabilities.cumsum(-1) - probabilities > top_p
    kept = torch.zeros_like(probabilities).scatter_(-1, order, probabilities.masked_fill(beyond, 0))
    sums = kept.double().cumsum(-1)  # (B, V)
    drawn = [1 - torch.rand((), dtype=torch.float64, generator=each).item() for each in dice]  # in (0, 1]
    return torch.searchsorted(sums, sums.new_tensor(drawn)[:, None] * sums[:, -1:])[:, 0].tolist()
