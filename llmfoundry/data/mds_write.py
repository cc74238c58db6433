"""Write a tokenised dataset as an MDS folder of rows, which mosaicml-streaming and LLM Foundry read too."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from llmfoundry.data.mds import MDSWriter
from llmfoundry.data.packing import TokenStream
from llmfoundry.progress import progress

COLUMNS = {"tokens": "ndarray:int32"}  # as LLM Foundry 0.22 writes them


class Written(NamedTuple):
    """What a folder was given."""

    rows: int
    left_out: int  # tokens at the end that fill no row


def write_rows(stream: TokenStream, length: int, out: Path, compression: str | None = None) -> Written:
    """Write tokens [i*length, (i+1)*length) of a stream as sample i.

    Raises:
        ConfigError: the folder holds something, or the compression is not known.
    """
    n_rows, left_out = divmod(stream.n_tokens, length)
    with (
        MDSWriter(out, COLUMNS, compression, hashes=("sha1",)) as writer,
        progress(f"writing {out}", n_rows * length, "tokens") as advance,
    ):
        for i in range(n_rows):
            writer.write({"tokens": stream.read(i * length, (i + 1) * length).astype("int32")})
            advance(length)
    return Written(n_rows, left_out)
