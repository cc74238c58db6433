"""Show a batch to a person: decoded rows, with learned tokens in green and a bar between documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from llmfoundry.data.loader import Batch
from llmfoundry.data.rows import IGNORE

ROWS = 8  # rows shown per batch


class Marks(NamedTuple):
    """The strings put around parts of a text."""

    learned: str
    off: str  # resets the style after learned text
    dim: str
    undim: str
    said: str  # describes the style of learned text


TERMINAL = Marks("\x1b[32m", "\x1b[0m", "\x1b[2m", "\x1b[0m", "\x1b[32mgreen\x1b[0m")
PLAIN = Marks("«", "»", "", "", "in «»")


def shown(
    batch: Batch,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str] = (),
    most: int = ROWS,
    marks: Marks = TERMINAL,
) -> Iterator[str]:
    """Yield the first rows of a batch, as lines.

    Args:
        sources: names of the sources of a mixture.
        most: maximum number of rows.
        marks: marks for a terminal or for plain text.
    """
    n_rows, length = batch.tokens.shape
    yield f"the first batch: {n_rows:,} rows of {length:,} tokens; what is learned is {marks.said}"
    for i, number in enumerate(batch.rows[:most].tolist()):
        row = _row(batch, i)
        source = f", {sources[int(batch.sources[i])]}" if batch.sources is not None else ""
        kind = "documents" if row.filled else "examples"
        examples = "" if batch.sequence_ids is None else f" in {row.n_documents} {kind}"
        said = f"{row.n_labels:,} of {length:,} tokens learned{examples}"
        yield f"{marks.dim}--- row {number}{source}: {said} ---{marks.undim}"
        yield _decoded(row, tokenizer, marks)
    if n_rows > most:
        yield f"{marks.dim}--- and {n_rows - most:,} more rows ---{marks.undim}"


def as_data(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, sources: Sequence[str] = ()
) -> Iterator[dict[str, object]]:
    """Yield a batch's rows for JSON: pieces of text in order. Each belongs to one document and is learned or not."""
    for i, number in enumerate(batch.rows.tolist()):
        row = _row(batch, i)
        pieces = [
            {"document": document, "learned": learned, "tokens": len(tokens), "text": _text(tokens, tokenizer)}
            for document, learned, tokens in row.pieces()
            if row.filled or document
        ]
        source = {} if batch.sources is None else {"source": sources[int(batch.sources[i])]}
        yield {"row": number, **source, "tokens": len(row.tokens), "labels": row.n_labels, "pieces": pieces}


class _Row(NamedTuple):
    """A row of a batch."""

    tokens: list[int]
    learned: list[bool]  # whether each token is predicted from the previous one
    documents: list[int]
    filled: bool  # whether document 0 is not padding
    n_labels: int  # including that of the last token

    @property
    def n_documents(self) -> int:
        return len({each for each in self.documents if each or self.filled})

    def pieces(self) -> Iterator[tuple[int, bool, list[int]]]:
        """Pieces in order: document, whether it is learned, and tokens."""
        places = range(len(self.tokens))
        for (document, learned), group in groupby(places, key=lambda t: (self.documents[t], self.learned[t])):
            yield document, learned, [self.tokens[t] for t in group]


def _row(batch: Batch, i: int) -> _Row:
    labels = batch.labels[i].tolist()
    filled = batch.positions is None or batch.sequence_ids is None
    ids = [1] * len(labels) if batch.sequence_ids is None else batch.sequence_ids[i].tolist()
    learned = [label != IGNORE for label in labels]
    return _Row(batch.tokens[i].tolist(), [False, *learned[:-1]], ids, filled, sum(learned))


def _text(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


def _decoded(row: _Row, tokenizer: PreTrainedTokenizerBase, marks: Marks) -> str:
    text, before = "", row.documents[0]
    for document, learned, tokens in row.pieces():
        if document != before:
            text, before = f"{text}\n{marks.dim}|{marks.undim}\n", document
        if not row.filled and document == 0:
            text += f"{marks.dim}({len(tokens):,} positions are empty){marks.undim}"
            continue
        piece = _text(tokens, tokenizer)
        text += f"{marks.learned}{piece}{marks.off}" if learned else piece
    return text
