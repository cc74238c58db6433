"""Text for many prompts: batches over all ranks, each row as if it were alone.

A prompt is a text to continue, or a conversation to answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from llmfoundry.config import ConfigError
from llmfoundry.data.conversations import Message
from llmfoundry.data.tokenizer import SpecialTokens
from llmfoundry.eval.chat import Ending, Template
from llmfoundry.eval.generate import Sampling, encoded, sample_rows
from llmfoundry.eval.likelihood import Prompt, Ranks, continue_all
from llmfoundry.model.transformer import CausalLM

NOTHING = Ending(frozenset(), ())
BATCHES = 32  # of each rank, after which their texts are given out


class Request(NamedTuple):
    """What to continue."""

    ids: list[int]
    shown: str  # of the text, before what is new; empty for a conversation
    ending: Ending = NOTHING  # of a conversation


class Completion(NamedTuple):
    """What the model wrote."""

    text: str  # what is new
    finish: str  # stop, or length: max_new_tokens was reached
    tokens: int


def request_of(
    prompt: str | Sequence[Message], tokenizer: PreTrainedTokenizerBase, special: SpecialTokens, template: str | None
) -> Request:
    """A text or a conversation as token ids.

    Args:
        special: the rule for special tokens of texts.
        template: of conversations, in place of the tokenizer's own.

    Raises:
        ConfigError: there is no chat template, or it refuses the conversation.
    """
    if isinstance(prompt, str):
        ids = encoded(tokenizer, prompt, special)
        return Request(ids, str(tokenizer.decode(ids, skip_special_tokens=True)))
    chat = Template(tokenizer, template)
    return Request(chat.ids(prompt), "", chat.ending())


def generate_many(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    how: Sampling,
    ranks: Ranks,
    stop: set[int],
) -> Iterator[Completion]:
    """Continue many prompts.

    Args:
        model: in evaluation mode, sharded or not; every rank calls this.
        how: the draws of a row depend on the seed and its number alone, so they are the same on any number of ranks.
        stop: ids that end a text, beside the tokenizer's end of text.

    Yields:
        What was written, in the order of the requests, on every rank: every rank must take all of it.

    Raises:
        ConfigError: a prompt needs more positions than the model has learned, or has a token that it does not know.
    """
    config = model.config
    for number, request in enumerate(requests):
        positions = len(request.ids) + how.max_new_tokens - 1  # the last token is written and not read
        if config.has_learned_positions and positions > config.max_seq_len:
            raise ConfigError(
                f"prompt {number} of {len(request.ids)} tokens and {how.max_new_tokens} new ones need {positions} "
                f"positions, and the model has learned {config.max_seq_len}; shorten it, or lower --max-new-tokens"
            )
    part = BATCHES * ranks.rows * ranks.world
    for start in range(0, len(requests), part):
        yield from _written(model, tokenizer, requests[start : start + part], how, ranks, stop, start)


def _written(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    how: Sampling,
    ranks: Ranks,
    stop: set[int],
    first: int,
) -> Iterator[Completion]:
    """The texts of some requests, of which the first has that number."""
    dice = [how.dice(number) for number in range(first, first + len(requests))]

    def ended(number: int, new: list[int]) -> bool:
        return _end(tokenizer, requests[number].ending, new) is not None

    written = continue_all(
        model,
        [Prompt(request.ids, how.max_new_tokens) for request in requests],
        ranks,
        stop={tokenizer.eos_token_id, *stop},
        done=ended,
        draw=lambda numbers, logits: sample_rows(logits, how.temperature, how.top_p, [dice[i] for i in numbers]),
    )
    assert written is not None
    for request, new in zip(requests, written, strict=True):
        yield _completion(tokenizer, request, new, how.max_new_tokens)


def _end(tokenizer: PreTrainedTokenizerBase, ending: Ending, new: list[int]) -> str | None:
    """The text of a conversation's answer, once its turn has ended."""
    if new[-1] in ending.ids:
        return str(tokenizer.decode(new[:-1], skip_special_tokens=True))
    for text in ending.texts:
        tail = str(tokenizer.decode(new[-len(text.encode()) - 1 :]))  # a token is a byte at least
        if text in tail:
            return str(tokenizer.decode(new, skip_special_tokens=True)).partition(text)[0]
    return None


def _completion(tokenizer: PreTrainedTokenizerBase, request: Request, new: list[int], limit: int) -> Completion:
    end = _end(tokenizer, request.ending, new) if new else None
    if end is not None:
        return Completion(end, "stop", len(new))
    if request.shown:
        text = str(tokenizer.decode([*request.ids, *new], skip_special_tokens=True))[len(request.shown) :]
    else:
        text = str(tokenizer.decode(new, skip_special_tokens=True))
    return Completion(text, "length" if len(new) == limit else "stop", len(new))
