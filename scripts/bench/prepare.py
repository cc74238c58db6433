"""Text to token shards: `prepare` on one process and on two, beside `datasets.map` with the same tokenizer on one.

Two processes that share nothing, each with every other document, say what this machine can gain from a second one.

    python scripts/bench/prepare.py
    python scripts/bench/prepare.py --scaling --bytes 100000000 --repeats 3

The corpus is the Python source of the installed packages, as JSON lines. The ways take turns, each from JSON lines to
ids on disk, in a process of its own; start-up and the digest of the files are not counted. Per core: processor seconds,
children included; those of the clock depend on what else the machine does, so the load is recorded. Writes
scripts/bench/results/prepare.json; with --scaling, which leaves `datasets.map` out, prepare_scaling.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import resource
import statistics
import subprocess
import sysconfig
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import tokenizers
import torch
from transformers import PreTrainedTokenizerBase

from llmfoundry.config import check
from llmfoundry.data import DatasetConfig, TokenizerConfig, prepare

RESULTS = Path(__file__).parent / "results"
VOCAB = 16_384
WAYS = ("datasets.map", "1 process", "2 processes", "2 apart")


class Taken(NamedTuple):
    """What one pass took."""

    seconds: float  # by the clock
    processor_seconds: float  # of the process and its children
    tokens: int
    checksum: int  # of all ids, without ends of text


def corpus(path: Path, halves: tuple[Path, Path], size: int) -> int:
    """Write JSON lines of about `size` bytes, once whole and once in two halves; returns the number of documents."""
    folder = Path(sysconfig.get_paths()["purelib"])
    files = sorted(file for file in folder.rglob("*.py") if 200 < file.stat().st_size < 200_000)
    random.Random(17).shuffle(files)
    written = n = 0
    with path.open("w") as out, halves[0].open("w") as even, halves[1].open("w") as odd:
        for file in files:
            text = file.read_text(encoding="utf-8", errors="ignore")
            line = json.dumps({"text": text}) + "\n"
            out.write(line)
            (odd if n % 2 else even).write(line)
            written, n = written + len(text), n + 1
            if written >= size:
                break
    return n


def by_map(lines: Path, folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """As its documentation shows: batched, without the columns that are not needed; ids alone."""
    found = datasets.load_dataset("json", data_files=str(lines), split="train", cache_dir=str(folder))
    ids = found.map(
        # As ours: special tokens that a text spells stay text.
        lambda rows: {
            "input_ids": tokenizer(rows["text"], add_special_tokens=False, split_special_tokens=True)["input_ids"]
        },
        batched=True, remove_columns=found.column_names,
    )  # fmt: skip
    column = ids.data.column("input_ids").combine_chunks().values.to_numpy()
    return len(column), int(column.astype(np.int64).sum())


def one(way: str, lines: Path, tokenizer: PreTrainedTokenizerBase, together: Barrier | None = None) -> Taken:
    """One way, in this process; `together`: when others are ready too."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory(dir=lines.parent) as folder:
        data = {"name": "text_files", "path": str(lines), "validation_fraction": 0.0, "cache_dir": folder}
        dataset = check(DatasetConfig, data)
        dataset.build()
        if together is not None:
            together.wait()
        begin, used = time.perf_counter(), _processor()
        if way == "datasets.map":
            datasets.disable_progress_bars()
            tokens, checksum = by_map(lines, Path(folder), tokenizer)
        else:
            stream = prepare(dataset, tokenizer, workers=int(way[0]))
        seconds, used = time.perf_counter() - begin, _processor() - used
        if way != "datasets.map":
            ids = stream.read(0, stream.n_tokens)
            kept = ids[ids != stream.eos_token_id]
            tokens, checksum = len(kept), int(kept.sum())
        return Taken(seconds, used, tokens, checksum)


def apart(halves: tuple[Path, Path], tokenizer: PreTrainedTokenizerBase) -> Taken:
    """Both halves at once, each by one process: the clock of the slower, and the rest of both."""
    fork = multiprocessing.get_context("fork")
    together, found = fork.Barrier(2), fork.SimpleQueue()
    each = [
        fork.Process(target=lambda half=half: found.put(one("1 process", half, tokenizer, together))) for half in halves
    ]
    for process in each:
        process.start()
    a, b = found.get(), found.get()
    for process in each:
        process.join()
    return Taken(max(a.seconds, b.seconds), *(x + y for x, y in zip(a[1:], b[1:], strict=True)))


def _processor() -> float:
    """Seconds of this process and of its children that have ended."""
    each = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=30_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scaling", action="store_true", help="only one process and two, not datasets.map")
    args = parser.parse_args()
    ways = WAYS[1:] if args.scaling else WAYS
    with tempfile.TemporaryDirectory() as name:
        lines, halves = Path(name) / "corpus.jsonl", (Path(name) / "even.jsonl", Path(name) / "odd.jsonl")
        n_documents = corpus(lines, halves, args.bytes)
        learned = {"name": "text_files", "path": str(lines), "validation_fraction": 0.0, "cache_dir": name}
        tokenizer = TokenizerConfig(vocab_size=VOCAB).build(check(DatasetConfig, learned))
        fork = multiprocessing.get_context("fork")
        found: dict[str, list[Taken]] = {way: [] for way in ways}
        loads = []
        for i in range(args.repeats):
            loads.append(os.getloadavg()[0])
            for way in ways[:: 1 if i % 2 else -1]:
                if way == "2 apart":
                    taken = apart(halves, tokenizer)
                else:
                    with ProcessPoolExecutor(1, fork) as pool:
                        taken = pool.submit(one, way, lines, tokenizer).result()
                found[way].append(taken)
                print(way, taken, flush=True)
        size = lines.stat().st_size
    agree = {(taken.tokens, taken.checksum) for each in found.values() for taken in each}
    if len(agree) != 1:
        raise RuntimeError(f"the ways do not agree: {agree}")
    seconds = {way: statistics.median(taken.seconds for taken in each) for way, each in found.items()}
    used = {way: statistics.median(taken.processor_seconds for taken in each) for way, each in found.items()}
    tokens = agree.pop()[0]
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    result = {
        "git_sha": git.stdout.strip() or "unknown",
        "machine": platform.platform(),
        "torch": torch.__version__,
        "versions": {"datasets": datasets.__version__, "tokenizers": tokenizers.__version__},
        "config": {"bytes": size, "documents": n_documents, "tokens": tokens, "vocab_size": VOCAB,
                   "repeats": args.repeats, "cores": len(os.sched_getaffinity(0))},
        "load_average": [round(load, 2) for load in loads],
        "seconds": {way: round(each, 3) for way, each in seconds.items()},
        "processor_seconds": {way: round(each, 3) for way, each in used.items()},
        "all_seconds": {way: [round(taken.seconds, 3) for taken in each] for way, each in found.items()},
        "tokens_per_processor_second": {way: round(tokens / each) for way, each in used.items()},
        "two_processes_to_one": round(seconds["1 process"] / seconds["2 processes"], 2),
        "two_processes_to_one_by_processor_time": round(2 * used["1 process"] / used["2 processes"], 2),
        "two_apart_to_one": round(seconds["1 process"] / seconds["2 apart"], 2),
        "two_apart_to_one_by_processor_time": round(2 * used["1 process"] / used["2 apart"], 2),
    }  # fmt: skip
    if not args.scaling:
        result["times_datasets_map_per_core"] = round(used["datasets.map"] / used["1 process"], 2)
    (RESULTS / ("prepare_scaling.json" if args.scaling else "prepare.json")).write_text(
        json.dumps(result, indent=1) + "\n"
    )
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
