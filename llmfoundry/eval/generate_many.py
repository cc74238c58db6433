"""Generate text for many prompts, in batches over all ranks, with the same result as for each prompt alone.

A prompt is a text to continue, or a conversation to answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from llmfoundry.data.conversations import Message
from llmfoundry.data.tokenizer import SpecialTokens
from llmfoundry.eval.chat import Ending, Template
from llmfoundry.eval.generate import Sampling, check_room, encoded, sample_rows, warn_of_length
from llmfoundry.eval.likelihood import Prompt, Ranks, continue_all
from llmfoundry.eval.written import Written
from llmfoundry.model.transformer import CausalLM

NOTHING = Ending(frozenset(), ())
BATCHES = 32  # batches per rank after which texts are yielded


class Request(NamedTuple):
    """A prompt as token ids."""

    ids: list[int]
    shown: str  # the text before the new part; empty for a conversation
    ending: Ending = NOTHING  # for a conversation


class Completion(NamedTuple):
    """What the model wrote."""

    text: str  # the new text
    finish: str  # stop, or length: max_new_tokens was reached
    tokens: int


def request_of(
    prompt: str | Sequence[Message], tokenizer: PreTrainedTokenizerBase, special: SpecialTokens, template: str | None
) -> Request:
    """Encode a text or a conversation.

    Args:
        special: the rule for special tokens of texts.
        template: chat template for conversations; replaces the tokenizer's own.

    Raises:
        ConfigError: if there is no chat template, or it refuses the conversation.
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
        how: sampling. A row's draws depend only on the seed and the row's number, so they do not depend on the number
            of ranks.
        stop: ids that end a text, besides the tokenizer's end of text.

    Yields:
        The completions in the order of the requests, on every rank. Every rank must consume all of them.

    Raises:
        ConfigError: if a prompt needs more positions than the model has learned, or has a token without an embedding.
    """
    for number, request in enumerate(requests):
        advice = "shorten it, or lower --max-new-tokens"
        check_room(model.config, f"prompt {number}", len(request.ids), how.max_new_tokens, advice)
    longest = max(range(len(requests)), key=lambda number: len(requests[number].ids), default=None)
    if longest is not None:
        warn_of_length(model.config, f"prompt {longest}, the longest,", len(requests[longest].ids))
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
    """Yield the completions of some requests; `first` is the number of the first one."""
    dice = [how.dice(number) for number in range(first, first + len(requests))]

    texts = [Written(tokenizer, request.ending.texts) for request in requests]

    def ended(number: int, new: list[int]) -> bool:
        return new[-1] in requests[number].ending.ids or texts[number].add(new[-1])

    written = continue_all(
        model,
        [Prompt(request.ids, how.max_new_tokens) for request in requests],
        ranks,
        stop={tokenizer.eos_token_id, *stop},
        done=ended,
        draw=lambda numbers, logits: sample_rows(
            logits, how.temperature, how.top_p, [dice[i] for i in numbers], how.top_k
        ),
    )
    assert written is not None
    for request, new in zip(requests, written, strict=True):
        yield _completion(tokenizer, request, new, how.max_new_tokens)


def _completion(tokenizer: PreTrainedTokenizerBase, request: Request, new: list[int], limit: int) -> Completion:
    finish = "length" if len(new) == limit else "stop"
    if request.shown:
        text = str(tokenizer.decode([*request.ids, *new], skip_special_tokens=True))[len(request.shown) :]
        return Completion(text, finish, len(new))
    if new and new[-1] in request.ending.ids:  # not part of the text
        new, finish = new[:-1], "stop"
    answer = Written(tokenizer, request.ending.texts)
    finish = "stop" if answer.extended(new) else finish
    return Completion(answer.close(), finish, len(new))
