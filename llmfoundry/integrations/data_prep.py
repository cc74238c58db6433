"""LLM Foundry's data preparation: a dataset of the hub, or JSON lines, as MDS folders of text or of rows of tokens.

Rows are cut as theirs are: the texts' tokens one after another, each between `bos_text` and `eos_text`, in pieces of
`concat_tokens`; what is over at the end of a split fills no row.
"""

from __future__ import annotations

from collections.abc import Iterator
from glob import glob
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from llmfoundry.config import ConfigError, check
from llmfoundry.data.mds_write import folder_of
from llmfoundry.data.sources import DatasetConfig
from llmfoundry.data.tokenizer_files import load_tokenizer
from llmfoundry.progress import progress


class Part(NamedTuple):
    """A folder to write: the split of the source that it is made of, and how many samples it holds at most."""

    split: str
    most: int | None = None


# Folders that LLM Foundry makes of two datasets, whatever splits those have.
_KNOWN = {
    "train": Part("train"),
    "train_small": Part("train", 100_000),
    "val": Part("validation"),
    "val_small": Part("validation", 10_000),
    "val_xsmall": Part("validation", 3_000),
}
KNOWN = ("c4", "the_pile")


class Tokens(NamedTuple):
    """How texts become rows."""

    tokenizer: PreTrainedTokenizerBase
    length: int  # tokens in a row
    before: list[int]  # of each text
    after: list[int]
    wrap: bool  # whether a text goes on in the next row


def part_of(dataset: str, name: str) -> Part:
    """What a folder of this name is made of."""
    return _KNOWN.get(name, Part(name)) if Path(dataset).name in KNOWN else Part(name)


def how(
    tokenizer: str, length: int, bos_text: str, eos_text: str | None, wrap: bool,
    words: dict[str, str | int | float | bool | None],
) -> Tokens:  # fmt: skip
    """The rule for rows of tokens.

    Args:
        eos_text: after each text; None: the tokenizer's end of text.
        words: settings that the tokenizer is loaded with.

    Raises:
        ConfigError: the tokenizer cannot be loaded, or nothing would stand between texts.
    """
    source = Path(tokenizer) if Path(tokenizer).is_dir() else tokenizer
    loaded = load_tokenizer(source, f"--tokenizer {tokenizer}", **words)
    loaded.model_max_length = int(1e30)  # rows are cut here
    eos_text = loaded.eos_token or "" if eos_text is None else eos_text
    if length < 1:
        raise ConfigError(f"--concat_tokens {length}: must be 1 or more")
    if not bos_text + eos_text:
        ids = loaded("test")["input_ids"]
        if ids[0] != loaded.bos_token_id and ids[-1] != loaded.eos_token_id:
            raise ConfigError(
                f"--tokenizer {tokenizer}: adds no token between texts; write e.g. --eos_text '{loaded.eos_token}'"
            )
    before, after = (
        loaded(text, add_special_tokens=False)["input_ids"] if text else [] for text in (bos_text, eos_text)
    )
    return Tokens(loaded, length, before, after, wrap)


def hub_texts(dataset: str, subset: str | None, split: str) -> Iterator[str]:
    """The texts of a split of a hub dataset, or of a folder, as a stream.

    Raises:
        ConfigError: it cannot be had, or has no column `text`.
    """
    import datasets

    # A folder's subset is a folder in it; the hub has configurations.
    inside = subset if subset is not None and (Path(dataset) / subset).is_dir() else None
    how = {"data_dir": inside} if inside is not None else {"name": subset}
    try:
        rows = datasets.load_dataset(dataset, split=split, streaming=True, **how)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(f"--dataset {dataset}, split {split}: {' '.join(str(error).split())}") from None
    for row in rows:
        if not isinstance(row.get("text"), str):
            raise ConfigError(f"--dataset {dataset}: has no column text of strings; it has {', '.join(row)}")
        yield row["text"]


def file_texts(where: str) -> Iterator[str]:
    """The texts of local files: the column `text` of tables, and whole text files, in the order of their names.

    Args:
        where: a folder, a glob or one file, as `dataset.path` of text_files.

    Raises:
        ConfigError: there is none, or a row has no text.
    """
    if not where or not (glob(where) or Path(where).expanduser().exists()):
        raise ConfigError(f"--path {where}: no such file or folder")
    source = check(DatasetConfig, {"name": "text_files", "path": where, "validation_fraction": 0.0}).build()
    return source.documents()


def write(texts: Iterator[str], out: str, tokens: Tokens | None, most: int | None, compression: str | None) -> int:
    """Write a folder.

    Args:
        out: the folder, or its URL.
        tokens: how texts become rows; None writes the texts themselves.
        most: samples at most.

    Returns:
        How many samples it has.

    Raises:
        ConfigError: the folder holds something or cannot be written, the compression is not known, or there is nothing
            to write.
    """
    columns = {"text": "str"} if tokens is None else {"tokens": "ndarray:int32"}
    count = 0
    with (
        folder_of(out, columns, compression, hashes=("sha1", "xxh64")) as writer,
        progress(f"writing {out}", most, "samples") as advance,
    ):
        for value in texts if tokens is None else rows_of(texts, tokens):
            if count == most:
                break
            writer.write({next(iter(columns)): value})
            count += 1
            advance(1)
        if not count:
            shorter = "" if tokens is None else f": it is shorter than one row of {tokens.length:,} tokens"
            raise ConfigError(f"{out}: the text gives nothing to write{shorter}")
    return count


def rows_of(texts: Iterator[str], tokens: Tokens) -> Iterator[NDArray[np.int32]]:
    """Rows of `tokens.length` ids."""
    buffer: list[int] = []
    for text in texts:
        buffer += [*tokens.before, *tokens.tokenizer(text)["input_ids"], *tokens.after]
        start = 0
        while len(buffer) - start >= tokens.length:
            yield np.asarray(buffer[start : start + tokens.length], dtype=np.int32)
            start = start + tokens.length if tokens.wrap else len(buffer)
        buffer = buffer[start:]
