"""Text that grows by tokens, in whole characters and up to an ending: one code for chats, many prompts and tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from transformers import PreTrainedTokenizerBase


def _nobody(piece: str) -> None:
    """Nobody waits for the pieces."""


class Written:
    """What a model writes, up to the first of some endings.

    Args:
        endings: texts that end it, and are not part of it.
        emit: given each piece of the text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, endings: Sequence[str], emit: Callable[[str], object] = _nobody
    ) -> None:
        self.ids: list[int] = []
        self._until = Until(endings, emit)
        self._stream = Stream(tokenizer, self.ids, self._until.add)

    @property
    def ended(self) -> bool:
        """Whether an ending has come."""
        return self._until.ended

    def add(self, token: int) -> bool:
        """Take the next token; returns `ended`."""
        self.ids.append(token)
        self._stream.advance()
        return self.ended

    def extended(self, tokens: Iterable[int]) -> bool:
        """Take tokens up to an ending; returns `ended`."""
        return any(self.add(token) for token in tokens)

    def close(self) -> str:
        """The text: no more tokens come."""
        self._stream.advance(last=True)
        self._until.close()
        return self._until.shown


class Until:
    """Passes a growing text on up to the first of some endings. What may begin an ending waits."""

    def __init__(self, endings: Sequence[str], emit: Callable[[str], object]) -> None:
        self.shown, self.ended = "", False
        self._endings, self._emit, self._waiting = [each for each in endings if each], emit, ""

    def add(self, piece: str) -> None:
        """Take the next piece."""
        if self.ended:
            return
        text = self._waiting + piece
        starts = [at for each in self._endings if (at := text.find(each)) >= 0]
        self.ended = bool(starts)
        self._show(text, min(starts) if starts else len(text) - self._may_begin(text))

    def close(self) -> None:
        """Pass on what waits: no more text comes."""
        if not self.ended:
            self._show(self._waiting, len(self._waiting))

    def _show(self, text: str, end: int) -> None:
        self._waiting = text[end:]
        if end:
            self.shown += text[:end]
            self._emit(text[:end])

    def _may_begin(self, text: str) -> int:
        """Characters at the end of the text that begin an ending."""
        return max((n for each in self._endings for n in range(1, len(each)) if text.endswith(each[:n])), default=0)


class Stream:
    """Decodes a growing list of ids piece by piece.

    A token may be a part of a character, and how it is decoded may depend on the one before it. So the tokens of the
    last piece are decoded again with the new ones, and a text that ends within a character waits.

    Args:
        ids: grows; what it holds now is given out first.
        emit: given each piece.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ids: list[int], emit: Callable[[str], object]) -> None:
        self._tokenizer, self._ids, self._emit = tokenizer, ids, emit
        self._before, self._done = 0, len(ids)  # where the last piece begins, and where it ends
        emit(self._decode(0, len(ids)))

    def advance(self, last: bool = False) -> None:
        """Give out what the new ids add; the last time, also an incomplete character."""
        old, new = self._decode(self._before, self._done), self._decode(self._before, len(self._ids))
        if len(new) > len(old) and (last or not new.endswith("\N{REPLACEMENT CHARACTER}")):
            self._emit(new[len(old) :])
            self._before, self._done = self._done, len(self._ids)

    def _decode(self, start: int, stop: int) -> str:
        return str(self._tokenizer.decode(self._ids[start:stop], skip_special_tokens=True))
