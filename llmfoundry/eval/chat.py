"""Answer conversations with a model: the chat template, the end of a turn, and a key-value cache kept between turns.

Each answer renders the whole conversation, as `apply_chat_template` does, so its tokens are those of `transformers`.
The cache keeps the tokens of the last conversation; the prefix that the next one shares with it is not computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile
from typing import Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from llmfoundry.config import ConfigError
from llmfoundry.data.chat_template import REFUSALS, rendered
from llmfoundry.data.conversations import Conversation, Message
from llmfoundry.data.limits import Exceeded, bounded
from llmfoundry.data.tokenizer import check_characters
from llmfoundry.eval.generate import Sampling, check_ids, new_tokens, room, warn_of_length
from llmfoundry.eval.written import Written
from llmfoundry.model.transformer import Cache, CausalLM

_PROBE = "probe"  # placeholder for an answer, to find what a template writes after it

Finish = Literal["stop", "length", "interrupted"]


class Ending(NamedTuple):
    """How the assistant's turn ends in a template."""

    ids: frozenset[int]  # ids of a special token that ends the turn
    texts: tuple[str, ...]  # if there is none: the texts that end it


class Answer(NamedTuple):
    """The model's answer."""

    text: str
    finish: Finish
    prompt_tokens: int
    reused: int  # number of prompt tokens that were in the cache
    tokens: int  # number of new tokens, without the stop token


class Template:
    """A chat template with its tokenizer.

    Args:
        source: replaces the tokenizer's own template.

    Raises:
        ConfigError: if there is no template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, source: str | None = None) -> None:
        own = tokenizer.chat_template
        own = own.get("default") if isinstance(own, dict) else own
        source = source or own
        if not isinstance(source, str):
            raise ConfigError(
                "the tokenizer has no chat template, so this may be a base model; name one by --template FILE, or "
                "continue a text by `llmfoundry generate`"
            )
        self.tokenizer, self.source = tokenizer, source

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a conversation, with the assistant's next turn opened.

        Raises:
            ConfigError: if the template refuses the messages.
        """
        text = self._render(messages, prompt=True)
        check_characters(text)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ConfigError("the chat template renders these messages as an empty text")
        return ids

    def ending(self) -> Ending:
        """Return what the template writes after an answer: a special token, or else a text."""
        turns: list[Message] = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": _PROBE}]
        _, found, tail = self._render(turns, prompt=False).rpartition(_PROBE)
        tail = tail.strip() if found else ""
        spelled = {str(entry.content).strip(): token for token, entry in self.tokenizer.added_tokens_decoder.items()}
        if begins := [text for text in spelled if text and tail.startswith(text)]:
            return Ending(frozenset({spelled[max(begins, key=len)]}), ())
        return Ending(frozenset(), (tail,) if tail else ())

    def _render(self, messages: Sequence[Message], prompt: bool) -> str:
        try:
            return bounded(partial(rendered, self.tokenizer, self.source, Conversation(list(messages)), prompt))[0]
        except Exceeded as error:
            raise ConfigError(f"the chat template {error}") from None
        except REFUSALS as error:
            raise ConfigError(f"the chat template refuses the conversation: {error}") from error


class Chat:
    """Answers conversations, one at a time.

    Args:
        model: in evaluation mode, in one process.
        stop: ids that end an answer, besides the tokenizer's end of text and the template's end of turn.
    """

    def __init__(self, model: CausalLM, template: Template, stop: Sequence[int] | set[int] = ()) -> None:
        self._model, self._template = model, template
        self._ending = template.ending()
        self.stop = {template.tokenizer.eos_token_id, *stop, *self._ending.ids}
        self._cache, self._held = Cache(0), list[int]()  # the ids whose keys and values are cached
        self._warned = False  # whether it warned of conversations longer than max_seq_len

    def answer(
        self,
        messages: Sequence[Message],
        how: Sampling,
        *,
        emit: Callable[[str], object] = lambda piece: None,
        until: Sequence[str] = (),
        interrupted: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Write the assistant's next turn.

        Args:
            messages: the conversation, in OpenAI's format.
            how: sampling; draws depend on its seed and on the number of messages.
            emit: called with the text as it grows, in whole characters.
            until: texts that end the answer and are not part of it.
            interrupted: called after each token; True ends the answer.

        Raises:
            ConfigError: if the template refuses the conversation, or it is longer than the model can read.
        """
        ids = self._template.ids(messages)
        limit = self._limit(ids, how.max_new_tokens)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._held, ids[:-1], strict=False)))
        if shared:
            self._cache.truncate(shared)
        else:
            self._cache = Cache(self._model.config.n_layers, capacity=len(ids) + limit)
        self._held = []  # cleared until the forwards succeed: an error could leave layers of different lengths
        text = Written(self._template.tokenizer, [*self._ending.texts, *until], emit)
        stopped = False
        for token in new_tokens(self._model, ids[shared:], self._cache, limit, how.drawing(len(messages)), self.stop):
            text.add(token)
            stopped = interrupted()
            if text.ended or stopped:
                break
        shown, new = text.close(), text.ids
        self._held = [*ids, *new][: self._cache.length]
        by_itself = text.ended or (len(new) < limit and not stopped)
        finish: Finish = "stop" if by_itself else "interrupted" if stopped else "length"
        return Answer(shown, finish, len(ids), shared, len(new))

    def _limit(self, ids: list[int], max_new_tokens: int) -> int:
        config = self._model.config
        check_ids(max(ids), config.vocab_size)
        left = room(config, len(ids))
        if left < 1:
            raise ConfigError(
                f"the conversation has {len(ids)} tokens, and the model has learned {config.max_seq_len} positions; "
                "start a new one, or remove earlier turns"
            )
        if not self._warned and len(ids) > config.max_seq_len:
            self._warned = True
            warn_of_length(config, "the conversation", len(ids))
        return min(max_new_tokens, left)
