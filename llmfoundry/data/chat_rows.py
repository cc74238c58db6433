"""Tokenized examples on disk, served as rows.

A folder holds the tokens of all examples (`ids`), a flag per token that says whether it is learned, the start of each
example (`starts`), and the examples of each row (`members`, from `rows[i]` to `rows[i + 1]`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from llmfoundry.config import ConfigError
from llmfoundry.data.bins import best_fit
from llmfoundry.data.chat_template import Tokens
from llmfoundry.data.open_file import OpenFile
from llmfoundry.data.rows import IGNORE, Block, How, Rows
from llmfoundry.data.watch import Watch
from llmfoundry.strict_json import read_mapping


def write(folder: Path, groups: Iterable[Sequence[Tokens]], how: How, nothing: str, pack: bool = False) -> None:
    """Write tokenized examples into a folder. Examples longer than `how.length` are truncated.

    Args:
        groups: groups of equal size. A group is left out if one of its examples has nothing to learn.
        nothing: the error message if all groups are left out, with {n} for their number.
        pack: pack several groups, of one example each, into a row; otherwise each group is a row.

    Raises:
        ValueError: if no example has anything to learn.
    """
    lengths: list[int] = []
    cut = unlearned = inside = without_calls = n = size = 0
    with (folder / "ids.bin").open("wb") as ids, (folder / "learned.bin").open("wb") as learned:
        for group in groups:
            n, size = n + 1, len(group)
            kept = [each._replace(ids=each.ids[: how.length], learned=each.learned[: how.length]) for each in group]
            cut += any(len(each.ids) > how.length for each in group)
            inside += any(each.inside for each in group)
            without_calls += any(each.without_calls for each in group)
            if not all(each.learned[1:].any() for each in kept):  # the first token is never a label
                unlearned += 1
                continue
            for each in kept:
                ids.write(each.ids.astype("<u4").tobytes())
                learned.write(each.learned.tobytes())
                lengths.append(len(each.ids))
    if not n:
        raise ValueError("holds no rows; add some, raise or lower validation_fraction, or give this split its own path")
    if not lengths:
        raise ValueError(f"{nothing.format(n=n)} within max_seq_len={how.length}; raise it")
    members = [list(range(i, i + size)) for i in range(0, len(lengths), size)]
    if pack:
        members = best_fit(lengths, how.length)
    np.save(folder / "starts.npy", np.cumsum([0, *lengths]))
    np.save(folder / "members.npy", np.array([i for row in members for i in row], dtype=np.int64))
    np.save(folder / "rows.npy", np.cumsum([0, *map(len, members)]))
    counts = {"examples": n, "cut": cut, "unlearned": unlearned, "inside": inside, "without_calls": without_calls}
    (folder / "index.json").write_text(json.dumps(counts))


class ChatRows(Rows):
    """Rows of whole examples. Empty positions hold end-of-text tokens that nothing attends to or learns."""

    own_positions = True

    def __init__(self, folder: Path, title: str, fingerprint: str, eos_token_id: int, how: How, watch: Watch) -> None:
        """Open a folder that `write` made.

        Args:
            watch: compares the files with their checksums.

        Raises:
            ConfigError: if the folder is damaged.
        """
        self.title, self.fingerprint, self.length = title, fingerprint, how.length
        self.eos_token_id, self.documents, self.watch = eos_token_id, how.documents, watch
        try:
            self._starts, self._members, self._bounds = (
                np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("starts", "members", "rows")
            )
            self._ids, self._learned = OpenFile(folder / "ids.bin"), OpenFile(folder / "learned.bin")
            if (self._ids.size, self._learned.size) != (4 * int(self._starts[-1]), int(self._starts[-1])):
                raise ValueError("its files are not as long as they were written")
            counts = read_mapping(folder / "index.json")
        except (OSError, ValueError, IndexError) as error:
            raise ConfigError(f"{folder}: is damaged ({error}); delete the folder to make it again") from None
        self.n_rows = self.n_full = len(self._bounds) - 1
        self.n_tokens = int(self._starts[-1])
        self._counts = counts
        filled = self.n_tokens / (self.n_rows * self.length)
        pack = "; in an llmfoundry model, model.attn_config.attn_uses_sequence_id: true packs them"
        apart = "" if how.documents else pack
        self.summary = (
            f"{title}: {counts['examples']:,} examples in {self.n_rows:,} rows, {filled:.1%} of the positions filled; "
            f"{self.said_of_lengths(how.length)}{apart}"
        )

    def said_of_lengths(self, length: int) -> str:
        """Return how many examples were longer than `length` tokens, in words."""
        cut, unlearned, inside = (self._counts[each] for each in ("cut", "unlearned", "inside"))
        said = f"{cut:,} were cut at max_seq_len={length}, {unlearned:,} with nothing to learn left out"
        if inside:  # e.g. without their thoughts
            said += (
                f"; in {inside:,} the chat template renders answers inside a conversation differently than at its end; "
                "they are learned as rendered inside (target_responses: last learns only the last)"
            )
        if n := self._counts.get("without_calls"):
            said += (
                f"; WARNING: in {n:,} the chat template leaves out tool calls, so answers without them are learned; "
                "name a template that renders them in dataset.chat_template"
            )
        return said

    def put(self, number: int, out: Block, i: int) -> None:
        assert out.positions is not None
        out.tokens[i], out.labels[i], out.positions[i] = self.eos_token_id, IGNORE, 0
        if out.documents is not None:
            out.documents[i] = 0  # padding
        self.watch.check()
        if number >= self.n_rows:
            return
        end = 0
        for document, example in enumerate(self._members[self._bounds[number] : self._bounds[number + 1]].tolist(), 1):
            start, end = end, self.put_example(example, out, i, end)
            if out.documents is not None:
                out.documents[i, start:end] = document

    def put_example(self, example: int, out: Block, i: int, start: int) -> int:
        """Write one example into row `i` from a position on; return the position after it."""
        assert out.positions is not None
        first, last = int(self._starts[example]), int(self._starts[example + 1])
        ids = np.frombuffer(self._ids.read(4 * first, 4 * last), "<u4").astype(np.int64)
        learned = np.frombuffer(self._learned.read(first, last), np.bool_)
        end = start + len(ids)
        out.tokens[i, start:end] = ids
        out.labels[i, start : end - 1] = np.where(learned[1:], ids[1:], IGNORE)
        out.positions[i, start:end] = np.arange(len(ids))
        return end
