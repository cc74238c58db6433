"""Data of object stores: the same rows as of local files, fetched once into a cache that stays within its limit."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

from llmfoundry.config import ConfigError, ResourceError, check
from llmfoundry.data import DatasetConfig, Loader, LoaderConfig, Source, pack, remote
from llmfoundry.data.mds import MDSWriter
from llmfoundry.data.mds_write import write_rows
from llmfoundry.data.remote import Store, delete, n_bytes, place
from llmfoundry.data.stored_file import StoredFile
from tests.data.chat_tokenizer import tokenizer
from tests.data.test_megatron import write
from tests.stores import s3

LENGTH = 8


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Texts, chats, MDS shards and Megatron files."""
    root = tmp_path / "data"
    (root / "texts" / "sub").mkdir(parents=True)
    for i, name in enumerate(["a.jsonl", "b.jsonl", "sub/c.jsonl", "d.txt"]):
        lines = "".join(json.dumps({"text": f"text {i} number {j} " * 5}) + "\n" for j in range(20))
        (root / "texts" / name).write_text(lines)
    (root / "texts" / ".hidden.txt").write_text("not this")
    (root / "texts" / "image.png").write_bytes(b"nor this")
    chats = [{"prompt": f"say {i}", "response": f"it is {i}"} for i in range(30)]
    (root / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    for name, compression, hashes in (("plain", None, ()), ("zstd", "zstd", ("sha1",))):
        columns = {"tokens": "ndarray:int32"}
        with MDSWriter(root / "mds" / name, columns, compression, hashes=hashes, size_limit=800) as writer:
            for i in range(80):
                writer.write({"tokens": np.full(LENGTH, i % 60 + 3, np.int32)})
    write(root / "meg" / "one_text_document", [[i] * 9 for i in range(3, 60)])
    write(root / "meg" / "two_text_document", [[i] * 7 for i in range(3, 60)])
    return root


@pytest.fixture
def memory(data: Path) -> Iterator[str]:
    """The same in the store `memory://`."""
    fs = fsspec.filesystem("memory")
    fs.put(str(data), "/bucket", recursive=True)
    yield "memory://bucket"
    fs.rm("/bucket", recursive=True)


def loader(cache: Path, **dataset: object) -> Loader:
    keys: dict[str, object] = {"cache_dir": str(cache), "shuffle": True}
    if dataset.get("name") != "mds":
        keys["validation_fraction"] = 0.0
    name = "finetuning" if dataset.get("name") == "chats" else "text"
    config = check(LoaderConfig, {"name": name, "dataset": keys | dataset})
    return config.build(tokenizer(), seed=0, max_seq_len=LENGTH)


def same(one: Loader, other: Loader) -> bool:
    n = one.rows_per_epoch
    assert n == other.rows_per_epoch > 5
    return torch.equal(one.batch(0, n).tokens, other.batch(0, n).tokens)


KINDS = [
    {"name": "text_files", "path": "{}/texts"},
    {"name": "text_files", "path": "{}/texts/*.jsonl"},
    {"name": "text_files", "path": "{}/texts/sub/c.jsonl"},
    {"name": "chats", "path": "{}/chats.jsonl"},
    {"name": "megatron", "path": "{}/meg"},
    {"name": "megatron", "path": "{}/meg/one_text_document"},
]


def at(place: Path | str, keys: dict[str, object]) -> dict[str, object]:
    return {key: str(value).format(place) for key, value in keys.items()}


@pytest.mark.parametrize("keys", KINDS, ids=lambda keys: f"{keys['name']}-{keys['path'][3:]}".replace("/", "-"))
def test_a_store_gives_the_rows_of_local_files(
    data: Path, memory: str, tmp_path: Path, keys: dict[str, object]
) -> None:
    local = loader(tmp_path / "here", **at(data, keys))
    fetched = loader(tmp_path / "there", **at(memory, keys))
    assert same(local, fetched)
    if keys["name"] == "text_files":
        assert local.fingerprint == fetched.fingerprint, "the contents count, not the place"
        assert same(local, loader(tmp_path / "file", **at(f"file://{data}", keys)))


@pytest.mark.parametrize("folder", ["plain", "zstd"])
def test_shards_are_fetched_as_they_are_read(data: Path, memory: str, tmp_path: Path, folder: str) -> None:
    local = loader(tmp_path / "here", name="mds", local=str(data / "mds" / folder))
    fetched = loader(tmp_path / "there", name="mds", remote=f"{memory}/mds", split=folder, shuffle=False)
    cached = list((tmp_path / "there").rglob("*.mds*"))
    fetched.batch(0, 3)
    first = [path for path in (tmp_path / "there").rglob("*.mds*") if path not in cached]
    assert len([path for path in first if path.is_file()]) == (1 if folder == "plain" else 2)
    shuffled = loader(tmp_path / "there", name="mds", remote=f"{memory}/mds/{folder}")
    assert same(local, shuffled)


def kept(cache: Path) -> int:
    return sum(file.stat().st_size for file in (cache / "remote").rglob("*") if file.is_file())


def test_the_cache_stays_within_its_limit(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "IN_USE", 0.0)
    monkeypatch.setattr("llmfoundry.data.mds._OPEN_SHARDS", 1)
    whole = loader(tmp_path / "all", name="mds", remote=f"{memory}/mds/plain")
    expected = whole.batch(0, 80).tokens
    limit = kept(tmp_path / "all") // 3
    little = loader(tmp_path / "few", name="mds", remote=f"{memory}/mds/plain", cache_limit=limit)
    for i in range(0, 80, 8):
        assert torch.equal(little.batch(i, 8).tokens, expected[i : i + 8])
        assert 0 < kept(tmp_path / "few") <= limit
    with pytest.raises(ConfigError, match="has .* bytes, and cache_limit is 10; raise it"):
        loader(tmp_path / "none", name="mds", remote=f"{memory}/mds/plain", cache_limit=10)


def test_a_large_file_is_fetched_in_blocks_as_it_is_read(
    data: Path, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "IN_USE", 0.0)
    monkeypatch.setattr("llmfoundry.data.stored_file.BLOCK", 100)  # rows lie across blocks
    monkeypatch.setattr("llmfoundry.data.stored_file._OPEN_BLOCKS", 1)
    here = loader(tmp_path / "here", name="megatron", path=str(data / "meg"))
    n, bins = here.rows_per_epoch, [file.stat().st_size for file in (data / "meg").glob("*.bin")]
    indexes = sum(file.stat().st_size for file in (data / "meg").glob("*.idx"))
    limit = indexes + sum(bins) // 3
    there = loader(tmp_path / "there", name="megatron", path=f"{memory}/meg", cache_limit=limit)
    assert there.fingerprint == here.fingerprint
    for start in range(0, n, 8):
        assert torch.equal(there.batch(start, 8).tokens, here.batch(start, 8).tokens)
        assert kept(tmp_path / "there") <= limit
    whole = loader(tmp_path / "whole", name="megatron", path=f"{memory}/meg")
    assert kept(tmp_path / "whole") < indexes + sum(bins), "the first and the last row are all that is read at first"
    whole.batch(0, n)
    assert kept(tmp_path / "whole") == indexes + sum(bins)


def test_the_file_that_was_not_used_longest_goes_first(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path, 10**6)
    files = list(store.find(f"{memory}/texts").values())
    sizes = [file.size for file in files]
    store = Store(tmp_path, sum(sizes) - 1)
    for file in files[:-1]:
        store.fetch(file)
        time.sleep(0.02)
    store.fetch(files[0])  # used again
    time.sleep(0.02)
    store.fetch(files[-1])
    assert kept(tmp_path) == sum(sizes), "all were asked for within the last minute"
    shutil.rmtree(tmp_path / "remote")
    monkeypatch.setattr(remote, "IN_USE", 0.0)
    for file in [*files[:-1], files[0], files[-1]]:
        store.fetch(file)
        time.sleep(0.02)
    names = {path.name for path in (tmp_path / "remote").rglob("*") if path.is_file() and path.suffix != ".lock"}
    assert names == {Path(file.url).name for file in files} - {Path(files[1].url).name}


def test_failures_are_tried_again_and_leave_no_half_file(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    fs = fsspec.filesystem("memory")
    get_file, failed = type(fs).get_file, []

    def broken(self: object, path: str, to: str, **keys: object) -> None:
        get_file(self, path, to, **keys)
        if len(failed) < 3:
            failed.append(Path(to))
            if len(failed) == 2:
                Path(to).write_bytes(b"short")  # a transfer that ends early
            else:
                raise ConnectionResetError("connection reset")

    monkeypatch.setattr(type(fs), "get_file", broken)
    store = Store(tmp_path)
    (file,) = store.find(f"{memory}/chats.jsonl").values()
    assert store.fetch(file).stat().st_size == file.size and len(failed) == 3
    shutil.rmtree(tmp_path / "remote")
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    failed.clear()
    with pytest.raises(ResourceError, match="cannot be read after 2 attempts: OSError: 5 bytes came"):
        store.fetch(file)
    assert not [path for path in (tmp_path / "remote").iterdir() if path.is_dir()]


def test_changed_files_are_fetched_anew(memory: str, tmp_path: Path) -> None:
    keys = {
        "name": "text_files",
        "path": f"{memory}/texts/d.txt",
        "cache_dir": str(tmp_path),
        "validation_fraction": 0.0,
    }
    before = check(DatasetConfig, keys).build()
    fsspec.filesystem("memory").pipe("/bucket/texts/d.txt", b"other")
    after = check(DatasetConfig, keys).build()
    assert list(after.documents()) == ["other"] and before.fingerprint != after.fingerprint


def fetch(cache: Path, path: Path) -> None:
    store = Store(cache)
    (file,) = store.find(f"file://{path}").values()
    assert store.fetch(file).read_bytes() == path.read_bytes()


def test_processes_at_once_fetch_once(data: Path, tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    running = [fork.Process(target=fetch, args=(tmp_path / "c", data / "chats.jsonl")) for _ in range(4)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0] * 4
    assert len(list((tmp_path / "c").rglob("chats.jsonl"))) == 1


def test_mistakes_are_named(memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT", 60.0)  # what trying again does not help fails at once
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    fsspec.filesystem("s3").clear_instance_cache()
    for path, message in [
        (f"{memory}/nowhere", "memory://bucket/nowhere: no such file or folder"),
        ("nope://bucket/x", "is a URL that is not known; known are s3://"),
        ("dbfs:/x", "is a URL that is not known"),
        ("s3://bucket/x", "s3://bucket/x: may not be read: NoCredentialsError: .*; credentials are read from the env"),
        (f"{memory}/texts/image.png", "holds no files that end in .txt"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check(DatasetConfig, {"name": "text_files", "path": path}).build()
    for size, expected in ((None, remote.LIMIT), ("1.5gb", 1.5e9), (7, 7), ("2e9", 2e9), ("10 MB", 10**7)):
        assert n_bytes(size) == expected
    with pytest.raises(ConfigError, match="cache_limit: 'much' is not a valid size; write e.g. 100gb"):
        check(DatasetConfig, {"name": "synthetic", "cache_limit": "much"})


@pytest.fixture
def bucket(data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The same in an S3 server on loopback."""
    with s3(monkeypatch, "corpus"):
        fsspec.filesystem("s3").put(str(data), "corpus/data", recursive=True)
        yield "s3://corpus/data"


def test_s3_gives_the_rows_of_local_files(data: Path, bucket: str, tmp_path: Path) -> None:
    for number, keys in enumerate(KINDS):
        assert same(
            loader(tmp_path / f"{number}", **at(data, keys)), loader(tmp_path / f"s{number}", **at(bucket, keys))
        )
    local = loader(tmp_path / "here", name="mds", local=str(data / "mds" / "zstd"))
    assert same(local, loader(tmp_path / "there", name="mds", remote=f"{bucket}/mds", split="zstd"))
    with pytest.raises(ConfigError, match="s3://corpus/nowhere: no such file or folder"):
        check(DatasetConfig, {"name": "text_files", "path": "s3://corpus/nowhere"}).build()
    stream = pack(Source("texts", "1", lambda: iter(["some text of a corpus"] * 20)), tokenizer(), tmp_path / "tokens")
    written = write_rows(stream, LENGTH, f"{bucket}/written")
    read = loader(tmp_path / "written", name="mds", remote=f"{bucket}/written", shuffle=False)
    assert read.rows_per_epoch == written.rows > 5
    assert read.batch(0, written.rows).tokens.flatten().tolist() == stream.read(0, written.rows * LENGTH).tolist()
    store = Store(tmp_path / "changed")
    (file,) = store.find(f"{bucket}/meg/one_text_document.bin").values()
    fsspec.filesystem("s3").pipe_file("corpus/data/meg/one_text_document.bin", bytes(file.size))
    with pytest.raises(ConfigError, match="one_text_document.bin: changed while it was being read"):
        StoredFile(file, store).read(10, 20)


def test_shuffled_in_blocks_shards_are_fetched_about_once(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "IN_USE", 0.0)
    monkeypatch.setattr("llmfoundry.data.mds._OPEN_SHARDS", 1)
    with MDSWriter(tmp_path / "many", {"tokens": "ndarray:int32"}, None, hashes=(), size_limit=4000) as writer:
        for i in range(4000):
            writer.write({"tokens": np.full(LENGTH, i % 400, np.int32)})
    fsspec.filesystem("memory").put(f"{tmp_path}/many/", "/bucket/many/", recursive=True)
    n_shards, limit = len(list((tmp_path / "many").glob("*.mds"))), 34 * 4000
    assert n_shards > 40
    fetched: list[str] = []
    of_store = Store.keep

    def counted(self: Store, key: str, name: str, size: int, make: Callable[[Path], None]) -> Path:
        def make_it(to: Path) -> None:
            fetched.append(name)
            make(to)

        return of_store(self, key, name, size, make_it)

    monkeypatch.setattr(Store, "keep", counted)

    def rows_of(n: int, **keys: object) -> None:
        found = loader(tmp_path / str(n), name="mds", remote=f"{memory}/many", cache_limit=limit, **keys)
        fetched.clear()
        for i in range(0, n, 40):
            found.batch(i, 40)
        assert kept(tmp_path / str(n)) <= limit

    rows_of(1600, shuffle_block_size=16 * 60)
    assert len(fetched) < 1.5 * n_shards, "two fifths of an epoch"
    rows_of(120)
    assert len(fetched) > 40, "of all rows shuffled together, every fourth has its shard fetched again"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("memory://bucket/run", "is lost when this process ends"),
        ("https://host/run", "https:// can only be read"),
        ("zip://run::s3://bucket/all.zip", "zip:// can only be read"),
        ("simplecache::s3://bucket/run", "is a URL, and only paths of this machine"),
        ("s3:/bucket/run", "is a URL that is not known"),
        ("s3://", "names no bucket; write s3://BUCKET/FOLDER"),
        ("gs:///run", "names no bucket"),
        ("file://runs/moe", "is not an absolute path"),
        ("s3://bucket/run?versionId=1", "holds *, ?, [ or .."),
        ("s3://bucket/run[1]", "holds *, ?, [ or .."),
        ("s3://bucket/../run", "holds *, ?, [ or .."),
        ("$HOME/runs", "$HOME is not expanded here; write ${oc.env:HOME}"),
        ("~nobody-of-that-name/run", "there is no user nobody-of-that-name"),
        (" ", "is empty"),
    ],
)
def test_a_place_that_keeps_nothing_is_refused(path: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        place(path)


def test_other_places_are_taken_as_they_are() -> None:
    local = ("runs/moe", "./runs/moe/", "runs/a b/\u00fc[1]")
    for path in (*local, "s3://bucket/a b/\u00fc/", "file:///data/run", "hdfs:///run"):
        assert place(path) == path
    assert place("~/run") == str(Path.home() / "run")


def test_deleting_a_folder_deletes_no_other_that_its_name_matches() -> None:
    """fsspec's `rm` takes run[1] for a pattern: it would delete run1."""
    fs = fsspec.filesystem("memory")
    for name in ("run[1]", "run1"):
        fs.pipe_file(f"/names/{name}/checkpoints/step-2/MANIFEST.json", b"{}")
    delete("memory://names/run[1]/checkpoints/step-2")
    assert fs.find("/names") == ["/names/run1/checkpoints/step-2/MANIFEST.json"]
    fs.rm("/names", recursive=True)
