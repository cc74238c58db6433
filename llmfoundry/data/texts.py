"""Datasets of the user's texts, with rules for which documents are kept."""

from __future__ import annotations

from dataclasses import replace

from llmfoundry.data.functions import code_of, imported
from llmfoundry.data.provenance import Gone
from llmfoundry.data.sources import DatasetConfig, Source, fingerprint_of, gone_source


class TextsConfig(DatasetConfig):
    """Base of the datasets of the user's texts."""

    dedup: bool = False  # keep only the first of identical documents
    # `file.py:function` or `package.module:function`: takes a text and returns whether to keep it
    filter: str | None = None

    def build(self) -> Source:
        rules = [*(["dedup"] if self.dedup else []), *([code_of(self.filter, "dataset.filter")] if self.filter else [])]
        memory = self.memory(*self.places(), rules=rules)
        try:
            source = replace(self.found(), memory=memory)
        except Gone as gone:
            return gone_source(memory, gone)
        if not rules:
            return source
        keep = imported(self.filter, "dataset.filter") if self.filter else None
        return replace(
            source, fingerprint=fingerprint_of("sieve/1", source.fingerprint, *rules), dedup=self.dedup, keep=keep
        )

    def places(self) -> list[str]:
        """Return the paths and URLs that the dataset reads."""
        return []

    def found(self) -> Source:
        """Return the source, before `dedup` and `filter`.

        Raises:
            Gone: if the source does not exist.
        """
        raise NotImplementedError
