"""Megatron's files as a dataset: the same rows as of texts that are tokenised here, and damage named in one line."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from llmfoundry.config import ConfigError, check
from llmfoundry.data import IGNORE, DatasetConfig, Loader, LoaderConfig, MegatronConfig, Source, pack
from llmfoundry.data.megatron import MegatronFile
from llmfoundry.data.rows import How, StreamRows, epochs_of
from llmfoundry.data.sources import SyntheticConfig, check_apart, paired
from tests.data.chat_tokenizer import tokenizer

LENGTH = 16
CODES = {"u1": 1, "i1": 2, "i2": 3, "i4": 4, "i8": 5, "u2": 8}


def write(prefix: Path, documents: Sequence[Sequence[int]], dtype: str = "u2", sentences: int = 1) -> Path:
    """The format as its definition says: each document is cut into so many sequences."""
    sequences = [np.array_split(np.array(ids, f"<{dtype}"), sentences) for ids in documents]
    flat = [each for parts in sequences for each in parts]
    size = np.dtype(dtype).itemsize
    lengths = np.array([len(each) for each in flat], "<i4")
    pointers = np.concatenate([[0], np.cumsum(lengths.astype("<i8"))[:-1] * size]).astype("<i8")
    bounds = np.arange(len(documents) + 1, dtype="<i8") * sentences
    prefix.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.bin").write_bytes(b"".join(each.tobytes() for each in flat))
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(flat), len(bounds))
    Path(f"{prefix}.idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + bounds.tobytes())
    return prefix


def loader(prefix: Path | str, *, documents: bool = True, length: int = LENGTH, **keys: object) -> Loader:
    data = {"name": "megatron", "path": str(prefix), "shuffle": False, "validation_fraction": 0.0} | keys
    return check(LoaderConfig, {"dataset": data}).build(tokenizer(), seed=0, max_seq_len=length, sequence_ids=documents)


TEXTS = [f"text {i} " + "word " * (i * 7 % 11) for i in range(60)]


@pytest.mark.parametrize("dtype", ["u2", "i4", "i8"])
@pytest.mark.parametrize("sentences", [1, 3])
def test_rows_are_those_of_the_texts_tokenised_here(tmp_path: Path, dtype: str, sentences: int) -> None:
    eos = tokenizer().eos_token_id
    ids = [[*tokenizer().encode(text, add_special_tokens=False), eos] for text in TEXTS]
    ids[0] = [eos, *ids[0]]  # the stream of texts begins so
    found = loader(write(tmp_path / "corpus_text_document", ids, dtype, sentences))
    how = How(LENGTH, 0, documents=True)
    stream = pack(Source("same", "same", lambda: iter(TEXTS)), tokenizer(), tmp_path / "cache")
    expected = Loader(epochs_of(StreamRows(stream, "same", how), SyntheticConfig(shuffle=False), how))
    assert found.rows_per_epoch == expected.rows_per_epoch > 20 and found.n_tokens == expected.n_tokens
    ours, theirs = (each.batch(0, each.rows_per_epoch) for each in (found, expected))
    assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.labels, theirs.labels)
    learned = ours.labels != IGNORE  # what fills the last row is of no document
    before = [ids[:, 1:] - ids[:, :-1] for ids in (ours.sequence_ids, theirs.sequence_ids)]
    assert torch.equal(before[0][learned[:, 1:]], before[1][learned[:, 1:]])


def test_a_document_without_an_end_of_text_is_not_learned_from_the_one_before(tmp_path: Path) -> None:
    found = loader(write(tmp_path / "c", [[5, 6, 7], [8, 9], [], [10, 11, 12, 13]]), length=8).batch(0, 1)
    assert found.tokens.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12]]
    assert found.labels.tolist() == [[6, 7, IGNORE, 9, IGNORE, 11, 12, 13]]
    assert found.sequence_ids.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2]]


def test_files_of_a_folder_are_one_stream(tmp_path: Path) -> None:
    whole = loader(write(tmp_path / "whole", [list(range(3 + i, 40 + i)) for i in range(4)]))
    for i in range(4):
        write(tmp_path / "parts" / f"{i}_text_document", [list(range(3 + i, 40 + i))])
    for path in ("parts", "parts/*", "parts/*.idx"):
        parts = loader(tmp_path / path)
        assert parts.rows_per_epoch == whole.rows_per_epoch == 10
        for one, other in zip(parts.batch(0, 10), whole.batch(0, 10), strict=True):
            assert one is other is None or torch.equal(one, other)
    shuffled = loader(tmp_path / "parts", shuffle=True)
    ranks = torch.cat([shuffled.batch(3, 8, rank, 4).tokens for rank in range(4)])
    assert torch.equal(ranks, shuffled.batch(3, 8).tokens)


def test_the_last_documents_are_held_out_where_both_read_the_same(tmp_path: Path) -> None:
    ids = [[i] * (10 + i % 5) for i in range(3, 103)]
    data = check(DatasetConfig, {"name": "megatron", "path": str(write(tmp_path / "c", ids))})
    train, validation = paired(data, data)
    assert isinstance(train, MegatronConfig) and isinstance(validation, MegatronConfig)
    check_apart(train, validation)
    read = [each.opened().read(0, each.opened().n_tokens).tolist() for each in (train, validation)]
    assert read[0] + read[1] == sum(ids, []) and not set(read[0]) & set(read[1])
    assert 0.03 < len(read[1]) / sum(map(len, ids)) < 0.06
    assert paired(data, None)[0].opened().n_tokens == sum(map(len, ids))  # alone: all of it


def test_ids_that_the_tokenizer_does_not_have_are_refused(tmp_path: Path) -> None:
    ids = [[5] * 40, [5] * 9 + [60_000] + [5] * 30, [5] * 40]
    found = loader(write(tmp_path / "c", ids))
    with pytest.raises(ConfigError, match=r"c\.bin: token 49 is 60000, and the tokenizer's ids end at \d+; name the"):
        found.batch(0, found.rows_per_epoch)
    with pytest.raises(ConfigError, match=r"token 0 is -1"):
        loader(write(tmp_path / "d", [[-1, 5, 6]], "i4"))
    with pytest.raises(ConfigError, match="holds token ids, and no text that a tokenizer could learn from"):
        list(check(DatasetConfig, {"name": "megatron", "path": str(tmp_path / "c")}).build().documents())


def patched(data: bytes, at: int, form: str, value: object) -> bytes:
    piece = value if form == "raw" else struct.pack(form, value)
    assert isinstance(piece, bytes)
    return data[:at] + piece + data[at + len(piece) :]


@pytest.mark.parametrize(
    ("at", "form", "value", "message"),
    [
        (0, "raw", b"NOTMEGATR", "is not an index of Megatron's"),
        (9, "<Q", 2, "has version 2, and only 1 is known"),
        (17, "<B", 6, "has the type code 6, numbers with a fraction"),
        (17, "<B", 200, "has the type code 200, a type that is not known"),
        (17, "<B", 4, "is damaged: sequence 1 does not begin where"),
        (18, "<Q", 2**63, "is damaged: .* bytes do not hold the 9,223,372,036,854,775,808 sequences"),
        (18, "<Q", 0, "is damaged"),
        (26, "<Q", 0, "is damaged"),
        (34, "<i", -5, r"is damaged: sequence 0 has -5 tokens"),
        (34, "<i", 2**31 - 1, "is damaged: sequence 1 does not begin"),
        (46, "<q", 2**62, "is damaged: sequence 0 does not begin"),
        (70, "<q", 1, "is damaged: its documents are not in order"),
        (78, "<q", 2**62, "is damaged: its documents are not in order"),
        (94, "<q", 9, "is damaged: its documents end at sequence 9 of 3"),
    ],
)  # fmt: skip
def test_hostile_indexes_end_in_one_line(tmp_path: Path, at: int, form: str, value: object, message: str) -> None:
    index = Path(f"{write(tmp_path / 'c', [[5, 6], [7, 8, 9], [4]])}.idx")
    assert index.stat().st_size == 34 + 3 * 12 + 4 * 8
    index.write_bytes(patched(index.read_bytes(), at, form, value))
    with pytest.raises(ConfigError, match=message) as caught:
        loader(tmp_path / "c")
    assert "\n" not in str(caught.value) and str(index) in str(caught.value)


def test_missing_and_short_files_are_named(tmp_path: Path) -> None:
    write(tmp_path / "c", [[5, 6], [7, 8, 9]])
    for change, message in [
        (lambda: (tmp_path / "c.bin").write_bytes(b"\5\0"), "it lists 10 bytes, and that has 2"),
        (
            lambda: (tmp_path / "c.idx").write_bytes((tmp_path / "c.idx").read_bytes()[:-1]),
            "is damaged: .* bytes do not",
        ),
        (lambda: (tmp_path / "c.idx").write_bytes(b"MMID"), "is not an index of Megatron's"),
        (lambda: (tmp_path / "c.idx").unlink(), r"c\.idx: cannot be read: No such file"),
        (lambda: (tmp_path / "c.bin").unlink(), "finds no .bin and .idx"),
    ]:
        change()
        with pytest.raises(ConfigError, match=message):
            loader(tmp_path / "c")


@pytest.mark.parametrize("sentences", [1, 3])
def test_documents_are_found_in_long_indexes(tmp_path: Path, sentences: int) -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(0, 4, 3000)
    sizes[1000:1100] = 0  # empty documents over the end of a block of the index
    write(tmp_path / "c", [[5] * size for size in sizes.tolist()], sentences=sentences)
    found = MegatronFile(tmp_path / "c.idx", tmp_path / "c.bin")
    begins = np.cumsum([0, *sizes])[:-1]
    for start in [0, *rng.integers(0, found.n_tokens, 60).tolist(), found.n_tokens]:
        stop = min(start + int(rng.integers(0, 50)), found.n_tokens)
        inside = np.unique(begins[(start <= begins) & (begins < stop)])
        assert found.starts(start, stop).tolist() == inside.tolist()
        after = begins[begins >= start]
        assert found.document_at(start) == (after[0] if len(after) else found.n_tokens)


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_files_that_become_shorter_are_named(tmp_path: Path, ending: str) -> None:
    found = loader(write(tmp_path / "c", [[i] * 9 for i in range(3, 200)]))
    os.truncate(tmp_path / f"c.{ending}", 40)
    with pytest.raises(ConfigError, match=rf"c\.{ending}: has become shorter than \d+ bytes"):
        found.batch(0, found.rows_per_epoch)
