"""What a process holds in memory of a corpus that is far larger: an index of 5 T tokens, opened by the real code."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from llmfoundry.data.packing import TokenStream, assemble
from llmfoundry.data.parts import SHARD_TOKENS, Shard, State, shard_name
from llmfoundry.data.rows import How, StreamRows, epochs_of
from llmfoundry.data.sieve import Counts
from llmfoundry.data.sources import SyntheticConfig

TOKENS = 5 * 10**12
RANKS = 8  # of a node, each of which opens the index


def test_the_index_of_five_trillion_tokens_is_less_than_a_gigabyte_a_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The checksums of ten terabytes of zeros, which a thread would compare beside.
    monkeypatch.setattr(TokenStream, "_check_bytes", lambda *_: None)
    part, folder = tmp_path / "part", tmp_path / "stream"
    part.mkdir()
    folder.mkdir()
    n_shards = -(-TOKENS // SHARD_TOKENS)
    # Shards are two sparse files that take no room, under many names; one file may have 65,000 of them.
    files = [tmp_path / name for name in ("even", "odd")]
    for each in files:
        with each.open("wb") as file:
            file.truncate(2 * SHARD_TOKENS)
    for number in range(n_shards):
        (part / shard_name(number)).hardlink_to(files[number % 2])
    counts = Counts(read=5 * 10**9, kept=5 * 10**9, kept_bytes=4 * TOKENS)
    state = State([Shard(SHARD_TOKENS, "0" * 64)] * n_shards, counts, n_shards * SHARD_TOKENS, done=True)
    (part / "state.json").write_text(json.dumps(state._asdict()))
    assemble(folder, [part], {"fingerprint": "five trillion", "dtype": "<u2", "eos_token_id": 0}, counts)

    tracemalloc.start()
    how = How(4096, seed=0)
    order = epochs_of(StreamRows(TokenStream(folder), "corpus", how), SyntheticConfig(name="synthetic"), how)
    for start in np.linspace(0, order.rows_per_epoch - 4, 300).astype(np.int64):  # of as many shards
        order.read(np.arange(start, start + 4))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert order.rows_per_epoch > 1.2e9 and n_shards > 37_000
    assert RANKS * peak < 2**30, f"{peak:,} bytes per process while the index is read"
    assert held < 2**25, f"{held:,} bytes per process afterwards"
