"""Every source gives the same documents in the same order, and says clearly what is wrong with bad data."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from llmfoundry.config import ConfigError, check
from llmfoundry.data import DatasetConfig, text_files


def dataset(**keys: object) -> DatasetConfig:
    return check(DatasetConfig, keys)


def documents(**keys: object) -> list[str]:
    return list(dataset(**keys).build().documents())


def in_both_splits(**keys: object) -> tuple[list[str], list[str]]:
    return documents(split="train", **keys), documents(split="validation", **keys)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three plain files, one of them in a subfolder, beside files that are no text."""
    root = tmp_path / "texts"
    (root / "sub").mkdir(parents=True)
    (root / "b.txt").write_text("bé", encoding="utf-8")
    (root / "a.txt").write_text("a\r\n")
    (root / "sub" / "c.txt").write_text("c")
    (root / "README.md").write_text("not this")
    (root / ".hidden.txt").write_text("nor this")
    return root


def test_stdlib_is_split_by_file_and_leaves_tests_out() -> None:
    train, validation = in_both_splits(name="python_stdlib")
    size = sum(map(len, train))
    assert size > 5e6 and 0.02 < sum(map(len, validation)) / size < 0.2
    assert not set(train) & set(validation)
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    assert ((stdlib / "ast.py").read_text() in train) != ((stdlib / "ast.py").read_text() in validation)
    assert (stdlib / "ctypes" / "util.py").read_text() in train + validation
    assert not any("unittest.main()" in text and "from test import support" in text for text in train + validation)


def test_stdlib_is_the_same_twice() -> None:
    config = dataset(name="python_stdlib", split="validation")
    assert config.build().fingerprint == config.build().fingerprint
    assert config.build().text_bytes() == "".join(config.build().documents()).encode()


def test_folder_is_read_in_order_of_names(folder: Path) -> None:
    assert documents(name="text_files", path=str(folder), validation_fraction=0) == ["a\r\n", "bé", "c"]


def test_linked_folders_are_read_and_loops_end(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "d.txt").write_text("d")
    (elsewhere / "back").symlink_to(folder)
    (folder / "linked").symlink_to(elsewhere)
    (folder / "loop").symlink_to(folder)
    found = documents(name="text_files", path=str(folder), validation_fraction=0)
    assert found == ["a\r\n", "bé", "d", "c"]


@pytest.mark.parametrize("path", ["", "*", "gone.txt"])
def test_broken_link_is_named(folder: Path, path: str) -> None:
    (folder / "README.md").unlink()
    (folder / "gone.txt").symlink_to(folder / "nowhere.txt")
    with pytest.raises(ConfigError, match=r"gone\.txt: is a link to .*nowhere\.txt, which is not there"):
        documents(name="text_files", path=str(folder / path), validation_fraction=0)


def test_empty_file_is_never_the_validation_split(folder: Path) -> None:
    few = {"name": "text_files", "path": str(folder), "validation_fraction": 0.01}
    before = in_both_splits(**few)
    for i in range(9):
        (folder / f"empty{i}.txt").write_bytes(b"")
    assert in_both_splits(**few) == before and before[1]


def test_glob_and_single_file(folder: Path) -> None:
    everything = {"name": "text_files", "validation_fraction": 0.0}
    assert documents(path=f"{folder}/*.txt", **everything) == ["a\r\n", "bé"]
    assert documents(path=f"{folder}/**/*.txt", **everything) == ["a\r\n", "bé", "c"]
    assert documents(path=f"{folder}/b.txt", **everything) == ["bé"]


@pytest.mark.parametrize("fraction", [0.0001, 0.05, 0.5])
def test_few_files_still_fill_both_splits(folder: Path, fraction: float) -> None:
    train, validation = in_both_splits(name="text_files", path=str(folder), validation_fraction=fraction)
    assert validation and sorted(train + validation) == ["a\r\n", "bé", "c"]


def test_split_folders_go_before_the_hash(folder: Path) -> None:
    (folder / "train").mkdir()
    (folder / "validation").mkdir()
    (folder / "train" / "x.txt").write_text("for training")
    (folder / "validation" / "x.txt").write_text("for validation")
    assert in_both_splits(name="text_files", path=str(folder)) == (["for training"], ["for validation"])


