"""Find the assistant's turns in a rendered conversation, for templates that do not mark them.

A turn is the text that the rendered conversation gains by it: it starts after the conversation so far, rendered with
the assistant's turn opened, and ends where the conversation including the turn ends. Some templates render a turn
inside a conversation differently than at the end, e.g. without its thoughts (Qwen3, DeepSeek-R1, gpt-oss). For those,
the content of the turn and of the message before it are found by rendering the conversation again with other words in
their place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from llmfoundry.data.conversations import Message

Span = tuple[int, int]  # in characters
Render = Callable[[Sequence[Message], bool], str]  # takes messages, and whether to open the assistant's turn at the end

# Texts that occur in no conversation: they have no letter in common, and no template trims or splits them.
PROBE, _OTHER = _PROBES = ("\u16a0\u16a2\u16a6", "\u16b1\u16b2\u16b7")
# An answer may start with a thought, which some templates open together with the turn. The thought is learned.
_THOUGHT = re.compile(r"<think>\s*(</think>\s*)?\Z")


class Turn(NamedTuple):
    """A turn of the assistant.

    Attributes:
        span: its characters in the rendered text.
        inside: whether the template renders this turn differently inside the conversation than at the end.
    """

    span: Span
    inside: bool


class Found(NamedTuple):
    """Where the content of a message was found: between the parts of the text that do not depend on the content.

    Attributes:
        start: length of the prefix that the text shares with a rendering of other content.
        before: length of the prefix that two renderings of other contents share. It is larger than `start` where the
            template splits the content.
        after: the text that follows other content.
    """

    start: int
    before: int
    after: str


class Turns:
    """Finds turns in texts rendered by one template.

    Args:
        render: renders messages; raises a ValueError for messages that the template refuses.
        eos: the text with which some templates close a conversation that asks for no answer.
        special: the texts of the tokenizer's added tokens.
    """

    def __init__(self, render: Render, eos: str, special: Collection[str]) -> None:
        self._render, self._eos, self._special = render, eos, tuple(sorted(special, key=len, reverse=True))

    def find(self, messages: Sequence[Message], text: str, turn: int) -> Turn:
        """Find message `turn` in the rendered text of all messages.

        Raises:
            ValueError: if the turn cannot be found.
        """
        upto = self._render(messages[: turn + 1], False)
        before = _THOUGHT.sub("", self._render(messages[:turn], True)) if turn else self._opened(upto)
        if not text.startswith(upto):
            upto = upto.removesuffix(self._eos)
        if upto.startswith(before) and text.startswith(upto):
            return Turn((len(before), len(upto)), False)
        span = self._inside(messages, text, turn)
        if span is None:
            raise ValueError(
                f"the chat template does not render message {turn} at the end as it does inside the conversation, so "
                "what the assistant says cannot be found; give a template with {% generation %} in "
                "dataset.chat_template"
            )
        return Turn(span, True)

    def shares(self, messages: Sequence[Message], text: str, spans: Sequence[Span]) -> dict[int, list[Span]]:
        """Assign the spans that a template marks to turns. A turn may have several spans, or none.

        Raises:
            ValueError: if a span cannot be assigned to one turn.
        """
        speaking = [i for i, message in enumerate(messages) if is_answer(message)]
        found: dict[int, list[Span]] = {}
        left = list(spans)
        row: list[int] = []  # consecutive turns of the assistant
        for turn in reversed(speaking):
            row.insert(0, turn)
            if turn - 1 in speaking:
                continue
            asked = self.content(messages, text, turn - 1) if turn else None
            own = [span for span in left if asked is None or span[0] >= len(text) - len(asked.after)]
            left = left[: len(left) - len(own)]
            if len(row) > 1 and len(own) != len(row) or asked is None and turn:
                raise ValueError(
                    f"the chat template marks {len(own)} parts in the {len(row)} turns from message {turn} on; whose "
                    "they are is not known; leave out weight and target_responses: last"
                )
            found |= {turn: own} if len(row) == 1 else {i: [span] for i, span in zip(row, own, strict=True)}
            row = []
        return found

    def content(self, messages: Sequence[Message], text: str, number: int) -> Found | None:
        """Find the content of one message in the rendered text; return None if it is not rendered."""
        one, other = (self._render(_with(messages, number, probe), False) for probe in _PROBES)
        before, after = _common(one, other), _common(one[::-1], other[::-1])
        if one[before : len(one) - after] != _PROBES[0]:
            return None
        return Found(min(_common(text, one), before), before, one[len(one) - after :])

    def _inside(self, messages: Sequence[Message], text: str, turn: int) -> Span | None:
        own = self.content(messages, text, turn)
        start = self._start(messages, text, turn)
        if own is None or start is None or start > own.start:  # the opening of the turn does not depend on its content
            return None
        end = self._end(messages, text, turn, own.after)
        return (start, end) if end is not None and start <= end else None

    def _start(self, messages: Sequence[Message], text: str, turn: int) -> int | None:
        """Return the position at which the turn starts: after the text that the template writes to open it."""
        if turn == 0:
            opened = self._opened(text)
            return len(opened) if opened else None
        asked = self.content(messages, text, turn - 1)
        if asked is None or asked.start < asked.before or not text.endswith(asked.after):
            return None
        opening, closing = (self._after(messages[:turn], turn - 1, prompt) for prompt in (True, False))
        opening = _THOUGHT.sub("", opening)
        n = _common(asked.after, opening)
        if n < len(opening):  # followed by what an answer may start with, such as an empty thought
            n = self._cut(opening, n)
            closing = closing.removesuffix(self._eos)
        if n < len(opening) and n <= len(closing):
            return None
        return len(text) - len(asked.after) + n

    def _end(self, messages: Sequence[Message], text: str, turn: int, after: str) -> int | None:
        """Return the position at which the turn ends: after the text that the template writes behind its content.

        Args:
            after: the text that follows other content of this turn.
        """
        closing = self._after(messages[: turn + 1], turn, False)
        closings = [closing, closing.removesuffix(self._eos)]
        # The last special token may differ: gpt-oss ends a conversation with one of its own.
        last = next((each for each in self._special if closing.endswith(each)), None)
        if last is not None:
            closings += [closing.removesuffix(last) + each for each in self._special]
        for each in closings:
            if after.startswith(each) and text.endswith(after[len(each) :]):
                return len(text) - len(after) + len(each)
        return None

    def _after(self, messages: Sequence[Message], number: int, prompt: bool) -> str:
        """Return the text that the template writes after the content of a message."""
        return self._render(_with(messages, number, _PROBES[0]), prompt).rpartition(_PROBES[0])[2]

    def _opened(self, text: str) -> str:
        """Return the start of a conversation that opens with an assistant's turn; the opening text is not learned.

        Many templates refuse an empty list of messages, so the opening comes from a conversation with one user message.
        """
        asked: list[Message] = [{"role": "user", "content": "x"}]
        before, after = (self._render(asked, prompt) for prompt in (False, True))
        if not after.startswith(before):
            before = before.removesuffix(self._eos)
        opening = _THOUGHT.sub("", after.removeprefix(before))
        while opening and opening not in text:
            opening = opening[: self._cut(opening, len(opening) - 1)]
        return text[: text.find(opening) + len(opening)] if opening else ""

    def _cut(self, opening: str, most: int) -> int:
        """Return the last position up to `most` where the opening may end: after a special token or a line break."""
        return max(
            (opening.rfind(each, 0, most) + len(each) for each in ("\n", *self._special) if each in opening[:most]),
            default=0,
        )


def is_answer(message: Message) -> bool:
    """Return whether a message is the assistant's."""
    return message["role"] == "assistant"


def _with(messages: Sequence[Message], number: int, content: str) -> list[Message]:
    return [*messages[:number], messages[number] | {"content": content}, *messages[number + 1 :]]


def _common(one: str, other: str) -> int:
    """Return the length of the longest common prefix."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
