"""Write a tokenized dataset as an MDS folder of rows, which mosaicml-streaming and LLM Foundry read too."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from llmfoundry.config import ConfigError, is_url
from llmfoundry.data.mds import MDSWriter
from llmfoundry.data.packing import TokenStream
from llmfoundry.data.remote import listing
from llmfoundry.progress import progress

COLUMNS = {"tokens": "ndarray:int32"}  # the dtype that LLM Foundry 0.22 writes


class Written(NamedTuple):
    """What was written to a folder."""

    rows: int
    left_out: int  # tokens at the end that do not fill a row


@contextmanager
def folder_of(
    out: Path | str, columns: Mapping[str, str], compression: str | None, hashes: Sequence[str] = ("sha1",)
) -> Iterator[MDSWriter]:
    """Open a writer for a new MDS folder, local or at a URL. A URL gets one shard after another.

    Args:
        columns: encoding of each column, in order.
        compression: null, zstd[:level], gz[:level], bz2[:level], br[:level] or snappy.
        hashes: names of hashlib or xxhash functions; the index keeps these hashes of every file.

    Raises:
        ConfigError: if the folder is not empty or cannot be written, or the compression is not known.
    """
    url = str(out) if is_url(str(out)) else None
    if url is not None and listing(url):
        raise ConfigError(f"{url}: is not empty; choose another folder")
    with tempfile.TemporaryDirectory() as passing:
        place = Path(out if url is None else passing)
        try:
            with MDSWriter(place, columns, compression, hashes, url=url) as writer:
                yield writer
        except OSError as error:
            if str(error.filename or place).startswith(str(place)):
                raise ConfigError(f"{out}: cannot be written: {error.strerror}") from None
            raise


def write_rows(stream: TokenStream, length: int, out: Path | str, compression: str | None = None) -> Written:
    """Write tokens [i*length, (i+1)*length) of a stream as sample i.

    Args:
        out: a local folder, or a URL, which gets one shard after another.

    Raises:
        ConfigError: if the folder is not empty or cannot be written, or the compression is not known.
    """
    n_rows, left_out = divmod(stream.n_tokens, length)
    with (
        folder_of(out, COLUMNS, compression) as writer,
        progress(f"writing {out}", n_rows * length, "tokens") as advance,
    ):
        for i in range(n_rows):
            writer.write({"tokens": stream.read(i * length, (i + 1) * length).astype("int32")})
            advance(length)
    return Written(n_rows, left_out)