def write_tables(root: Path) -> list[str]:
    """One file of each kind, two rows in each; some columns change their type on the way."""
    texts = [f"document é {i}" for i in range(8)]
    lines = [json.dumps({"text": t, "meta": i if i % 2 else None, "more": {"x": [i]}}) for i, t in enumerate(texts)]
    two = [("\n".join(lines[i : i + 2]) + "\n").encode() for i in (0, 2, 4)]
    root.mkdir()
    (root / "a.jsonl").write_bytes(two[0])
    (root / "b.jsonl.gz").write_bytes(gzip.compress(two[1]))
    frames = [zstandard.compress(line) for line in two[2].splitlines(keepends=True)]
    (root / "c.jsonl.zst").write_bytes(b"".join(frames))
    pq.write_table(pa.table({"id": [6, 7], "text": texts[6:]}), root / "d.parquet")
    return texts


def test_tables_of_every_kind_are_read(tmp_path: Path) -> None:
    texts = write_tables(tmp_path / "tables")
    assert documents(name="text_files", path=str(tmp_path / "tables"), validation_fraction=0) == texts
    train, validation = in_both_splits(name="text_files", path=str(tmp_path / "tables"), validation_fraction=0.5)
    assert train and validation and sorted(train + validation) == texts


def test_reading_tables_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tables(tmp_path / "tables")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    documents(name="text_files", path="tables", validation_fraction=0)
    assert sorted(tmp_path.rglob("*")) == before


def test_fingerprint_follows_contents_not_places_or_times(folder: Path, tmp_path: Path) -> None:
    def fingerprint(path: Path) -> str:
        return dataset(name="text_files", path=str(path), validation_fraction=0.0).build().fingerprint

    copy = shutil.copytree(folder, tmp_path / "copy")
    os.utime(copy / "a.txt", (1, 1))
    assert fingerprint(copy) == fingerprint(folder)
    (copy / "a.txt").write_text("A\r\n")
    assert fingerprint(copy) != fingerprint(folder)


def test_big_data_is_checked_once_and_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config = dataset(name="text_files", path=str(folder), validation_fraction=0.0, cache_dir=str(tmp_path / "cache"))
    small = config.build().fingerprint
    assert not caplog.messages
    monkeypatch.setattr(text_files, "REMEMBER_BYTES", 1)
    assert config.build().fingerprint == small
    assert caplog.messages == [f"checking 3 files of {folder}, 0.0 GB; once, until one of them changes"]
    monkeypatch.setattr(text_files, "checked_digest", None)
    assert config.build().fingerprint == small and len(caplog.messages) == 1


def test_fingerprint_follows_the_documents_not_the_names(folder: Path, tmp_path: Path) -> None:
    def fingerprint(path: Path, **keys: object) -> str:
        return dataset(name="text_files", path=str(path), **{"validation_fraction": 0.0} | keys).build().fingerprint

    before = fingerprint(folder)
    (folder / "empty.txt").touch()
    (folder / "b.txt").rename(folder / "b.MD")
    assert fingerprint(folder) == before == fingerprint(folder, split="validation", validation_fraction=1.0)
    (folder / "a.txt").rename(folder / "z.txt")  # another order is another list of documents
    assert fingerprint(folder) != before
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text('{"text": "x", "other": "y"}\n')
    found = {fingerprint(tmp_path / "a.txt"), fingerprint(tmp_path / "a.jsonl")}
    assert len(found | {fingerprint(tmp_path / "a.jsonl", text_key="other")}) == 3
    assert fingerprint(tmp_path / "a.txt", text_key="other") in found


def test_synthetic_text_follows_its_rule_and_its_seed() -> None:
    keys = {"name": "synthetic", "vocab_size": 100, "n_documents": 50}
    train, validation = in_both_splits(validation_fraction=0.3, **keys)
    assert len(train) + len(validation) == 50 and not set(train) & set(validation)
    assert train == documents(validation_fraction=0.3, **keys)
    assert train != documents(validation_fraction=0.3, seed=1, **keys)
    followers: dict[str, set[str]] = {}
    for text in train + validation:
        words = text.split()
        for word, following in zip(words, words[1:], strict=False):
            followers.setdefault(word, set()).add(following)
    assert max(map(len, followers.values())) <= 4 and len(followers) > 50


@pytest.mark.parametrize("offset", [0, 5, 2**20 - 1, 2**20 + 3])
def test_file_that_is_not_utf8_is_named_with_the_place(folder: Path, offset: int) -> None:
    (folder / "latin.txt").write_bytes(b"x" * offset + "é".encode("latin-1") + b" and more")
    with pytest.raises(ConfigError, match=rf"latin\.txt: is not UTF-8 \(byte {offset}\); convert it"):
        documents(name="text_files", path=str(folder), validation_fraction=0)


