"""The rows of a task, from a JSON lines file or a dataset of the Hugging Face hub.

White space at both ends of texts is removed, as in LLM Foundry; lists are left unchanged.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from llmfoundry.config import ConfigError
from llmfoundry.strict_json import parse_json

HUB = "hf://"


class Row:
    """One line of a task's file; its fields are read by name and type.

    Every method raises a ConfigError that names the line if the field is missing or has another type.
    """

    def __init__(self, where: str, fields: Mapping[str, object]) -> None:
        self.where = where
        self._fields = {key: value.strip() if isinstance(value, str) else value for key, value in fields.items()}

    def text(self, key: str) -> str:
        """Return the field, which must be a string."""
        value = self._fields.get(key)
        if not isinstance(value, str):
            raise self._refused(key, value, "a text")
        return value

    def texts(self, key: str, default: list[str] | None = None) -> list[str]:
        """Return the field, which must be a list of strings."""
        value = self._fields.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._refused(key, value, "a list of texts")
        return value

    def choices(self, key: str) -> list[str]:
        """Return the field, which must be a list of strings, of which entry `gold` is correct."""
        found, gold = self.texts(key), self._fields.get("gold")
        if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(found):
            raise self._refused("gold", gold, f"the number of one of {len(found)} {key}, counted from 0")
        return found

    @property
    def gold(self) -> int:
        """The index of the correct entry of `choices`."""
        value = self._fields["gold"]
        assert isinstance(value, int)
        return value

    def has(self, key: str) -> bool:
        """Return whether the field exists."""
        return self._fields.get(key) is not None

    def _refused(self, key: str, value: object, wanted: str) -> ConfigError:
        found = "is missing" if value is None else f"is {str(value)[:80]!r}"
        return ConfigError(f"{self.where}: {key!r} {found}; it must be {wanted}")


def read_rows(uri: str, loading: Mapping[str, object], parsing: Mapping[str, list[str]]) -> list[Row]:
    """Read all rows of a task.

    Args:
        uri: a JSON lines file, or `hf://` and the name of a dataset.
        loading: for a dataset, arguments of `datasets.load_dataset`, e.g. {split: test, name: main}.
        parsing: for a dataset, the columns whose texts, joined by a space, make up each field; empty: use the columns
            unchanged.

    Raises:
        ConfigError: if the data is missing or malformed.
    """
    rows = _from_hub(uri.removeprefix(HUB), loading, parsing) if uri.startswith(HUB) else _from_file(Path(uri))
    if not rows:
        raise ConfigError(f"dataset_uri: {uri}: holds no rows")
    return rows


def _from_file(path: Path) -> list[Row]:
    rows = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append(_parsed(f"{path}:{number}", line))
    except OSError as error:
        raise ConfigError(f"dataset_uri: {path}: {(error.strerror or str(error)).lower()}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"dataset_uri: {path}: is not UTF-8: {error.reason}") from None
    return rows


def _parsed(where: str, line: str) -> Row:
    try:
        fields = parse_json(line)
    except ValueError as error:
        raise ConfigError(f"{where}: is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{where}: must be a JSON object, found {str(fields)[:80]}")
    return Row(where, fields)


def _from_hub(name: str, loading: Mapping[str, object], parsing: Mapping[str, list[str]]) -> list[Row]:
    try:
        load: Callable[..., Iterable[dict[str, object]]] = importlib.import_module("datasets").load_dataset
    except ImportError:
        raise ConfigError(f"dataset_uri: {HUB}{name}: needs the package datasets; pip install datasets") from None
    try:
        found = load(name, **loading)
    except Exception as error:  # many types: no network, no such dataset, unsuitable files
        raise ConfigError(f"dataset_uri: {HUB}{name}: cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    if isinstance(found, dict):
        raise ConfigError(
            f"dataset_uri: {HUB}{name}: has the splits {', '.join(found)}; "
            f"choose one by hf_loading_vars: {{split: {next(iter(found))}}}"
        )
    rows = []
    for number, fields in enumerate(found):
        where = f"{HUB}{name} row {number}"
        if missing := {column for columns in parsing.values() for column in columns} - fields.keys():
            raise ConfigError(f"{where}: has no column {min(missing)!r}, which hf_parsing_map names")
        if parsing:
            fields = {key: " ".join(str(fields[column]) for column in columns) for key, columns in parsing.items()}
        rows.append(Row(where, fields))
    return rows
