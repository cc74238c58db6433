"""Sources that are gone, change while they are read, or whose tokens in the cache are damaged: of every kind."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from llmfoundry.config import ConfigError, ResourceError, check
from llmfoundry.data import Loader, LoaderConfig, remote
from llmfoundry.data.chats import ChatsConfig
from llmfoundry.data.id_rows import IdsConfig
from llmfoundry.data.mds import MDSWriter
from tests.data.chat_tokenizer import tokenizer
from tests.data.test_megatron import write

LENGTH = 16
ROWS = [
    {"text": f"text {i} of some words", "prompt": f"say {i}", "response": f"it is {i}", "chosen": f"yes {i}",
     "rejected": f"no {i}", "input_ids": [i % 50 + 5] * LENGTH}
    for i in range(40)
]  # fmt: skip
# What is read from `data` below a folder. Where tokens are copied into the cache, a run goes on without it.
COPIED = {
    "text_files": {"name": "text_files", "path": "{}/data/tables"},
    "sieved": {"name": "text_files", "path": "{}/data/tables", "dedup": True, "filter": "{}/keep.py:keep"},
    "store": {"name": "text_files", "path": "memory://gone/data"},
    "hub": {"name": "hub", "hf_name": "{}/data/tables", "streaming": True},
    "mds of text": {"name": "mds", "local": "{}/data/mds"},
    "chats": {"name": "chats", "path": "{}/data/tables"},
    "chats of the hub": {"name": "chats", "hf_name": "json", "hf_kwargs": {"data_files": "{}/data/tables/rows.jsonl"}},
    "chats of mds": {"name": "chats", "local": "{}/data/mds"},
    "preferences": {"name": "preferences", "path": "{}/data/tables"},
    "ids": {"name": "ids", "path": "{}/data/tables"},
}
IN_PLACE = {
    "mds of tokens": ({"name": "mds", "local": "{}/data/tokens"}, "there is no index.json in"),
    "megatron": ({"name": "megatron", "path": "{}/data/meg"}, "finds no .bin and .idx"),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    data = tmp_path / "data"
    (data / "tables").mkdir(parents=True)
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (data / "tables" / "rows.jsonl").write_text(lines)
    fsspec.filesystem("memory").pipe("/gone/data/rows.jsonl", lines.encode())
    columns = {key: "str" for key in ("text", "prompt", "response")}
    with MDSWriter(data / "mds", columns, None, hashes=(), size_limit=10**6) as writer:
        for row in ROWS:
            writer.write({key: str(row[key]) for key in columns})
    with MDSWriter(data / "tokens", {"tokens": "ndarray:int32"}, None, hashes=(), size_limit=10**6) as writer:
        for row in ROWS:
            writer.write({"tokens": np.array(row["input_ids"], np.int32)})
    write(data / "meg", [[5] * 9] * 40)
    (tmp_path / "keep.py").write_text("def keep(text: str) -> bool:\n    return '7' not in text\n")
    yield tmp_path
    sys.modules.pop("llmfoundry_plugin_keep", None)


def loader(place: Path, keys: dict[str, object]) -> Loader:
    data = json.loads(json.dumps(keys).replace("{}", str(place)))
    kind = {"chats": "finetuning", "preferences": "preferences"}.get(data["name"], "text")
    config = check(LoaderConfig, {"name": kind, "dataset": data | {"cache_dir": str(place / "cache")}})
    return config.build(tokenizer(), seed=0, max_seq_len=LENGTH)


def take_away(place: Path) -> None:
    (place / "data").rename(place / "away")
    memory = fsspec.filesystem("memory")
    if memory.exists("/gone"):
        memory.rm("/gone", recursive=True)


@pytest.mark.parametrize("kind", COPIED)
def test_a_run_goes_on_with_the_tokens_of_what_is_gone(
    place: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    first = loader(place, COPIED[kind])
    expected = first.batch(0, first.rows_per_epoch).tokens
    take_away(place)
    again = loader(place, COPIED[kind])
    assert torch.equal(again.batch(0, first.rows_per_epoch).tokens, expected)
    assert again.fingerprint == first.fingerprint
    assert "its files are gone" in caplog.text
    other = {key: value for key, value in COPIED[kind].items() if key != "dedup"} | {"split": "validation"}
    with pytest.raises((ConfigError, ResourceError)) as error:  # another side was never tokenised
        loader(place, other)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", IN_PLACE)
def test_what_is_read_in_place_is_missed_by_its_name(place: Path, kind: str) -> None:
    keys, message = IN_PLACE[kind]
    loader(place, keys).batch(0, 1)
    take_away(place)
    with pytest.raises(ConfigError, match=message):
        loader(place, keys)


def test_a_filter_that_has_changed_is_not_gone_round(place: Path) -> None:
    loader(place, COPIED["sieved"])
    take_away(place)
    (place / "keep.py").write_text("def keep(text: str) -> bool:\n    return True\n")
    sys.modules.pop("llmfoundry_plugin_keep")
    with pytest.raises(ConfigError, match="no such file or folder"):
        loader(place, COPIED["sieved"])


@pytest.mark.parametrize(("kind", "file"), [("chats", "ids.bin"), ("chats", "starts.npy"), ("ids", "ids.bin")])
@pytest.mark.parametrize("damage", ["altered", "shortened", "missing"])
def test_damaged_copies_are_made_again_where_the_source_is_there(
    place: Path, kind: str, file: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = loader(place, COPIED[kind])
    expected = first.batch(0, first.rows_per_epoch).tokens
    (path,) = (place / "cache" / kind).rglob(file)

    def break_it() -> None:
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        if damage == "missing":
            path.unlink()
        elif damage == "shortened":
            os.truncate(path, len(content) - 2)
        else:
            path.write_bytes(content)

    break_it()
    again = loader(place, COPIED[kind])
    assert torch.equal(again.batch(0, first.rows_per_epoch).tokens, expected)
    assert "DAMAGED CACHE" in caplog.text and file in caplog.text
    break_it()
    take_away(place)
    with pytest.raises(ConfigError, match="but it cannot be made again: .*no such file or folder"):
        loader(place, COPIED[kind])
    assert [each.name for each in (place / "cache" / kind).iterdir() if each.is_dir()] == [path.parent.name]


@pytest.mark.parametrize("config", [ChatsConfig, IdsConfig])
def test_rows_that_change_while_they_are_read_leave_nothing(
    place: Path, config: type[ChatsConfig] | type[IdsConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_config = config._write

    def meanwhile(self: object, *args: object, **keys: object) -> None:
        of_config(self, *args, **keys)  # type: ignore[arg-type]
        with (place / "data" / "tables" / "rows.jsonl").open("a") as file:
            file.write(json.dumps(ROWS[0]) + "\n")

    kind = "chats" if config is ChatsConfig else "ids"
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match=r"rows\.jsonl changed while it was being"):
        patch.setattr(config, "_write", meanwhile)
        loader(place, COPIED[kind])
    assert not [each for each in (place / "cache" / kind).iterdir() if each.is_dir()]
    loader(place, COPIED[kind])
