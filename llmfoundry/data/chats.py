"""The `finetuning` dataset: conversations and instructions, each a document of its own.

    rows of a table (local files, the hub, MDS) > conversations.py > chat_template.py > tokens on disk, once > rows

If attention keeps documents apart (`attn_uses_sequence_id`), examples share rows (data/bins.py), and positions restart
in each. Otherwise each example has a row of its own.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self, TypeVar

import numpy as np
from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerBase

from llmfoundry.config import ConfigError, is_url, reason
from llmfoundry.data.chat_rows import ChatRows, write
from llmfoundry.data.chat_template import Renderer, Responses, Targets
from llmfoundry.data.conversations import Conversation, Example, Tokenized, code_of, example_of, preprocess
from llmfoundry.data.mds_rows import Folders, TokenEncoding, samples
from llmfoundry.data.provenance import Gone
from llmfoundry.data.rows import How, Order, epochs_of
from llmfoundry.data.sources import Source, fingerprint_of
from llmfoundry.data.table_files import Table, gone_table, table_of
from llmfoundry.data.tables import BadRow, Row
from llmfoundry.data.tokenizer import Encoder
from llmfoundry.data.watch import Watch
from llmfoundry.runtime import cache_root

log = logging.getLogger(__name__)
Made = TypeVar("Made")

_PLACES = {"data_files", "data_dir"}  # keys of hf_kwargs that say where files are
_READERS = ("json", "csv", "parquet")  # the names under which `datasets` reads files
_AT_LEAST = re.compile(r"length>=(\d+)")


class ChatsConfig(Folders, names=("chats",)):
    """Examples from local files (`path`), the hub (`hf_name`) or MDS (`local`, `remote`, `streams`)."""

    KIND: ClassVar[str] = "chats/6"  # version of the tokenized rows; rows of another version are made again

    path: str | None = None  # a folder, a glob or one file, also as a URL: .jsonl, .json, .csv, .tsv, .parquet
    hf_name: str | None = None  # a hub dataset or a folder; or json, csv, parquet with hf_kwargs.data_files
    hf_kwargs: dict[str, object] = {}  # arguments of datasets.load_dataset; with these it can read local files too
    # `package.module:function` that converts a row to a known format; a mapping from known columns to the data's, e.g.
    # {prompt: question, response: answer}; or a dataset whose rows LLM Foundry converts, e.g. tatsu-lab/alpaca
    preprocessing_fn: str | dict[str, str] | None = None
    chat_template: str | None = None  # replaces the tokenizer's template: a file, or the template itself
    target_responses: Responses = "all"  # for conversations: learn all of the assistant's turns, or only the last
    target_prompts: str = "none"  # none, all, or length>=N: also learn prompts of at least N tokens
    # As in LLM Foundry: tokenize each turn separately, and also learn what the template writes after an answer and an
    # end-of-text token after the last; except for MDS data, leave out examples with an empty prompt or answer
    turn_by_turn: bool = False
    # For MDS: dtype of token ids that are stored as bytes
    token_encoding_type: TokenEncoding = "int64"
    skip_bad_rows: int = Field(default=0, ge=0)  # number of unreadable rows to skip before the data is refused
    # accepted, without effect: examples share rows exactly if attention keeps them apart
    packing_ratio: Annotated[float, Field(ge=1)] | Literal["auto"] | None = None
    decoder_only_format: Literal[True] = True  # only true is supported: models are decoders
    allow_pad_trimming: bool = False  # accepted, without effect
    pad_to_longest: bool = False  # accepted, without effect
    safe_load: bool = True  # accepted, without effect: a dataset's code never runs
    eos_token_id: int | None = None  # accepted, without effect

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        keys = ("path", "hf_name", "local", "remote", "streams")
        given = [key for key in keys if getattr(self, key) is not None]
        if not given or (len(given) > 1 and given != ["local", "remote"]):
            raise ValueError(f"write one of path, hf_name, local or streams; found {' and '.join(given) or 'none'}")
        if self.path is not None and ("[" in self.split or "+" in self.split):
            raise ValueError(
                f"split: {self.split} is a part of a split, or several; name files with their rows in path"
            )
        if self.hf_kwargs.get("streaming"):
            raise ValueError("hf_kwargs.streaming: rows are found by their number; leave it out")
        for name, stream in (self.streams or {}).items():
            for key in ("proportion", "repeat", "choose"):
                if getattr(stream, key) is not None:
                    raise ValueError(
                        f"streams.{name}.{key}: examples are packed into rows, which this would count; make each "
                        "stream a dataset with a weight, in train_loader.datasets"
                    )
        self._targets()
        return self

    def _targets(self) -> Targets:
        at_least = _AT_LEAST.fullmatch(self.target_prompts)
        if self.target_prompts not in ("none", "all") and at_least is None:
            raise ValueError(f"target_prompts: {self.target_prompts!r} is not one of none, all, length>=N")
        least = 0 if self.target_prompts == "all" else int(at_least[1]) if at_least else None
        folders = self.local or self.remote or self.streams  # LLM Foundry leaves out no examples of MDS folders
        return Targets(self.target_responses, least, self.turn_by_turn, self.turn_by_turn and not folders)

    def of_split(self, split: str) -> Self:
        return self.model_copy(update={"split": split}) if self._where is not None else self

    def heap(self) -> str:
        where = {"path", "hf_name", "hf_kwargs", "local", "remote", "streams"}
        return json.dumps(
            self.model_dump(mode="json", include=where | (set() if self._where is not None else {"split"}))
        )

    @property
    def _where(self) -> str | None:
        """The local files; None for data from other places."""
        if self.path is not None or self.hf_name is None:
            return self.path
        if is_url(self.hf_name):
            return self.hf_name
        if "[" in self.split or "+" in self.split or self.hf_kwargs.keys() - _PLACES:
            return None  # a part of a split, several, or another way to read files
        if self.hf_name in _READERS:
            files = self.hf_kwargs.get("data_files", self.hf_kwargs.get("data_dir"))
            if isinstance(files, dict):
                files = files.get(self.split)
            if isinstance(files, list) and len(files) == 1:
                files = files[0]
            if files is None:
                raise ConfigError(
                    f"dataset.hf_kwargs: hf_name={self.hf_name} needs data_dir, or data_files with files for the split "
                    f"{self.split}"
                )
            return files if isinstance(files, str) else None
        return self.hf_name if Path(self.hf_name).expanduser().is_dir() else None

    def build(self) -> Source:
        """Return the text of the examples, on which a tokenizer is trained."""
        table = self._table()
        return Source(
            table.title, table.fingerprint, self._texts, files=table.files, summary=table.summary
        )  # fmt: skip

    def _texts(self) -> Iterator[str]:
        return self._read(self._table(), lambda row: text_of(example_of(row)))

    def _write(self, folder: Path, table: Table, renderer: Renderer, how: How) -> None:
        examples = self._read(table, lambda row: [renderer.tokens(example_of(row))])
        write(folder, examples, how, "none of {n} examples has anything to learn", pack=how.documents)

    def _opened(
        self, folder: Path, title: str, fingerprint: str, eos_token_id: int, how: How, watch: Watch
    ) -> ChatRows:
        return ChatRows(folder, title, fingerprint, eos_token_id, how, watch)

    def order(self, tokenizer: PreTrainedTokenizerBase, how: How) -> Order:
        table, targets = self._table(), self._targets()
        if table.summary:
            log.info("%s", table.summary)
        renderer = Renderer(tokenizer, targets, self._template(), how.special.bos)
        if tokenizer.chat_template is None:
            log.info("the tokenizer has no chat template; conversations are written in ChatML")
        if not renderer.writes_answers:
            where = "the tokenizer's chat template" if renderer.own else "dataset.chat_template"
            raise ConfigError(
                f"{where}: does not write the text of an answer (it may expect a list of parts); name another template "
                "in dataset.chat_template"
            )
        if not renderer.ends_answers:
            log.warning(
                "the chat template ends answers with nothing that is learned, so the model does not learn to stop; "
                "name a template that does in dataset.chat_template"
            )
        if not renderer.own:  # checkpoints and exports then include the template that the model was trained with
            tokenizer.chat_template = renderer.template
        encoder = Encoder(tokenizer, how.special).fingerprint()
        fingerprint = fingerprint_of(
            self.KIND, table.fingerprint, encoder, renderer.template, str(targets),
            code_of(self.preprocessing_fn),
            json.dumps(tokenizer.special_tokens_map, sort_keys=True), how.length, how.documents, self.skip_bad_rows,
            self.token_encoding_type,
        )  # fmt: skip
        folder = cache_root(self.cache_dir) / "chats" / f"{table.title}-{fingerprint[:24]}"
        make = partial(self._write, table=table, renderer=renderer, how=how)
        try:
            watch = table.made(folder, make, self.memory(*self.places()))
        except ConfigError:
            raise
        except ValueError as error:
            where = f"{self._where or self.hf_name} ({table.title})" if self._where or self.hf_name else table.title
            raise ConfigError(f"dataset: {where}: {error}") from None
        rows = self._opened(folder, table.title, fingerprint, tokenizer.eos_token_id, how, watch)
        log.info("%s", rows.summary)
        return epochs_of(rows, self, how)

    def _template(self) -> str | None:
        given = self.chat_template
        if given is None or "{" in given:
            return given
        try:
            return Path(given).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"dataset.chat_template: {given}: cannot be read: {reason(error)}") from None

    def _read(self, table: Table, meaning: Callable[[Row], Made]) -> Iterator[Made]:
        """Convert the rows of a table; rows that are not examples are skipped or refused."""
        prepare = preprocess(self.preprocessing_fn)
        bad, first = 0, ""
        for row, at in table.rows:
            if isinstance(row, BadRow):
                why = row.message
            else:
                try:
                    yield meaning(prepare(self._decoded(row)))
                    continue
                except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
                    named = f"no {error}" if isinstance(error, KeyError) else str(error)
                    why = f"{at}: {named}"
            bad, first = bad + 1, first or why
            if bad > self.skip_bad_rows:
                raise ConfigError(f"dataset: {why}; skip_bad_rows: N skips up to N such rows")
        if bad:
            log.warning(
                "%s: skipped %d of at most %d bad rows; the first: %s", table.title, bad, self.skip_bad_rows, first
            )

    def _decoded(self, row: Row) -> Row:
        """Convert columns of token ids that MDS stores as bytes."""
        stored = {key: value for key in ("input_ids", "labels") if isinstance(value := row.get(key), bytes)}
        dtype = np.dtype(self.token_encoding_type).newbyteorder("<")
        for key, value in stored.items():
            if len(value) % dtype.itemsize:
                raise ValueError(
                    f"{key}: {len(value)} bytes are not a whole number of {dtype.name}; set dataset.token_encoding_type"
                )
        return row | {key: np.frombuffer(value, dtype) for key, value in stored.items()} if stored else row

    def _table(self) -> Table:
        try:
            return self._found()
        except Gone as gone:
            return gone_table(self.memory(*self.places()), gone)

    def places(self) -> list[str]:
        return [self._where] if self._where is not None else super().places()

    def _found(self) -> Table:
        title = f"chats-{self.split or 'all'}"
        if self._where is not None:
            return table_of(self._where, title, self, lenient=self.skip_bad_rows > 0)
        if self.hf_name is not None:
            return self._from_hub(self.hf_name, title)
        folders = self.folders()
        fingerprint = fingerprint_of("mds/1", *(folder.fingerprint for folder in folders))
        return Table(title, fingerprint, _numbered(title, samples(folders)))

    def _from_hub(self, name: str, title: str) -> Table:
        try:
            datasets = importlib.import_module("datasets")
        except ImportError:
            raise ConfigError(f"dataset.hf_name: {name}: needs datasets: pip install datasets") from None
        try:
            folder = Path(name).expanduser()
            place = str(folder.resolve()) if folder.is_dir() else name
            found = datasets.load_dataset(place, split=self.split, **self.hf_kwargs)
        except Exception as error:  # the hub and dataset scripts raise many types
            why = " ".join(str(error).split())[:300]
            failed = ConfigError(f"dataset.hf_name: {name}: cannot be loaded: {type(error).__name__}: {why}")
            raise Gone(failed) from error
        return Table(title, fingerprint_of("hub/1", name, self.split, found._fingerprint), _numbered(name, found))


def _numbered(title: str, rows: Iterable[Row]) -> Iterator[tuple[Row, str]]:
    return ((row, f"{title}: row {number}") for number, row in enumerate(rows))


def text_of(example: Example) -> str:
    """Return the text of an example, without a template."""
    if isinstance(example, Tokenized):
        raise ValueError("holds token ids; name the tokenizer that made them")
    if isinstance(example, Conversation):
        return "\n".join(str(message["content"]) for message in example.messages if message.get("content"))
    return f"{example.prompt}{example.response}"
