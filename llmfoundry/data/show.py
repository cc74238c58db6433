"""A batch as a person reads it: its rows decoded, with what is learned in green, and a bar between documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from llmfoundry.data.loader import Batch
from llmfoundry.data.rows import IGNORE

ROWS = 8  # shown of a batch
_LEARNED, _OFF, _DIM = "\x1b[32m", "\x1b[0m", "\x1b[2m"


def shown(batch: Batch, tokenizer: PreTrainedTokenizerBase, sources: Sequence[str] = ()) -> Iterator[str]:
    """The first rows of a batch, as lines for a terminal.

    Args:
        sources: names of the sources of a mixture.
    """
    n_rows, length = batch.tokens.shape
    yield f"the first batch: {n_rows:,} rows of {length:,} tokens; what is learned is {_LEARNED}green{_OFF}"
    for i, number in enumerate(batch.rows[:ROWS].tolist()):
        labels = batch.labels[i].tolist()
        learned = [False, *(label != IGNORE for label in labels[:-1])]
        filled = batch.positions is None or batch.sequence_ids is None  # else document 0 is what fills the row
        ids = [1] * len(labels) if batch.sequence_ids is None else batch.sequence_ids[i].tolist()
        documents = len({each for each in ids if each or filled})
        source = f", {sources[int(batch.sources[i])]}" if batch.sources is not None else ""
        n_labels = sum(label != IGNORE for label in labels)
        kind = "documents" if filled else "examples"
        examples = "" if batch.sequence_ids is None else f" in {documents} {kind}"
        yield f"{_DIM}--- row {number}{source}: {n_labels:,} of {len(labels):,} tokens learned{examples} ---{_OFF}"
        yield _decoded(batch.tokens[i].tolist(), learned, ids, filled, tokenizer)
    if len(batch.rows) > ROWS:
        yield f"{_DIM}--- and {len(batch.rows) - ROWS:,} more rows ---{_OFF}"


def _decoded(
    tokens: list[int], learned: list[bool], documents: list[int], filled: bool, tokenizer: PreTrainedTokenizerBase
) -> str:
    text, before = "", documents[0]
    for (document, green), group in groupby(range(len(tokens)), key=lambda t: (documents[t], learned[t])):
        places = list(group)
        if document != before:
            text, before = f"{text}\n{_DIM}|{_OFF}\n", document
        if not filled and document == 0:
            text += f"{_DIM}({len(places):,} positions are empty){_OFF}"
            continue
        piece = str(tokenizer.decode([tokens[t] for t in places], clean_up_tokenization_spaces=False))
        text += f"{_LEARNED}{piece}{_OFF}" if green else piece
    return text
