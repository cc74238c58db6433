"""The `hub` dataset: a text column of a dataset on the Hugging Face hub.

`datasets` reads it, with its own cache and settings: HF_DATASETS_OFFLINE and HF_HUB_OFFLINE limit it to its cache, and
HF_TOKEN gives access to private datasets. With `streaming`, files are read as they arrive and not stored; only tokens
are.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from llmfoundry.config import ConfigError
from llmfoundry.data.provenance import Gone, stamps_of
from llmfoundry.data.sources import Source, fingerprint_of
from llmfoundry.data.tables import hint_of_chats
from llmfoundry.data.texts import TextsConfig
from llmfoundry.runtime import first_of_node

if TYPE_CHECKING:
    import datasets


class HubTextConfig(TextsConfig, names=("hub", "hf_text")):
    """A text dataset of the Hugging Face hub, or a folder that `datasets` can read. Its documents are packed."""

    hf_name: str  # a hub dataset, e.g. allenai/c4, or a folder
    subset: str | None = None  # the dataset's configuration, e.g. en
    split: str = "train"  # type: ignore[assignment]  # as `datasets` writes it: train, validation, train[:1%]
    revision: str | None = None  # a commit, branch or tag; None: the newest
    text_key: str = "text"  # the text column
    streaming: bool = False  # read files as they arrive, without storing them
    max_documents: int | None = Field(default=None, ge=1)  # read only this many documents, from the first; None: all

    def heap(self) -> str:
        return json.dumps(["hub", self.hf_name, self.subset, self.revision, self.split])

    def found(self) -> Source:
        import datasets  # imported here, because it is slow to import and most runs do not need it

        # `datasets` would reuse what it once cached for a folder, even if the folder has changed.
        anew = {"download_mode": "force_redownload", "verification_mode": "no_checks"}
        how = anew if Path(self.hf_name).is_dir() else {}

        def load() -> datasets.Dataset | datasets.IterableDataset:
            return datasets.load_dataset(
                self.hf_name, self.subset, split=self.split, revision=self.revision, streaming=self.streaming, **how,
            )  # fmt: skip

        try:
            builder = datasets.load_dataset_builder(self.hf_name, self.subset, revision=self.revision)
            rows = first_of_node(f"the dataset {self.heap()}", load)
        except Exception as error:  # the hub and dataset readers raise many types
            why = " ".join(str(error).split())[:300]
            failed = ConfigError(
                f"dataset.hf_name: {self.hf_name}, subset {self.subset}, split {self.split}: cannot be loaded: "
                f"{type(error).__name__}: {why}"
            )
            raise Gone(failed) from error
        columns = rows.column_names
        if columns is not None and self.text_key not in columns:
            known = ", ".join(columns) + hint_of_chats(columns)
            raise ConfigError(f"dataset.text_key: {self.hf_name}: {self.text_key!r} is not among {known}")
        # The builder's hash covers the revision of a hub dataset; local files are identified by their times.
        paths = (path for paths in (builder.config.data_files or {}).values() for path in map(Path, paths))
        files = [path for path in paths if path.is_file()]
        times = [(str(path), path.stat().st_mtime_ns) for path in files]
        data = (builder.hash or "", builder.config_id, str(builder.config.version), self.split, self.text_key, *times)
        title = f"hub-{self.split.partition('[')[0]}"
        told = (builder.info.splits or {}).get(self.split)  # for the whole split
        n_bytes = told.num_bytes if told is not None and self.max_documents is None else None
        name = self.hf_name if self.subset is None else f"{self.hf_name}/{self.subset}"
        return Source(
            title,
            fingerprint_of("hub-text/1", self.hf_name, *data, self.max_documents or 0),
            lambda: self._read(rows),
            n_bytes or None,
            stamps=stamps_of(files),
            summary=f"{title}: reads {name}, split {self.split}" + (" as a stream" if self.streaming else ""),
        )

    def _read(self, rows: datasets.Dataset | datasets.IterableDataset) -> Iterator[str]:
        texts = rows.select_columns([self.text_key])
        for number, row in enumerate(self._rows(itertools.islice(texts, self.max_documents))):
            text = row[self.text_key]
            if not isinstance(text, str):
                raise ConfigError(f"dataset.text_key: {self.hf_name}: row {number}: {self.text_key!r} is {text!r:.80}")
            yield text

    def _rows(self, rows: Iterator[dict[str, object]]) -> Iterator[dict[str, object]]:
        try:
            yield from rows
        except Exception as error:  # a stream is fetched while it is read
            why = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"dataset.hf_name: {self.hf_name}: cannot be read: {type(error).__name__}: {why}"
            ) from error
