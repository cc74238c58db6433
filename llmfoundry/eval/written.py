"""Decode text that grows by tokens, in whole characters and up to a stop string; used by chats, prompts and tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from transformers import PreTrainedTokenizerBase


def _nobody(piece: str) -> None:
    """Ignore the pieces."""


class Written:
    """The text that a model writes, up to the first of some stop strings.

    Args:
        endings: strings that end the text and are not part of it.
        emit: called with each piece of the text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, endings: Sequence[str], emit: Callable[[str], object] = _nobody
    ) -> None:
        self.ids: list[int] = []
        self._until = Until(endings, emit)
        self._stream = Stream(tokenizer, self.ids, self._until.add)

    @property
    def ended(self) -> bool:
        """Whether a stop string was found."""
        return self._until.ended

    def add(self, token: int) -> bool:
        """Add the next token; return `ended`."""
        self.ids.append(token)
        self._stream.advance()
        return self.ended

    def extended(self, tokens: Iterable[int]) -> bool:
        """Add tokens up to a stop string; return `ended`."""
        return any(self.add(token) for token in tokens)

    def close(self) -> str:
        """Finish and return the text."""
        self._stream.advance(last=True)
        self._until.close()
        return self._until.shown


class Until:
    """Passes on a growing text up to the first of some stop strings. Text that may start a stop string is held back."""

    def __init__(self, endings: Sequence[str], emit: Callable[[str], object]) -> None:
        self.shown, self.ended = "", False
        self._endings, self._emit, self._waiting = [each for each in endings if each], emit, ""

    def add(self, piece: str) -> None:
        """Add the next piece."""
        if self.ended:
            return
        text = self._waiting + piece
        starts = [at for each in self._endings if (at := text.find(each)) >= 0]
        self.ended = bool(starts)
        self._show(text, min(starts) if starts else len(text) - self._may_begin(text))

    def close(self) -> None:
        """Finish: pass on the text that was held back."""
        if not self.ended:
            self._show(self._waiting, len(self._waiting))

    def _show(self, text: str, end: int) -> None:
        self._waiting = text[end:]
        if end:
            self.shown += text[:end]
            self._emit(text[:end])

    def _may_begin(self, text: str) -> int:
        """Return the number of characters at the end of the text that may start a stop string."""
        return max((n for each in self._endings for n in range(1, len(each)) if text.endswith(each[:n])), default=0)


class Stream:
    """Decodes a growing list of ids piece by piece.

    A token may be part of a character, and its text may depend on the token before it. So the tokens of the last piece
    are decoded again together with the new ones, and a text that ends within a character is held back.

    Args:
        ids: a list that grows; its current contents are passed on first.
        emit: called with each piece.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ids: list[int], emit: Callable[[str], object]) -> None:
        self._tokenizer, self._ids, self._emit = tokenizer, ids, emit
        self._before, self._done = 0, len(ids)  # start and end of the last piece
        emit(self._decode(0, len(ids)))

    def advance(self, last: bool = False) -> None:
        """Pass on the text of the new ids; with the last call, also an incomplete character."""
        old, new = self._decode(self._before, self._done), self._decode(self._before, len(self._ids))
        if len(new) > len(old) and (last or not new.endswith("\N{REPLACEMENT CHARACTER}")):
            self._emit(new[len(old) :])
            self._before, self._done = self._done, len(self._ids)

    def _decode(self, start: int, stop: int) -> str:
        return str(self._tokenizer.decode(self._ids[start:stop], skip_special_tokens=True))