def test_file_cut_inside_a_character_is_refused(folder: Path) -> None:
    (folder / "cut.txt").write_bytes("abcé".encode()[:-1])
    with pytest.raises(ConfigError, match=r"cut\.txt: is not UTF-8 \(byte 3\)"):
        documents(name="text_files", path=str(folder), validation_fraction=0)


LATIN = '{"text": "é"}\n'.encode("latin-1")
BROKEN = {
    "line.jsonl": (b'{"text": "a"}\n{"text": oops}\n', "cannot be read: "),
    "latin.jsonl": (
        LATIN,
        "is not UTF-8 (byte 10); convert it, e.g. iconv -f latin1 -t utf-8 'latin.jsonl' > new.jsonl",
    ),
    "latin.jsonl.gz": (
        gzip.compress(LATIN),
        "is not UTF-8 (byte 10); convert it, e.g. gzip -dc 'latin.jsonl.gz' | iconv -f latin1 -t utf-8 > new.jsonl",
    ),
    "latin.jsonl.zst": (
        zstandard.compress(b'{"text": "a"}\n') + zstandard.compress(LATIN),
        "is not UTF-8 (byte 24); convert it, e.g. zstd -dc 'latin.jsonl.zst' | iconv -f latin1 -t utf-8 > new.jsonl",
    ),
    "cut.jsonl.gz": (gzip.compress(b'{"text": "a"}\n' * 99)[:-9], "cannot be read: "),
    "cut.jsonl.zst": (zstandard.compress(b'{"text": "a"}\n' * 99)[:-9], "is not a complete zstd file"),
    "not.jsonl.zst": (b'{"text": "a"}\n', "is not a complete zstd file"),
    "cut.parquet": (b"PAR1 and no more", "cannot be read: "),
    "key.jsonl": (b'{"body": "a"}\n', "row 0: 'text' is not among 'body'"),
    "row.jsonl": (b'{"text": "a"}\n' * 3 + b'{"text": 4}\n', "row 3: 'text' is 4, not text"),
    "null.jsonl": (b'{"text": "a"}\n{"text": null}\n', "row 1: 'text' is None, not text"),
    "empty.jsonl": (b"", "holds no text"),
}


@pytest.mark.parametrize("name", [name for name in BROKEN if name.startswith("latin")])
def test_table_that_is_not_utf8_is_refused_before_it_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(BROKEN[name][0])
    with pytest.raises(ConfigError, match="is not UTF-8"):
        dataset(name="text_files", path=str(tmp_path), validation_fraction=0).build()


@pytest.mark.parametrize("name", BROKEN)
def test_broken_table_is_named(tmp_path: Path, name: str) -> None:
    contents, message = BROKEN[name]
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(ConfigError) as caught:
        documents(name="text_files", path=str(tmp_path), validation_fraction=0)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert name in str(caught.value) or name == "empty.jsonl"


def test_parquet_without_the_column_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "a.parquet")
    keys = {"name": "text_files", "path": str(tmp_path), "validation_fraction": 0}
    with pytest.raises(ConfigError, match=r"a\.parquet: 'text' is not among 'body', 'id'"):
        documents(**keys)
    assert documents(text_key="body", **keys) == ["a"]


@pytest.mark.parametrize("name", ["part[1].jsonl", "b*c.jsonl", "d e.jsonl", "{x,y}?#%20.jsonl"])
def test_file_name_is_never_taken_for_a_pattern(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"text": "this"}\n')
    (tmp_path / "b1c.jsonl").write_text('{"text": "not this"}\n')
    assert documents(name="text_files", path=str(tmp_path / name), validation_fraction=0) == ["this"]


def test_missing_and_empty_data_are_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "image.png").write_bytes(b"png")
    (tmp_path / "empty.txt").write_bytes(b"")
    for path, message in [
        ("nowhere", "no such file or folder"),
        ("*.txt.gz", "no such file or folder"),
        ("folder", "holds no files that end in .txt, .jsonl"),
        ("image.png", "not a text file; known: .txt"),
        ("empty.txt", "holds no text"),
    ]:
        with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
            documents(name="text_files", path=str(tmp_path / path), validation_fraction=0)


def test_unknown_dataset_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="did you mean 'python_stdlib'"):
        dataset(name="python_stdlb")
    with pytest.raises(ConfigError, match="validation_fraction"):
        dataset(name="synthetic", validation_fraction=1.5)
