"""Tokens in the cache: damage is named and mended, a source that changes poisons nothing, a full disk is one line."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from boxed import Box

from llmfoundry.config import ConfigError, ResourceError, check
from llmfoundry.data import DatasetConfig, parts, watch
from llmfoundry.data.packing import TokenStream, pack
from llmfoundry.data.text_files import TextFilesConfig
from llmfoundry.data.tokenizer import TokenizerConfig
from llmfoundry.data.watch import Damaged
from tests.full_disk import full_disk


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"text {number} of some words, " * 200)
    return folder


def _stream(texts: Path) -> TokenStream:
    dataset = TextFilesConfig(name="text_files", path=str(texts), cache_dir=str(texts.parent / "cache"))
    tokenizer = TokenizerConfig(vocab_size=257).build(dataset)
    return pack(dataset.whole().build(), tokenizer, texts.parent / "cache")


def _zeroed(shard: Path) -> None:
    shard.write_bytes(bytes(shard.stat().st_size))


def _altered(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def _shortened(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size - 2)


DAMAGE = [_zeroed, _altered, _shortened, Path.unlink, lambda shard: (shard.parent / "index.json").write_text("{")]


@pytest.mark.parametrize("damage", DAMAGE, ids=["zeroed", "altered", "shortened", "missing", "index"])
def test_damaged_tokens_are_named_and_made_again(
    texts: Path, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    stream = _stream(texts)
    true = stream.read(0, stream.n_tokens).tolist()
    shard = stream.folder / "tokens-00000.bin"
    damage(shard)
    with pytest.raises(Damaged, match=f"{stream.folder}/"):
        TokenStream(stream.folder)
    again = _stream(texts)
    assert again.read(0, again.n_tokens).tolist() == true
    assert "DAMAGED TOKENS" in caplog.text and str(stream.folder) in caplog.text
    assert not list(stream.folder.parent.glob("*.tmp-*"))


def test_they_are_only_named_where_the_source_is_gone(texts: Path) -> None:
    stream = _stream(texts)
    true = stream.read(0, 100).tolist()
    texts.rename(texts.with_name("elsewhere"))
    tokenizer = TokenizerConfig(vocab_size=257).build(
        TextFilesConfig(
            name="text_files", path=str(texts.with_name("elsewhere")), cache_dir=str(texts.parent / "cache")
        )
    )
    dataset = TextFilesConfig(name="text_files", path=str(texts), cache_dir=str(texts.parent / "cache")).whole()
    assert pack(dataset.build(), tokenizer, texts.parent / "cache").read(0, 100).tolist() == true
    _zeroed(stream.folder / "tokens-00000.bin")
    with pytest.raises(Damaged, match="tokens-00000.bin: checksum .* cannot be made again"):
        pack(dataset.build(), tokenizer, texts.parent / "cache")
    shutil.rmtree(stream.folder)
    with pytest.raises(ConfigError, match="no such file or folder"):
        pack(dataset.build(), tokenizer, texts.parent / "cache")


def test_large_streams_are_checked_beside_the_run(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _stream(texts).folder
    monkeypatch.setattr(watch, "AT_ONCE_BYTES", 0)
    _altered(folder / "tokens-00000.bin")
    stream = TokenStream(folder)
    stream._watch.wait()
    with pytest.raises(Damaged, match="tokens-00000.bin: checksum"):
        stream.read(0, 1)
    again = _stream(texts)  # the next start knows, and makes them again
    again._watch.wait()
    assert len(again.read(0, 1)) == 1


def test_a_shard_that_becomes_shorter_is_an_error_with_a_name(texts: Path) -> None:
    stream = _stream(texts)
    stream.read(0, 10)
    os.truncate(stream.folder / "tokens-00000.bin", 100)
    with pytest.raises(ConfigError, match="tokens-00000.bin: has become shorter"):
        stream.read(0, stream.n_tokens)


def test_a_source_that_changes_while_it_is_read_leaves_nothing(texts: Path) -> None:
    dataset = TextFilesConfig(name="text_files", path=str(texts), cache_dir=str(texts.parent / "cache"))
    tokenizer = TokenizerConfig(vocab_size=257).build(dataset)
    source = dataset.whole().build()
    (texts / "3.txt").write_text("another text " * 200)
    with pytest.raises(ConfigError, match=r"3\.txt changed while it was being read"):
        pack(source, tokenizer, texts.parent / "cache")
    assert not [path for path in (texts.parent / "cache" / "tokens").iterdir() if path.suffix != ".lock"]
    stream = _stream(texts)
    assert "another text" in tokenizer.decode(stream.read(0, stream.n_tokens))


def test_a_run_goes_on_without_its_text(box: Box, place: Path, run: Path) -> None:
    (place / "own").mkdir()
    for number in range(40):
        (place / "own" / f"{number}.txt").write_text(f"text {number} of some words, " * 60)
    data = "{dataset: {name: text_files, path: own}}"
    words = (place / "small.yaml", f"train_loader:={data}", f"eval_loader:={data}", "save_folder=without")
    first = box.run("train", *words)
    assert first.code == 0, first.err
    (place / "own").rename(place / "away")
    again = box.run("train", *words, "max_duration=8ba")
    assert again.code == 0, again.err
    assert "its files are gone" in again.err
    steps = [json.loads(line)["step"] for line in (place / "without" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [*range(1, 9)]


def test_a_full_disk_of_the_cache_is_one_line(texts: Path) -> None:
    tokenizer = TokenizerConfig(vocab_size=257).build(
        TextFilesConfig(name="text_files", path=str(texts), cache_dir=str(texts.parent / "cache"))
    )
    source = TextFilesConfig(name="text_files", path=str(texts)).whole().build()
    with full_disk(4096):
        with pytest.raises(ConfigError, match="cannot be created: .*set cache_dir or LLMFOUNDRY_CACHE"):
            pack(source, tokenizer, texts.parent / "cache")
    assert pack(source, tokenizer, texts.parent / "cache").n_tokens > 4096


@pytest.fixture
def little_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_tokenising_stops_before_the_disk_is_full_and_goes_on(
    texts: Path, little_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "SHARD_TOKENS", 2**14)  # 32 KB
    keys = {"name": "text_files", "path": str(texts)}
    tokenizer = TokenizerConfig(vocab_size=257).build(TextFilesConfig(**keys, cache_dir=str(texts.parent / "cache")))
    source = TextFilesConfig(**keys, cache_dir=str(little_disk)).whole().build()
    full = little_disk / "full"
    full.write_bytes(bytes(shutil.disk_usage(little_disk).free - 2**16))
    with pytest.raises(ResourceError, match=r"the disk has 0\.00 GB free; make room .* tokens are kept") as error:
        pack(source, tokenizer, little_disk)
    assert "\n" not in str(error.value) and 0 < shutil.disk_usage(little_disk).free < 2**15
    (shard,) = little_disk.rglob("tokens-00000.bin")
    written = shard.stat().st_ino
    full.unlink()
    stream = pack(source, tokenizer, little_disk)
    assert (stream.folder / "tokens-00000.bin").stat().st_ino == written, "what was whole is kept"
    assert stream.read(0, stream.n_tokens).tolist() == pack(source, tokenizer, texts.parent / "cache").read(
        0, stream.n_tokens
    ).tolist()  # fmt: skip


@pytest.mark.parametrize("kind", ["text_files", "ids"])
def test_a_store_s_files_on_a_full_disk_end_in_one_line(texts: Path, little_disk: Path, kind: str) -> None:
    row = json.dumps({"n": "x" * 10**6})
    ending, content = (".txt", "some words " * 10**5) if kind == "text_files" else (".jsonl", row)
    (texts.parent / f"long{ending}").write_text(content)
    (little_disk / "full").write_bytes(bytes(shutil.disk_usage(little_disk).free - 2**17))
    dataset = check(
        DatasetConfig,
        {"name": kind, "path": f"file://{texts.parent}/long{ending}", "cache_dir": str(little_disk)},
    )
    with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
        dataset.build()
    assert not [path for path in (little_disk / "remote").iterdir() if path.is_dir()]
