"""Tokens per second of the loader, with 1 and with 50 sources: python scripts/bench/loader.py.

Rows come from shards in the page cache, in batches as a run takes them, from one process; torch may use two cores. The
median of several passes is reported; the two loaders take turns, so that both see the same machine.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from llmfoundry.config import check
from llmfoundry.data import DatasetConfig, Loader, LoaderConfig, TokenizerConfig

RESULTS = Path(__file__).parent / "results" / "loader.json"
LENGTH, ROWS, BATCHES, PASSES = 2048, 512, 24, 9
NEEDED = 8 * 110_000  # tokens per second that eight GPUs take


def build(n_sources: int, folder: Path) -> Loader:
    """A loader over synthetic text, the same amount in all."""
    text = {"name": "synthetic", "document_words": 400, "vocab_size": 200, "cache_dir": str(folder)}
    rng = np.random.default_rng(0)
    parts = [
        text | {"seed": i, "n_documents": 20_000 // n_sources, "label": f"s{i}", "weight": round(float(w), 3)}
        for i, w in enumerate(rng.uniform(0.2, 2.0, n_sources))
    ]
    tokenizer = TokenizerConfig(vocab_size=500).build(check(DatasetConfig, text | {"n_documents": 400}))
    data: dict[str, object] = {"datasets": parts}
    if n_sources == 1:
        data = {"dataset": {key: value for key, value in parts[0].items() if key not in ("label", "weight")}}
    return check(LoaderConfig, data).build(tokenizer, seed=0, max_seq_len=LENGTH, sequence_ids=True)


def tokens_per_second(loader: Loader, start: int) -> float:
    """Of BATCHES batches from row `start` on."""
    begin = time.perf_counter()
    for i in range(BATCHES):
        loader.batch(start + i * ROWS, ROWS)
    return BATCHES * ROWS * LENGTH / (time.perf_counter() - begin)


def main() -> None:
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        loaders = {n: build(n, Path(folder)) for n in (1, 50)}
        for loader in loaders.values():
            tokens_per_second(loader, 0)  # warm-up: files into the page cache, and the table of the mixture
        rates: dict[int, list[float]] = {n: [] for n in loaders}
        for i in range(PASSES):
            for n, loader in loaders.items():
                rates[n].append(tokens_per_second(loader, i * BATCHES * ROWS))
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    medians = {n: statistics.median(found) for n, found in rates.items()}
    result = {
        "git_sha": git.stdout.strip() or "unknown",
        "machine": platform.platform(),
        "torch": torch.__version__,
        "config": {"max_seq_len": LENGTH, "rows_per_batch": ROWS, "batches": BATCHES, "passes": PASSES,
                   "sequence_ids": True, "threads": 2},
        "tokens_per_second": {str(n): {"median": round(medians[n]), "least": round(min(found)), "most": round(max(found))}
                              for n, found in rates.items()},
        "cost_of_50_sources": round(1 - medians[50] / medians[1], 4),
        "needed_by_8_gpus": NEEDED,
        "times_what_is_needed": round(medians[50] / NEEDED, 1),
    }  # fmt: skip
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
