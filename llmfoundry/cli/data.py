"""`llmfoundry data show|stats PATH|YAML`: show what a model will read, and statistics of it."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llmfoundry.cli.command import command, read_run_config
from llmfoundry.cli.parser import Parser, integer
from llmfoundry.cli.train import sees_documents
from llmfoundry.config import ConfigError, check

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmfoundry.data.loader import LoaderConfig
    from llmfoundry.data.sources import DatasetConfig
    from llmfoundry.data.statistics import Statistics
    from llmfoundry.data.tokenizer import SpecialTokens

CONFIG = "config.yaml"  # name of a file in the save_folder
CHARACTERS = 2000  # of a document, shown without a tokenizer


class _Opened(NamedTuple):
    """The data named on the command line."""

    loaders: dict[str, LoaderConfig]
    tokenizer: PreTrainedTokenizerBase | None
    special: SpecialTokens
    length: int
    seed: int
    documents: bool


@command
def data_main(argv: Sequence[str] | None = None) -> None:
    """`data show|stats PATH|YAML|RUN [--row N] [--tokenizer NAME] [--json] [key=value ...]`."""
    parser = Parser(
        "llmfoundry data",
        "Show the rows that a model will read, or statistics of a dataset.",
        [
            "llmfoundry data show yamls/moe.yaml --rows 2",
            "llmfoundry data stats texts --tokenizer allenai/OLMoE-1B-7B-0924",
            "llmfoundry data show runs/moe --row 17",
        ],
    )
    parser.add_argument(
        "way", metavar="show|stats", choices=("show", "stats"),
        help="show: the first rows, decoded, with their documents and the tokens that are learned; stats: number, "
        "length and duplicates of documents and rows",
    )  # fmt: skip
    parser.add_argument("target", help="a run's save_folder or YAML; or a file, folder, glob or URL of data")
    parser.add_overrides("replace settings of the YAML")
    parser.add_argument("--tokenizer", help="a folder or hub id; a YAML has its own")
    parser.add_argument(
        "--max-seq-len",
        type=integer(1),
        default=2048,
        metavar="N",
        help="tokens per row; default: the YAML's, else 2048",
    )
    parser.add_argument("--rows", type=integer(1), default=4, metavar="N", help="for show: how many; default: 4")
    parser.add_argument(
        "--row", type=integer(0), nargs="+", metavar="N", action="extend",
        help="for show: rows of the training data by their numbers in the run, as skipped.jsonl has them",
    )  # fmt: skip
    parser.add_argument("--limit", type=integer(1), metavar="N", help="for stats: only the first N documents or rows")
    parser.add_argument("--json", action="store_true", help="one JSON object per row or dataset")
    args = parser.parse_intermixed_args(argv)
    if args.row is not None:
        _show_numbered(args)
        return
    if (Path(args.target) / CONFIG).is_file():  # a run: what its YAML reads
        args.target = str(Path(args.target) / CONFIG)
    opened = _of_yaml(args) if args.target.endswith((".yaml", ".yml")) else _of_path(args)
    if args.way == "show":
        _show(opened, args.rows, args.json)
    else:
        _stats(opened, args.limit, args.json)


def _of_yaml(args: argparse.Namespace) -> _Opened:
    config = read_run_config(args.target, args.overrides)
    if args.tokenizer is not None:
        raise ConfigError(f"--tokenizer {args.tokenizer}: works with paths only; for a YAML, write tokenizer.name=...")
    tokenizer = config.tokenizer.build(config.train_loader.dataset, [part.dataset for part in config.due_evaluations])
    special = config.tokenizer.special_tokens(tokenizer)
    return _Opened(config.loaders, tokenizer, special, config.max_seq_len, config.seed, sees_documents(config))


def _of_path(args: argparse.Namespace) -> _Opened:
    from llmfoundry.data.guess import dataset_at
    from llmfoundry.data.loader import LoaderConfig
    from llmfoundry.data.tokenizer import TokenizerConfig
    from llmfoundry.settings import from_dotlist

    given = from_dotlist(args.overrides)
    dataset = dataset_at(args.target) | {"validation_fraction": 0.0, "shuffle": False} | given
    loader = check(LoaderConfig, {"dataset": dataset})
    config = TokenizerConfig(name=args.tokenizer or "bpe")
    tokenizer = None if args.tokenizer is None else config.build(loader.dataset)
    special = TokenizerConfig().special_tokens(tokenizer) if tokenizer is not None else _plain()
    return _Opened({args.target: loader}, tokenizer, special, args.max_seq_len, 0, True)


def _plain() -> SpecialTokens:
    from llmfoundry.data.tokenizer import PLAIN_TEXT

    return PLAIN_TEXT


def _show(opened: _Opened, rows: int, as_json: bool) -> None:
    from llmfoundry.data.rows import RowsConfig
    from llmfoundry.data.show import PLAIN, TERMINAL, as_data, shown

    marks = TERMINAL if sys.stdout.isatty() else PLAIN
    for name, loader in opened.loaders.items():
        if opened.tokenizer is None:
            if isinstance(loader.dataset, RowsConfig):
                raise ConfigError(f"{name}: holds tokens or conversations; name their tokenizer with --tokenizer")
            _show_texts(name, loader.dataset, rows, as_json)
            continue
        built = loader.build(
            opened.tokenizer, seed=opened.seed, max_seq_len=opened.length, sequence_ids=opened.documents,
            special=opened.special,
        )  # fmt: skip
        batch = built.batch(0, rows)
        if as_json:
            for each in as_data(batch, opened.tokenizer, built.labels):
                print(json.dumps({"loader": name} | each))
            continue
        print(f"{name}:")
        for line in shown(batch, opened.tokenizer, built.labels, rows, marks):
            print(line)


def _show_numbered(args: argparse.Namespace) -> None:
    """Show rows of a run by their numbers, which are the same in each of its processes."""
    import numpy as np

    from llmfoundry.checkpoint.checkpointer import Checkpointer
    from llmfoundry.data.show import PLAIN, TERMINAL, as_data, shown
    from llmfoundry.train.resume import find_start
    from llmfoundry.train.run_data import numbered_rows
    from llmfoundry.train.run_tokenizer import settle_tokenizer

    folder = Path(args.target)
    if args.way != "show" or not (folder / CONFIG).is_file():
        raise ConfigError(f"--row: is for data show and the save_folder of a run; {folder} has no {CONFIG}")
    config = read_run_config(str(folder / CONFIG), [*args.overrides, f"save_folder={folder}", "autoresume=true"])
    start = find_start(config, Checkpointer(folder / "checkpoints"))
    config, tokenizer, special = settle_tokenizer(config, start)
    loader = numbered_rows(config, tokenizer, special, start)
    batch = loader.gather(np.array(args.row, dtype=np.int64))
    if args.json:
        for each in as_data(batch, tokenizer, loader.labels):
            print(json.dumps(each))
        return
    marks = TERMINAL if sys.stdout.isatty() else PLAIN
    for line in itertools.islice(shown(batch, tokenizer, loader.labels, len(args.row), marks), 1, None):
        print(line)


def _show_texts(name: str, dataset: DatasetConfig, rows: int, as_json: bool) -> None:
    for number, text in enumerate(itertools.islice(dataset.build().documents(), rows)):
        n_bytes = len(text.encode())
        if as_json:
            print(json.dumps({"loader": name, "document": number, "bytes": n_bytes, "text": text}))
            continue
        more = f"\n(and {len(text) - CHARACTERS:,} more characters)" if len(text) > CHARACTERS else ""
        print(f"--- {name}: document {number}, {n_bytes:,} bytes ---\n{text[:CHARACTERS]}{more}")


def _stats(opened: _Opened, limit: int | None, as_json: bool) -> None:
    from llmfoundry.data import statistics

    found = list(_statistics(opened, limit))
    if as_json:
        for each in found:
            print(json.dumps(statistics.as_data(each)))
    elif sys.stdout.isatty():
        _table(found)
    else:
        print("\n".join(statistics.lines(found)))


def _statistics(opened: _Opened, limit: int | None) -> Iterator[Statistics]:
    from llmfoundry.data import statistics
    from llmfoundry.data.rows import How, RowsConfig
    from llmfoundry.data.tokenizer import Encoder

    encoder = None if opened.tokenizer is None else Encoder(opened.tokenizer, opened.special)
    for name, loader in opened.loaders.items():
        for where, dataset in loader.datasets(name).items():
            if not isinstance(dataset, RowsConfig):
                source = dataset.build()
                yield statistics.of_texts(where, source.read(), encoder, limit, source.summary)
                continue
            if opened.tokenizer is None:
                raise ConfigError(f"{where}: holds tokens or conversations; name their tokenizer with --tokenizer")
            how = How(dataset.max_seq_len or opened.length, opened.seed, opened.documents, special=opened.special)
            rows = dataset.order(opened.tokenizer, how).once
            if rows is None:
                raise ConfigError(f"{where}: has streams in counts of rows; name one of its folders")
            yield statistics.of_rows(where, rows, limit)


def _table(found: Sequence[Statistics]) -> None:
    from rich.console import Console
    from rich.table import Table

    from llmfoundry.data.statistics import QUANTILES

    console = Console()
    for each in found:
        first = "" if each.complete else "the first "
        table = Table(
            title=f"{each.name}: {first}{each.number:,} {each.kind}, {each.empty:,} empty, "
            f"{each.duplicates:,} equal to an earlier one",
            caption=each.summary,
        )
        for column in ("", "in all", "mean", *QUANTILES):
            table.add_column(column, justify="right" if column else "left")
        for lengths in each.lengths:
            row = [f"{value:,}" for value in lengths.quantiles.values()]
            table.add_row(lengths.what, f"{lengths.total:,}", f"{lengths.mean:,.1f}", *row)
        console.print(table)
