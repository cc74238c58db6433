"""Preferences: a prompt, a chosen answer and a rejected answer.

Shapes: S max_seq_len. A row is one pair, (2 S,): the chosen sequence in the first half, the rejected one in the second,
each padded separately. Code that orders, splits and counts rows therefore never separates a pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from llmfoundry.data.chat_rows import ChatRows, write
from llmfoundry.data.chat_template import Renderer
from llmfoundry.data.chats import ChatsConfig, text_of
from llmfoundry.data.conversations import Conversation, Example, Message, Pair, conversation, messages_of
from llmfoundry.data.loader import Batch
from llmfoundry.data.rows import IGNORE, Block, How
from llmfoundry.data.table_files import Table
from llmfoundry.data.tables import Row
from llmfoundry.data.watch import Watch


class Preference(NamedTuple):
    """Two answers to one prompt, each an example of its own."""

    chosen: Example
    rejected: Example


class PreferencesConfig(ChatsConfig, names=("preferences",)):
    """Preferences for `loss: dpo`, from the same places as `finetuning` data; its keys are those of `chats`.

    Columns: `prompt`, `chosen` and `rejected`, of text or messages; or only `chosen` and `rejected`, as whole
    conversations, whose common beginning is the prompt. Only answers are learned.
    """

    KIND = "preferences/5"

    def _texts(self) -> Iterator[str]:
        for texts in self._read(self._table(), lambda row: [text_of(each) for each in preference_of(row)]):
            yield from texts

    def _write(self, folder: Path, table: Table, renderer: Renderer, how: How) -> None:
        pairs = self._read(table, lambda row: [renderer.tokens(each) for each in preference_of(row)])
        write(folder, pairs, how, "none of {n} preferences has two answers that begin")

    def _opened(
        self, folder: Path, title: str, fingerprint: str, eos_token_id: int, how: How, watch: Watch
    ) -> ChatRows:
        return PreferenceRows(folder, title, fingerprint, eos_token_id, how, watch)


def preference_of(row: Row) -> Preference:
    """Read the preference in a row.

    Raises:
        ValueError: if the row is not an example; the message says what is wrong with it.
    """
    missing = [column for column in ("chosen", "rejected") if row.get(column) is None]
    if missing:
        raise ValueError(f"has the columns {', '.join(row)}, and no {missing[0]}; name it in preprocessing_fn")
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str) and (prompt is None or isinstance(prompt, str)):
        if prompt is None:
            raise ValueError("has chosen and rejected as text, and no prompt")
        if chosen == rejected:
            raise ValueError("chosen and rejected are the same")
        return Preference(Pair(prompt, chosen), Pair(prompt, rejected))
    first, second = (_turns(answer) for answer in (chosen, rejected))
    if first[0]["role"] == "assistant":
        if prompt is None:
            raise ValueError("has answers that start with the assistant, and no prompt")
        before = messages_of([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
        first, second = [*before, *first], [*before, *second]
    common = 0
    while common < min(len(first), len(second)) and first[common] == second[common]:
        common += 1
    if common == len(first) == len(second):
        raise ValueError("chosen and rejected are the same")
    if not common:
        raise ValueError("chosen and rejected start with different messages, so they have no common prompt")
    return Preference(*(_answered(messages, common, row) for messages in (first, second)))


def _turns(answer: object) -> list[Message]:
    return messages_of([{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer)


def _answered(messages: list[Message], common: int, row: Row) -> Conversation:
    """Return a conversation of which only the part after the common beginning is learned."""
    silent = [message | {"weight": 0} if message["role"] == "assistant" else message for message in messages[:common]]
    return conversation([*silent, *messages[common:]], row)


class PreferenceRows(ChatRows):
    """Rows of pairs."""

    sequences = 2

    def __init__(self, folder: Path, title: str, fingerprint: str, eos_token_id: int, how: How, watch: Watch) -> None:
        of_pairs = how._replace(length=2 * how.length, documents=False)
        super().__init__(folder, title, fingerprint, eos_token_id, of_pairs, watch)
        self.summary = f"{title}: {self.n_rows:,} pairs; {self.said_of_lengths(how.length)}"

    def put(self, number: int, out: Block, i: int) -> None:
        assert out.positions is not None
        out.tokens[i], out.labels[i], out.positions[i] = self.eos_token_id, IGNORE, 0
        self.watch.check()
        if number < self.n_rows:
            for half in (0, 1):
                self.put_example(2 * number + half, out, i, half * (self.length // 2))


def apart(batch: Batch) -> Batch:
    """Put the two sequences of each pair (B, 2 S) into rows of their own: (2 B, S), the chosen one first."""
    halves = (batch.tokens, batch.labels, batch.positions)
    tokens, labels, positions = (None if t is None else t.view(2 * t.shape[0], -1) for t in halves)
    assert tokens is not None and labels is not None
    return Batch(tokens, labels, batch.rows.repeat_interleave(2), None, positions)
