"""Rows of several streams of tokens, read as a block: what each stream holds, in any order, however it is cut."""

from __future__ import annotations

import os

import numpy as np
import pytest

from llmfoundry.config import ConfigError
from llmfoundry.data import IGNORE, Source, TokenStream, pack, parts
from llmfoundry.data.rows import StreamReader
from tests.data.chat_tokenizer import tokenizer

LENGTH = 8


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> list[TokenStream]:
    """Of one shard, of shards that are shorter than a row, and of many."""
    folder = tmp_path_factory.mktemp("streams")
    found: list[TokenStream] = []
    with pytest.MonkeyPatch.context() as patch:
        for number, shard_tokens in enumerate([10**6, 5, 3]):
            patch.setattr(parts, "SHARD_TOKENS", shard_tokens)
            texts = [f"text {i} of stream {number} " * (1 + i % 4) for i in range(40 + number)]
            found.append(
                pack(Source(f"s{number}", f"{number}", lambda texts=texts: iter(texts)), tokenizer(), folder)
            )  # fmt: skip
    return found


def test_rows_are_those_of_each_stream(streams: list[TokenStream]) -> None:
    reader = StreamReader(streams, LENGTH, documents=True)
    rng = np.random.default_rng(0)
    n_rows = np.array([-(-(stream.n_tokens - 1) // LENGTH) for stream in streams])
    assert n_rows.min() > 20
    sources = rng.integers(0, 3, 400)
    numbers = rng.integers(0, n_rows[sources] + 2)  # past the end too, where rows have no labels
    block = reader.read(sources, numbers)
    assert block.documents is not None
    partial = 0
    for i, (source, number) in enumerate(zip(sources.tolist(), numbers.tolist(), strict=True)):
        stream, start = streams[source], number * LENGTH
        ids = stream.read(0, stream.n_tokens)[start : start + LENGTH + 1]
        n = max(len(ids) - 1, 0)
        partial += 0 < n < LENGTH
        assert block.tokens[i].tolist() == [*ids[:-1], *[stream.eos_token_id] * (LENGTH - n)]
        assert block.labels[i].tolist() == [*ids[1:], *[IGNORE] * (LENGTH - n)]
        assert block.documents[i].tolist() == np.cumsum(block.tokens[i] == stream.eos_token_id).tolist()
    assert partial > 0
    assert StreamReader(streams, LENGTH, documents=False).read(sources, numbers).documents is None


def test_files_of_all_streams_that_are_open_are_bounded(streams: list[TokenStream]) -> None:
    assert sum(stream.n_shards for stream in streams) > 500
    reader = StreamReader(streams, LENGTH, documents=False)
    for source in range(3):
        numbers = np.arange(-(-(streams[source].n_tokens - 1) // LENGTH))
        reader.read(np.full_like(numbers, source), numbers)
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    files = [os.readlink(link) for link in links if os.path.lexists(link)]
    n_open = sum(file.startswith(str(stream.folder)) for file in files for stream in streams)
    assert 0 < n_open <= 256


def test_a_shard_that_is_gone_is_named(streams: list[TokenStream]) -> None:
    stream = streams[1]
    shard = stream.folder / "tokens-00001.bin"
    content = shard.read_bytes()
    reader = StreamReader([stream], 4, documents=False)
    os.truncate(shard, 4)
    try:
        with pytest.raises(ConfigError, match="tokens-00001.bin: has become shorter"):
            reader.read(np.zeros(4, np.int64), np.arange(4))
    finally:
        shard.write_bytes(content)
