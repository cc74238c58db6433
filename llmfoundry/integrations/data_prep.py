"""LLM Foundry's data preparation: converts a hub dataset or JSON lines to MDS folders of texts or token rows.

Rows are cut as in LLM Foundry: the token ids of all texts are concatenated, each between `bos_text` and `eos_text`, and
split into pieces of `concat_tokens`; the remainder at the end of a split is dropped.
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
    """A folder to write: the source split, and the maximum number of samples."""

    split: str
    most: int | None = None


# The folders that LLM Foundry creates for two datasets, whatever splits those have.
_KNOWN = {
    "train": Part("train"),
    "train_small": Part("train", 100_000),
    "val": Part("validation"),
    "val_small": Part("validation", 10_000),
    "val_xsmall": Part("validation", 3_000),
}
KNOWN = ("c4", "the_pile")


class Tokens(NamedTuple):
    """How to convert texts to rows."""

    tokenizer: PreTrainedTokenizerBase
    length: int  # tokens per row
    before: list[int]  # ids inserted before each text
    after: list[int]
    wrap: bool  # whether a text continues in the next row


def part_of(dataset: str, name: str) -> Part:
    """Return the source of a folder with this name."""
    return _KNOWN.get(name, Part(name)) if Path(dataset).name in KNOWN else Part(name)


def how(
    tokenizer: str, length: int, bos_text: str, eos_text: str | None, wrap: bool,
    words: dict[str, str | int | float | bool | None],
) -> Tokens:  # fmt: skip
    """Return the rule for converting texts to token rows.

    Args:
        tokenizer: a folder or a hub id.
        length: tokens per row.
        bos_text: inserted before each text.
        eos_text: inserted after each text; None: the tokenizer's end-of-text token.
        wrap: whether a text continues in the next row.
        words: settings for loading the tokenizer.

    Raises:
        ConfigError: if the tokenizer cannot be loaded, or nothing would separate texts.
    """
    source = Path(tokenizer) if Path(tokenizer).is_dir() else tokenizer
    loaded = load_tokenizer(source, f"--tokenizer {tokenizer}", **words)
    loaded.model_max_length = int(1e30)  # rows are cut here instead
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
    """Yield the texts of a split of a hub dataset, or of a folder, as a stream.

    Raises:
        ConfigError: if it cannot be loaded, or has no column `text`.
    """
    import datasets

    # For a folder, the subset is a subfolder; for the hub, it is a configuration.
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
    """Yield the texts of local files, sorted by name: the column `text` of tables, and whole text files.

    Args:
        where: a folder, a glob or a file, as `dataset.path` of text_files.

    Raises:
        ConfigError: if there is none, or a row has no text.
    """
    if not where or not (glob(where) or Path(where).expanduser().exists()):
        raise ConfigError(f"--path {where}: no such file or folder")
    source = check(DatasetConfig, {"name": "text_files", "path": where, "validation_fraction": 0.0}).build()
    return source.documents()


def write(texts: Iterator[str], out: str, tokens: Tokens | None, most: int | None, compression: str | None) -> int:
    """Write a folder.

    Args:
        texts: the texts to write.
        out: the folder, or its URL.
        tokens: how to convert texts to rows; None: write the texts themselves.
        most: maximum number of samples.
        compression: of the shards.

    Returns:
        The number of samples written.

    Raises:
        ConfigError: if the folder is not empty or cannot be written, the compression is unknown, or there is nothing to
            write.
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
    """Yield rows of `tokens.length` ids."""
    buffer: list[int] = []
    for text in texts:
        buffer += [*tokens.before, *tokens.tokenizer(text)["input_ids"], *tokens.after]
        start = 0
        while len(buffer) - start >= tokens.length:
            yield np.asarray(buffer[start : start + tokens.length], dtype=np.int32)
            start = start + tokens.length if tokens.wrap else len(buffer)
        buffer = buffer[start:]
