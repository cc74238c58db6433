"""Guess what kind of dataset a path holds, from file names and the first row."""

from __future__ import annotations

from pathlib import Path

from llmfoundry.config import ConfigError, is_url
from llmfoundry.data.conversations import FORMATS
from llmfoundry.data.files import find, kind_of
from llmfoundry.data.remote import Store
from llmfoundry.data.tables import BadRow, read_rows
from llmfoundry.runtime import cache_root


def dataset_at(where: str) -> dict[str, object]:
    """Return the settings of a dataset that reads a path.

    Raises:
        ConfigError: if the path holds nothing that can be read.
    """
    store = Store(cache_root())
    if is_url(where):
        names = set(store.find(where))
        if "index.json" in names:
            return {"name": "mds", "remote": where}
        if any(name.endswith(".idx") for name in names):
            return {"name": "megatron", "path": where}
    path = Path(where).expanduser()
    if (path / "index.json").is_file():
        return {"name": "mds", "local": str(path)}
    if path.suffix in (".bin", ".idx") or Path(f"{path}.idx").is_file():
        return {"name": "megatron", "path": str(path)}
    if path.is_dir() and any(path.rglob("*.idx")):
        return {"name": "megatron", "path": str(path)}
    files = find(where, store).files.values()
    tables = [file for file in files if (kind := kind_of(file.path)) and kind.format != "text"]
    row = next((row for row, _ in read_rows(tables[0].here()) if not isinstance(row, BadRow)), {}) if tables else {}
    if any(all(column in row for column in columns) for columns in FORMATS.values()):
        return {"name": "chats", "path": where}
    if "text" not in row and tables:
        texts = [column for column, value in row.items() if isinstance(value, str)]
        if not texts:
            raise ConfigError(f"{tables[0].path}: has no column of text; it has {', '.join(row) or 'no rows'}")
        return {"name": "text_files", "path": where, "text_key": max(texts, key=lambda column: len(str(row[column])))}
    return {"name": "text_files", "path": where}
