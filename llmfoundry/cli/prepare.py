"""`prepare_data.py YAML [key=value ...]`: tokenize a run's datasets ahead of time, on machines without GPUs."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmfoundry.cli.command import command, read_run_config
from llmfoundry.cli.parser import Parser, integer, program
from llmfoundry.cli.train import sees_documents
from llmfoundry.config import ConfigError

if TYPE_CHECKING:
    from llmfoundry.data.packing import TokenStream
    from llmfoundry.data.parts import Share
    from llmfoundry.train.config import RunConfig


@command
def prepare_data_main(argv: Sequence[str] | None = None) -> None:
    """`prepare_data.py YAML [--workers N] [--part I/N] [--dedup] [--filter FUNCTION] [key=value ...]`."""
    parser = Parser(
        program("prepare", "prepare_data.py"),
        "Tokenize the datasets of a run before it starts, on all cores. The run then reads the tokens.",
        [
            "llmfoundry prepare yamls/moe.yaml",
            "llmfoundry prepare yamls/olmoe-1b-7b.yaml --workers 16 --part 1/4 --dedup",
            "llmfoundry prepare yamls/moe.yaml --format mds --out mds",
        ],
    )
    parser.add_argument("yaml", help="the run, e.g. yamls/moe.yaml")
    parser.add_overrides("replace settings of the YAML")
    parser.add_argument(
        "--workers", type=integer(1), metavar="N", help="processes that tokenize; default: one per core"
    )
    parser.add_argument("--part", default="1/1", metavar="I/N", help="only part I of N of the files")
    parser.add_argument("--dedup", action="store_true", help="drop training documents that are equal to an earlier one")
    parser.add_argument(
        "--filter",
        metavar="FILE.py:FUNCTION",
        help="keep documents for which it returns true",
    )
    parser.add_argument("--format", choices=("tokens", "mds"), default="tokens", help="mds: also write MDS folders")
    parser.add_argument(
        "--out", help="for --format mds: the folder or URL below which train, validation, ... are written"
    )
    parser.add_argument("--compression", help="for --format mds: zstd[:level], gz, bz2, br or snappy")
    args = parser.parse_intermixed_args(argv)
    if (args.format == "mds") != (args.out is not None) or (args.compression and args.format != "mds"):
        raise ConfigError("--format mds and --out FOLDER belong together; --compression is for them")
    if args.out is not None:
        from llmfoundry.data.remote import data_path

        try:
            args.out = data_path(args.out)
        except ValueError as error:
            raise ConfigError(f"--out {error}") from None
    workers = len(os.sched_getaffinity(0)) if args.workers is None else args.workers
    from llmfoundry.data.parts import Share

    share = Share.parse(args.part)
    if share.of > 1 and args.format == "mds":
        raise ConfigError("--format mds: is written of whole datasets; run it without --part once all parts are done")
    config = read_run_config(args.yaml, args.overrides)
    _prepare(config, args, workers, share)


def _prepare(config: RunConfig, args: argparse.Namespace, workers: int, share: Share) -> None:
    from llmfoundry.data.packing import prepare_part
    from llmfoundry.data.parts import Share
    from llmfoundry.data.rows import How, RowsConfig
    from llmfoundry.data.sources import check_apart
    from llmfoundry.data.texts import TextsConfig

    for part in config.due_evaluations:
        check_apart(config.train_loader.dataset, part.dataset)
    tokenizer = config.tokenizer.build(config.train_loader.dataset, [part.dataset for part in config.due_evaluations])
    special = config.tokenizer.special_tokens(tokenizer)
    changes = ({"dedup": True} if args.dedup else {}) | ({"filter": args.filter} if args.filter else {})
    named = [each for name, loader in config.loaders.items() for each in loader.datasets(name).items()]
    for where, dataset in named:
        how = How(dataset.max_seq_len or config.max_seq_len, config.seed, sees_documents(config), special=special)
        if isinstance(dataset, RowsConfig):
            rows = dataset.order(tokenizer, how)
            print(f"{where}: {rows.rows_per_epoch:,} rows of {rows.length:,} tokens")
            continue
        if changes and where.startswith("train_loader"):
            if not isinstance(dataset, TextsConfig):
                raise ConfigError(f"{where}: {dataset.name} takes neither --dedup nor --filter")
            dataset = dataset.model_copy(update=changes)
        start = time.perf_counter()
        # If a dataset has too few files to divide, the first machine takes all of it.
        divided = share.of > 1 and len(dataset.build().pieces) >= share.of
        if share.number > 1 and not divided:
            print(f"{where}: has too few files for {share.of} parts; part 1 takes all of it")
            continue
        stream = prepare_part(dataset, tokenizer, special, share if divided else Share(), workers)
        seconds = time.perf_counter() - start
        if stream is None:
            print(f"{where}: part {share} is done, in {seconds:,.1f} s; others are not")
            continue
        for line in _report(stream, where, seconds, changes if where.startswith("train_loader") else {}):
            print(line)
        if args.format == "mds":
            which = where.partition(".")[2]  # the source in a mixture, or the label of an evaluation
            name = f"{dataset.split}-{which}" if which else dataset.split
            _write_mds(stream, where, how.length, f"{args.out.rstrip('/')}/{name}", args.compression)


def _report(stream: TokenStream, where: str, seconds: float, changes: dict[str, object]) -> Iterator[str]:
    """Print how much was read, left out and written."""
    yield f"{where}: {stream.n_tokens:,} tokens of {stream.n_bytes:,} bytes in {Path(stream.folder)}"
    if stream.counts is not None:
        yield f"{where}: {stream.counts}"
    yield f"{where}: {stream.n_shards:,} files; {seconds:,.1f} s, {stream.n_tokens / seconds:,.0f} tokens/s"
    if changes:
        keys = ", ".join(f"{key}: {str(value).lower() if value is True else value}" for key, value in changes.items())
        yield f"{where}: a run reads this with `{keys}` in its dataset"


def _write_mds(stream: TokenStream, where: str, length: int, folder: str, compression: str | None) -> None:
    from llmfoundry.data.mds_write import write_rows

    written = write_rows(stream, length, folder, compression)
    left = f"{written.left_out:,} tokens at the end fill no row"
    print(f"{where}: {written.rows:,} rows of {length:,} tokens in {folder}; {left}")
