"""Tokens per second of the loader, with 1 and with 50 sources: python scripts/bench/loader.py.

Rows come from shards in the page cache, in batches as a run takes them, in one thread. The two loaders take turns batch
by batch, in changing order, so that both see the same machine. What 50 sources cost is taken from the processor's time,
which other processes change less than the clock's: the median over blocks of batches, each of which pays its part of
what is not done in every batch, such as the order of the next rows.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from llmfoundry.data import Loader, MixtureConfig, Source, SyntheticConfig, TokenStream
from llmfoundry.data.mixture import Mixture, Part
from llmfoundry.data.packing import assemble
from llmfoundry.data.parts import Share, write_part
from llmfoundry.data.rows import How, StreamRows, epochs_of
from llmfoundry.data.tokenizer import PLAIN_TEXT

RESULTS = Path(__file__).parent / "results" / "loader.json"
LENGTH, ROWS, BATCHES, BLOCK, WARM_UP, TOKENS = 2048, 512, 400, 16, 16, 10**8
NEEDED = 8 * 110_000  # tokens per second that eight GPUs take


class Words:
    """Stands for a tokenizer: a document is the number of tokens that are made up for it."""

    special = PLAIN_TEXT

    def encode(self, texts: list[str]) -> list[list[int]]:
        rng = np.random.default_rng(len(texts))
        return [rng.integers(1, 50_000, int(text)).tolist() for text in texts]


def build(n_sources: int, folder: Path) -> Loader:
    """A loader over TOKENS tokens of made-up documents."""
    how = How(LENGTH, seed=0, documents=True)
    rng = np.random.default_rng(0)
    parts, orders = [], []
    for i in range(n_sources):
        shard, part = folder / f"{n_sources}-{i}", folder / f"{n_sources}-{i}.part"
        shard.mkdir()
        documents = [str(n) for n in rng.integers(100, 2000, TOKENS // 1050 // n_sources)]
        source = Source(f"source-{i}", str(i), lambda documents=documents: iter(documents))
        counts = write_part(part, source, Share(), Words(), 0, np.dtype("<u2"), 0, lambda *_: None).counts  # type: ignore[arg-type]
        assemble(shard, [part], {"fingerprint": shard.name, "dtype": "<u2", "eos_token_id": 0}, counts)
        dataset = SyntheticConfig(name="synthetic")
        parts.append(Part(dataset=dataset, label=f"s{i}", weight=round(float(rng.uniform(0.2, 2.0)), 3)))
        stream = TokenStream(shard)
        stream.read(0, stream.n_tokens)  # every page is mapped, however often the source is read later
        orders.append(epochs_of(StreamRows(stream, source.title, how), dataset, how))
    return Loader(orders[0] if n_sources == 1 else Mixture(MixtureConfig(datasets=parts), orders))


class Speed(NamedTuple):
    """Of one batch, or the mean of several."""

    seconds: float  # by the clock
    processor_seconds: float


def measure(loader: Loader, number: int) -> Speed:
    """Read one batch, by its number."""
    begin, used = time.perf_counter(), time.process_time()
    loader.batch(number * ROWS, ROWS)
    return Speed(time.perf_counter() - begin, time.process_time() - used)


def blocks(speeds: list[Speed]) -> list[Speed]:
    """The means of BLOCK batches each."""
    parts = (speeds[i : i + BLOCK] for i in range(0, len(speeds), BLOCK))
    return [Speed(*(statistics.fmean(column) for column in zip(*part, strict=True))) for part in parts]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        loaders = {n: build(n, Path(folder)) for n in (1, 50)}
        for i in range(WARM_UP):
            for loader in loaders.values():
                measure(loader, i)
        table = time.process_time()
        mixture = loaders[50].order
        assert isinstance(mixture, Mixture)
        mixture.counts(mixture.period - 1)  # the table of the mixture, which is made once
        table = time.process_time() - table
        found: dict[int, list[Speed]] = {n: [] for n in loaders}
        for i in range(WARM_UP, WARM_UP + BATCHES):
            for n, loader in list(loaders.items())[:: 1 if i % 2 else -1]:
                found[n].append(measure(loader, i))
        load = os.getloadavg()[0]
    found = {n: blocks(speeds) for n, speeds in found.items()}
    rate = {n: ROWS * LENGTH / statistics.median(speed.seconds for speed in speeds) for n, speeds in found.items()}
    used = {n: statistics.median(speed.processor_seconds for speed in speeds) for n, speeds in found.items()}
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    result = {
        "git_sha": git.stdout.strip() or "unknown",
        "machine": platform.platform(),
        "torch": torch.__version__,
        "config": {"max_seq_len": LENGTH, "rows_per_batch": ROWS, "batches": BATCHES, "batches_per_block": BLOCK,
                   "warm_up": WARM_UP, "tokens": TOKENS, "sequence_ids": True, "threads": 1},
        "load_average": round(load, 2),
        "tokens_per_second": {str(n): round(each) for n, each in rate.items()},
        "table_seconds_once": round(table, 3),
        "processor_ms_per_batch": {str(n): round(1e3 * each, 3) for n, each in used.items()},
        "processor_ms_quartiles": {
            str(n): [round(1e3 * q, 3) for q in statistics.quantiles(speed.processor_seconds for speed in speeds)]
            for n, speeds in found.items()
        },
        "cost_of_50_sources": round(used[50] / used[1] - 1, 4),
        "needed_by_8_gpus": NEEDED,
        "times_what_is_needed": round(rate[50] / NEEDED, 1),
    }  # fmt: skip
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
