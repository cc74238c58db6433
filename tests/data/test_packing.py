"""Shards hold exactly the documents, and damage is named before a run starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llmfoundry.config import ConfigError, check
from llmfoundry.data import DatasetConfig, Source, TokenizerConfig, TokenStream, encoding, pack, packing, parts, prepare
from llmfoundry.data import tokenizer as tokenizer_module
from llmfoundry.data.tokenizer import train_bpe

DOCUMENTS = ["first document\n", "", "zweites Dokument, mit Ümlaut 🙂", "3"]


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(DOCUMENTS, 280),
        eos_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def source(documents: list[str]) -> Source:
    return Source("test-train", json.dumps(documents), lambda: iter(documents))


def everything(stream: TokenStream) -> list[int]:
    return stream.read(0, stream.n_tokens).tolist()


def documents_in(stream: TokenStream) -> int:
    return json.loads((stream.folder / "index.json").read_text())["n_documents"]


def test_documents_stand_between_end_of_text_tokens(tmp_path: Path, bpe: PreTrainedTokenizerBase) -> None:
    stream = pack(source(DOCUMENTS), bpe, tmp_path)
    text = bpe.decode(everything(stream))
    assert text == "<|endoftext|>" + "".join(f"{document}<|endoftext|>" for document in DOCUMENTS if document)
    assert documents_in(stream) == 3
    assert stream.n_bytes == len(source(DOCUMENTS).text_bytes()) == len("".join(DOCUMENTS).encode())


@pytest.mark.parametrize("shard_tokens", [1, 7, 10_000])
def test_shards_read_as_one_stream(
    tmp_path: Path, bpe: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, shard_tokens: int
) -> None:
    whole = everything(pack(source(DOCUMENTS), bpe, tmp_path / "whole"))
    monkeypatch.setattr(parts, "SHARD_TOKENS", shard_tokens)
    stream = pack(source(DOCUMENTS), bpe, tmp_path / "cut")
    monkeypatch.undo()
    stream = TokenStream(stream.folder)
    assert everything(stream) == whole
    assert stream.read(3, 17).tolist() == whole[3:17] and stream.read(5, 5).tolist() == []
    assert len(list(stream.folder.glob("*.bin"))) == -(-len(whole) // shard_tokens)
    with pytest.raises(ValueError, match="of a stream of"):
        stream.read(0, len(whole) + 1)


def test_pieces_and_batches_do_not_show(
    tmp_path: Path, bpe: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = ["one line\n" * 50, "short", "x" * 300, "no newline at the end\nof this"]
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 64)
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARACTERS", 40)
    stream = pack(source(documents), bpe, tmp_path)
    assert bpe.decode(everything(stream)).split("<|endoftext|>") == ["", *documents, ""]
    assert (documents_in(stream), stream.n_bytes) == (4, sum(map(len, documents)))


def test_document_that_spells_end_of_text_stays_one(tmp_path: Path, bpe: PreTrainedTokenizerBase) -> None:
    stream = pack(source(["a<|endoftext|>b"]), bpe, tmp_path)
    assert everything(stream).count(bpe.eos_token_id) == 2


def test_ids_beyond_16_bits_are_kept(tmp_path: Path) -> None:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(70_000)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1")
    stream = pack(source(["w69999 w65536 w65535 w2"]), tokenizer, tmp_path)
    assert everything(stream) == [1, 69999, 65536, 65535, 2, 1]
    assert os.path.getsize(stream.folder / "tokens-00000.bin") == 24


def test_second_use_reads_no_text(tmp_path: Path, bpe: PreTrainedTokenizerBase) -> None:
    first = pack(source(DOCUMENTS), bpe, tmp_path)
    unreadable = Source("test-train", json.dumps(DOCUMENTS), lambda: iter([][0]))
    assert everything(pack(unreadable, bpe, tmp_path)) == everything(first)


def test_other_documents_or_tokenizer_are_other_shards(tmp_path: Path, bpe: PreTrainedTokenizerBase) -> None:
    smaller = PreTrainedTokenizerFast(tokenizer_object=train_bpe(DOCUMENTS, 270), eos_token="<|endoftext|>")
    streams = [pack(source(DOCUMENTS), t, tmp_path) for t in (bpe, smaller)] + [pack(source(["x"]), bpe, tmp_path)]
    assert len({stream.fingerprint for stream in streams}) == len({stream.folder for stream in streams}) == 3


def damaged(stream: TokenStream, name: str, change: str) -> None:
    path = stream.folder / name
    contents = bytearray(path.read_bytes())
    if change == "truncated":
        path.write_bytes(contents[:-1])
    elif change == "grown":
        path.write_bytes(contents + b"\0\0")
    elif change == "missing":
        path.unlink()
    elif change == "empty":
        path.write_bytes(b"")
    elif change == "flipped":
        contents[len(contents) // 2] ^= 1
        path.write_bytes(contents)


@pytest.mark.parametrize("change", ["truncated", "grown", "missing", "empty"])
def test_shard_of_another_size_is_named_with_both_sizes(
    tmp_path: Path, bpe: PreTrainedTokenizerBase, change: str
) -> None:
    stream = pack(source(DOCUMENTS), bpe, tmp_path)
    true, size = everything(stream), os.path.getsize(stream.folder / "tokens-00000.bin")
    damaged(stream, "tokens-00000.bin", change)
    found = {"truncated": f"has {size - 1} bytes", "grown": f"has {size + 2} bytes", "empty": "has 0 bytes"}
    message = rf"tokens-00000\.bin: {found.get(change, 'is missing')}, expected {size} bytes; delete the folder"
    with pytest.raises(ConfigError, match=message):
        TokenStream(stream.folder)
    assert everything(pack(source(DOCUMENTS), bpe, tmp_path)) == true  # made again


@pytest.mark.parametrize("change", ["truncated", "missing", "empty", "flipped"])
def test_damaged_index_is_named(tmp_path: Path, bpe: PreTrainedTokenizerBase, change: str) -> None:
    stream = pack(source(DOCUMENTS), bpe, tmp_path)
    true = everything(stream)
    damaged(stream, "index.json", change)
    with pytest.raises(ConfigError, match=r"index\.json: is missing or damaged; delete the folder"):
        TokenStream(stream.folder)
    assert everything(pack(source(DOCUMENTS), bpe, tmp_path)) == true


def test_prepare_finds_a_flipped_bit(tmp_path: Path, bpe: PreTrainedTokenizerBase) -> None:
    dataset = check(DatasetConfig, {"name": "synthetic", "n_documents": 30, "cache_dir": str(tmp_path)})
    stream = prepare(dataset, bpe)
    true = everything(stream)
    assert everything(prepare(dataset, bpe)) == true
    damaged(stream, "tokens-00000.bin", "flipped")
    with pytest.raises(ConfigError, match=r"tokens-00000\.bin: checksum .*, expected .*; delete the folder"):
        TokenStream(stream.folder)
    assert everything(prepare(dataset, bpe)) == true


def test_no_text_leaves_no_cache(tmp_path: Path, bpe: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConfigError, match="holds no text"):
        pack(source([""]), bpe, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_error_halfway_leaves_no_shards(tmp_path: Path, bpe: PreTrainedTokenizerBase) -> None:
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    keys = {"name": "text_files", "path": str(tmp_path), "validation_fraction": 0}
    with pytest.raises(ConfigError, match=r"texts\.jsonl: row 1: 'text' is None"):
        prepare(check(DatasetConfig, keys | {"cache_dir": str(tmp_path / "cache")}), bpe)
    assert not list((tmp_path / "cache" / "tokens").iterdir())


def test_any_process_trains_and_packs_the_same(tmp_path: Path) -> None:
    """The folder's name holds the trained tokenizer's fingerprint: equal names mean equal training."""
    code = (
        "import sys; from llmfoundry.data import *\n"
        "data = SyntheticConfig(n_documents=300, cache_dir=sys.argv[1])\n"
        "print(prepare(data, TokenizerConfig(vocab_size=300).build(data)).folder.name)"
    )
    other = {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "5", "TOKENIZERS_PARALLELISM": "true"}
    env = os.environ | other | {"PYTHONPATH": str(Path(packing.__file__).parents[2])}
    command = [sys.executable, "-c", code, str(tmp_path / "there")]
    there = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    data = check(DatasetConfig, {"name": "synthetic", "n_documents": 300, "cache_dir": str(tmp_path / "here")})
    bpe = TokenizerConfig(vocab_size=300).build(data)
    stream = prepare(data, bpe)
    text = bpe.decode(everything(stream))
    assert text.split("<|endoftext|>")[1:-1] == list(data.build().documents())
    assert stream.folder.name == there
    assert everything(TokenStream(tmp_path / "there" / "tokens" / there)) == everything(stream)
