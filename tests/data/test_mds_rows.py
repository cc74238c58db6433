"""MDS folders as datasets: tokens as they are, texts packed, streams in their counts."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
import yaml

from llmfoundry.cli.prepare import prepare_data_main
from llmfoundry.cli.train import train_main
from llmfoundry.config import ConfigError, check
from llmfoundry.data import IGNORE, Loader, LoaderConfig, MDSConfig
from llmfoundry.data.mds import MDSFolder, MDSWriter
from tests.data.chat_tokenizer import tokenizer

LENGTH = 8


def write(folder: Path, n: int, first: int = 0, column: str = "ndarray:int32", compression: str | None = None) -> Path:
    """Rows of tokens: row i is i+1, i+1, ..., with an end-of-text token (0) in the middle."""
    with MDSWriter(folder, {"tokens": column}, compression, hashes=("sha1",), size_limit=600) as writer:
        for i in range(first, first + n):
            row = np.array([i + 1] * 4 + [0] + [i + 1] * 5, dtype=np.int64)[: LENGTH + 2]
            writer.write({"tokens": row.tobytes() if column == "bytes" else row})
    return folder


def loader(tmp_path: Path, *, documents: bool = False, length: int = LENGTH, **dataset: object) -> Loader:
    config = check(LoaderConfig, {"dataset": {"cache_dir": str(tmp_path / "cache")} | dataset})
    assert isinstance(config.dataset, MDSConfig), "no name is needed"
    return config.build(tokenizer(), seed=0, max_seq_len=length, sequence_ids=documents)


@pytest.mark.parametrize("column", ["ndarray:int32", "ndarray:uint16", "ndarray", "bytes"])
@pytest.mark.parametrize("compression", [None, "zstd", "gz"])
def test_rows_of_tokens_are_taken_as_they_are(tmp_path: Path, column: str, compression: str | None) -> None:
    write(tmp_path / "mds" / "train_small", 30, column=column, compression=compression)
    found = loader(tmp_path, local=str(tmp_path / "mds"), split="train_small", shuffle=False)
    batch = found.batch(0, 30)
    for i in range(30):
        row = [i + 1] * 4 + [0] + [i + 1] * 3
        assert batch.tokens[i].tolist() == row and batch.labels[i].tolist() == [*row[1:], IGNORE]
    shuffled = loader(tmp_path, local=str(tmp_path / "mds"), split="train_small", shuffle=True)
    assert (
        sorted(shuffled.batch(30, 30).tokens.tolist())
        == batch.tokens.tolist()
        != shuffled.batch(30, 30).tokens.tolist()
    )
    ranks = [shuffled.batch(7, 12, rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat([part.tokens for part in ranks]), shuffled.batch(7, 12).tokens)


def test_documents_end_or_begin_at_the_named_token(tmp_path: Path) -> None:
    write(tmp_path / "mds", 2)
    by_eos = loader(tmp_path, local=str(tmp_path / "mds"), shuffle=False, documents=True, eos_token_id=0)
    assert by_eos.batch(0, 1).sequence_ids.tolist() == [[0, 0, 0, 0, 0, 1, 1, 1]], "the eos is its document's last"
    by_bos = loader(tmp_path, local=str(tmp_path / "mds"), shuffle=False, documents=True, bos_token_id=0)
    assert by_bos.batch(0, 1).sequence_ids.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]], "the bos is its document's first"


def test_a_remote_that_is_a_folder_here_is_read(tmp_path: Path) -> None:
    write(tmp_path / "remote" / "val", 3, compression="zstd")
    found = loader(tmp_path, local=str(tmp_path / "local"), remote=str(tmp_path / "remote"), split="val")
    assert found.batch(0, 3).tokens[:, 0].tolist() == [1, 2, 3], "a split for evaluation keeps its order"


def test_texts_are_packed_like_others(tmp_path: Path) -> None:
    texts = [f"text number {i}" for i in range(40)]
    with MDSWriter(tmp_path / "mds", {"text": "str"}) as writer:
        for text in texts:
            writer.write({"text": text})
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    lines = {"name": "text_files", "path": str(tmp_path / "lines.jsonl"), "validation_fraction": 0.0}
    same = check(LoaderConfig, {"dataset": lines | {"cache_dir": str(tmp_path / "c"), "shuffle": False}})
    expected = same.build(tokenizer(), seed=0, max_seq_len=LENGTH)
    found = loader(tmp_path, local=str(tmp_path / "mds"), shuffle=False)
    assert found.rows_per_epoch == expected.rows_per_epoch
    assert torch.equal(found.batch(0, 20).tokens, expected.batch(0, 20).tokens)


@pytest.mark.parametrize(
    ("first", "second", "counts"),
    [
        ({}, {}, (20, 10)),
        ({"repeat": 2.0}, {}, (40, 10)),
        ({"choose": 5}, {"choose": 15}, (5, 15)),
        ({"proportion": 0.2}, {"proportion": 0.8}, (6, 24)),
        ({"repeat": 0.5}, {"choose": 30}, (10, 30)),
    ],
)
def test_streams_give_their_counts_in_every_epoch(
    tmp_path: Path, first: dict[str, object], second: dict[str, object], counts: tuple[int, int]
) -> None:
    write(tmp_path / "a", 20)
    write(tmp_path / "b" / "deep", 10, first=100)
    streams = {
        "a": {"local": str(tmp_path / "a")} | first,
        "b": {"local": str(tmp_path / "b"), "split": "deep"} | second,
    }
    found = loader(tmp_path, streams=streams, shuffle=True)
    assert found.rows_per_epoch == sum(counts)
    for epoch in range(3):
        rows = found.batch(epoch * sum(counts), sum(counts)).tokens[:, 0]
        assert ((rows <= 100).sum().item(), (rows > 100).sum().item()) == counts
    whole = found.batch(0, 40 * sum(counts)).tokens[:, 0]
    assert set(whole.tolist()) == {*range(1, 21), *range(101, 111)}, "in time every row is read"


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"local": "nowhere"}, "there is no index.json in nowhere"),
        ({"local": "here", "remote": "memory://bucket/x"}, "memory://bucket/x: no such file or folder"),
        ({"remote": "nowhere://bucket/x"}, "nowhere://bucket/x: cannot be read: Protocol not known: nowhere"),
        ({"local": "s3://bucket/x"}, "s3://bucket/x: is a URL; name it in remote"),
        ({"local": "a", "streams": {"b": {"local": "x"}}}, "local or remote are given together with streams"),
        ({"streams": {}}, "streams: dictionary should have at least 1 item"),
        ({"local": "a", "eos_token_id": 0, "bos_token_id": 1}, "eos_token_id and bos_token_id both"),
        ({"streams": {"a": {"local": "x", "choose": 1, "repeat": 1.0}}}, "repeat and choose both say how many rows"),
        ({"local": "a", "locl": "b"}, "locl: unknown key"),
        ({"local": "a", "epoch_size": 100}, "epoch_size: 100 is not supported"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, dataset: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        loader(tmp_path, **dataset)


def test_rows_that_do_not_fit_are_named(tmp_path: Path) -> None:
    write(tmp_path / "mds", 3)
    with pytest.raises(ConfigError, match="sample 0 has 10 tokens, and max_seq_len is 16; lower it"):
        loader(tmp_path, local=str(tmp_path / "mds"), length=16, shuffle=False).batch(0, 1)
    write(tmp_path / "far", 1, first=10_000)
    with pytest.raises(ConfigError, match="sample 0 has the token 10001, and the tokenizer ends at"):
        loader(tmp_path, local=str(tmp_path / "far")).batch(0, 1)
    with MDSWriter(tmp_path / "bytes", {"tokens": "bytes"}) as writer:
        writer.write({"tokens": bytes(4 * LENGTH + 2)})
    with pytest.raises(ConfigError, match="34 bytes are not a whole number of int64; set dataset.token_encoding_type"):
        loader(tmp_path, local=str(tmp_path / "bytes")).batch(0, 1)


def test_damage_is_found_by_the_hashes_of_the_index(tmp_path: Path) -> None:
    write(tmp_path / "mds", 3)
    (shard,) = (tmp_path / "mds").glob("*.mds")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ConfigError, match="is damaged: its sha1 is not the one in index.json"):
        loader(tmp_path, local=str(tmp_path / "mds")).batch(0, 1)


def test_keys_that_tune_streaming_are_left_out_with_a_note(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "mds", 2)
    with caplog.at_level("INFO"):
        loader(tmp_path, local=str(tmp_path / "mds"), shuffle_algo="py1s", num_canonical_nodes=8, predownload=None)
    assert "shuffle_algo, num_canonical_nodes, predownload: left out" in caplog.text


def test_what_prepare_writes_trains_a_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = {"name": "synthetic", "n_documents": 40, "document_words": 30, "cache_dir": str(tmp_path / "cache")}
    config = {
        "max_seq_len": 16,
        "model": {"name": "causal_lm", "d_model": 16, "n_heads": 2, "n_layers": 1, "vocab_size": 300,
                  "max_seq_len": 16, "attn_config": {"rope": True}},
        "tokenizer": {"name": "bpe", "vocab_size": 280},
        "train_loader": {"dataset": text}, "eval_loader": {"dataset": text | {"split": "validation"}},
        "optimizer": {"name": "adamw", "lr": 1.0e-2}, "scheduler": {"name": "constant_with_warmup", "t_warmup": "0ba"},
        "max_duration": "2ba", "global_train_batch_size": 4, "save_folder": str(tmp_path / "run"),
        "log_to_console": False, "callbacks": {"report": {"enabled": False}},
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    store = fsspec.filesystem("kept")
    for out in (str(tmp_path / "mds"), "kept://prepared"):
        assert prepare_data_main([str(path), "--format", "mds", "--out", out, "--compression", "zstd"]) == 0
        assert f"rows of 16 tokens in {out}/train" in capsys.readouterr().out
    names = {file.relative_to(tmp_path / "mds").as_posix() for file in (tmp_path / "mds").rglob("*") if file.is_file()}
    assert {name: store.cat_file(f"/prepared/{name}") for name in names} == {
        name: (tmp_path / "mds" / name).read_bytes() for name in names
    }
    assert prepare_data_main([str(path), "--format", "mds", "--out", "kept://prepared"]) == 2
    assert "kept://prepared/train: is not empty; choose another folder" in capsys.readouterr().err
    assert prepare_data_main([str(path), "--format", "mds", "--out", "nope://prepared"]) == 2
    store.rm("/prepared", recursive=True)
    assert len(MDSFolder(tmp_path / "mds" / "train", tmp_path / "c")) > 10
    assert train_main([str(path), f"save_folder={tmp_path / 'text'}"]) == 0  # leaves its tokenizer
    folders = {"local": str(tmp_path / "mds"), "cache_dir": str(tmp_path / "cache")}
    tokenizer = str(next((tmp_path / "text" / "checkpoints").glob("step-*")) / "tokenizer")
    config |= {
        "train_loader": {"name": "text", "dataset": folders | {"split": "train", "shuffle": True}},
        "eval_loader": {"name": "text", "dataset": folders | {"split": "validation"}},
        "tokenizer": {"name": tokenizer},
    }
    path.write_text(yaml.safe_dump(config))
    assert train_main([str(path)]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["validation/nats_per_token"] > 0
    assert prepare_data_main([str(path), "--format", "mds"]) == 2


def test_streams_in_counts_of_rows_are_no_part_of_a_mixture(tmp_path: Path) -> None:
    write(tmp_path / "a", 4)
    counted = {"name": "mds", "streams": {"a": {"local": str(tmp_path / "a"), "repeat": 2.0}}, "label": "counted"}
    config = check(LoaderConfig, {"datasets": [counted, {"name": "synthetic"}]})
    with pytest.raises(ConfigError, match="datasets: counted: has streams in counts of rows; list each of its folders"):
        config.build(tokenizer(), seed=0, max_seq_len=LENGTH)
