"""`llmfoundry data show` and `stats`: of a YAML, and of every kind of path."""

from __future__ import annotations

import json
import os
import pty
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from llmfoundry.cli.data import data_main
from llmfoundry.data.mds import MDSWriter
from llmfoundry.data.statistics import lengths_of
from tests.data.chat_tokenizer import tokenizer
from tests.data.test_megatron import write

TEXTS = ["one", "two words", "", "one", "é" * 10, "three more words"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a tokenizer and data of every kind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLMFOUNDRY_CACHE", str(tmp_path / "cache"))
    tokenizer().save_pretrained(tmp_path / "tok")
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"id": "1", "body": text}) + "\n" for text in TEXTS))
    chats = [{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}]}] * 3
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    write(tmp_path / "meg", [[5] * 10, [6] * 20, [5] * 10])
    with MDSWriter(tmp_path / "mds", {"tokens": "ndarray:int32"}) as writer:
        for i in (4, 5, 4):
            writer.write({"tokens": np.full(8, i, np.int32)})
    return tmp_path


def said(capsys: pytest.CaptureFixture, *argv: str) -> list[dict]:
    assert data_main([*argv, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_stats_of_texts(home: Path, capsys: pytest.CaptureFixture) -> None:
    (found,) = said(capsys, "stats", "texts.jsonl")
    assert (found["number"], found["empty"], found["duplicates"], found["complete"]) == (6, 1, 1, True)
    (n_bytes,) = found["lengths"]
    sizes = sorted(len(text.encode()) for text in TEXTS)
    assert n_bytes["total"] == sum(sizes) and n_bytes["quantiles"]["max"] == sizes[-1] == 20
    assert n_bytes["quantiles"]["median"] == sizes[2] and n_bytes["quantiles"]["min"] == 0
    (found,) = said(capsys, "stats", "texts.jsonl", "--tokenizer", "tok", "--limit", "2", "text_key=body")
    tokens = sum(len(tokenizer().encode(text, add_special_tokens=False)) for text in TEXTS[:2])
    assert not found["complete"] and found["lengths"][1]["total"] == tokens
    assert data_main(["stats", "texts.jsonl"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "texts.jsonl: 6 documents; 1 empty, 1 equal to an earlier one"
    assert lines[2].startswith("texts.jsonl: 51 bytes; per document: mean 8.5, min 0, 10 % 0, median 3, ")


def test_stats_of_rows(home: Path, capsys: pytest.CaptureFixture) -> None:
    common = ("--tokenizer", "tok", "--max-seq-len", "8")
    (mds,) = said(capsys, "stats", "mds", *common)
    assert (mds["kind"], mds["number"], mds["duplicates"]) == ("rows", 3, 1)
    assert mds["lengths"][0]["quantiles"] == dict.fromkeys(mds["lengths"][0]["quantiles"], 7)
    (megatron,) = said(capsys, "stats", "meg", *common)
    assert megatron["number"] == 5 and megatron["lengths"][0]["total"] == 37  # 39, but for 2 that nothing opens
    (chats,) = said(capsys, "stats", "chats.jsonl", "--tokenizer", "tok", "--max-seq-len", "256")
    assert chats["lengths"][1]["what"] == "tokens per document of a row" and chats["number"] == 1
    for path in ("mds", "meg", "chats.jsonl"):
        assert data_main(["stats", path]) == data_main(["show", path]) == 2
    assert "holds tokens or conversations; name their tokenizer with --tokenizer" in capsys.readouterr().err


def test_show_marks_documents_and_what_is_learned(home: Path, capsys: pytest.CaptureFixture) -> None:
    (row,) = said(capsys, "show", "chats.jsonl", "--tokenizer", "tok", "--max-seq-len", "256", "--rows", "1")
    learned = [piece["text"] for piece in row["pieces"] if piece["learned"]]
    assert learned == ["you<|im_end|>"] * 3 and {piece["document"] for piece in row["pieces"]} == {1, 2, 3}
    assert sum(piece["tokens"] for piece in row["pieces"]) < row["tokens"] == 256
    assert data_main(["show", "chats.jsonl", "--tokenizer", "tok", "--max-seq-len", "256", "--rows", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count("«you<|im_end|>»") == 3 and "\n|\n" in out and "positions are empty" in out
    rows = said(capsys, "show", "texts.jsonl", "--rows", "2")
    assert [row["text"] for row in rows] == ["one", "two words"] and rows[1]["bytes"] == 9
    assert data_main(["show", "texts.jsonl", "--rows", "1"]) == 0
    assert capsys.readouterr().out == "--- texts.jsonl: document 0, 3 bytes ---\none\n"


def test_a_yaml_is_read_as_a_run_reads_it(home: Path, capsys: pytest.CaptureFixture) -> None:
    text = {"label": "a", "name": "text_files", "path": "texts.jsonl", "text_key": "body", "weight": 1.0}
    made = {"label": "b", "name": "synthetic", "n_documents": 5, "document_words": 20, "weight": 1.0}
    config = {
        "max_seq_len": 16,
        "model": {"name": "causal_lm", "d_model": 16, "n_heads": 2, "n_layers": 1, "vocab_size": 300},
        "tokenizer": {"name": "tok"}, "train_loader": {"datasets": [text, made]},
        "optimizer": {"name": "adamw", "lr": 0.1},
        "scheduler": {"name": "constant_with_warmup", "t_warmup": "0ba"}, "max_duration": "2ba",
        "global_train_batch_size": 4, "save_folder": "run",
    }  # fmt: skip
    Path("run.yaml").write_text(yaml.safe_dump(config))
    found = said(capsys, "stats", "run.yaml")
    assert [each["name"] for each in found] == ["train_loader.0", "train_loader.1"]
    assert found[0]["number"] == 6 and found[1]["number"] == 5 and len(found[1]["lengths"]) == 2
    rows = said(capsys, "show", "run.yaml", "max_seq_len=8", "--rows", "6")
    assert len(rows) == 6 and {row["source"] for row in rows} == {"a", "b"} and rows[0]["tokens"] == 8
    assert data_main(["show", "run.yaml", "--tokenizer", "tok"]) == 2
    assert not Path("run").exists()
    Path("run").mkdir()
    Path("run.yaml").rename("run/config.yaml")
    assert said(capsys, "stats", "run") == found, "a run's folder is its YAML, as --row takes it"


def test_a_terminal_has_a_table(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent, child = pty.openpty()
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(child, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        assert data_main(["stats", "texts.jsonl"]) == 0
        terminal.flush()
        shown = os.read(parent, 2**16).decode()
    os.close(parent)
    assert "┃" in shown and "bytes per document" in shown and "median" in shown


def test_quantiles_are_values_that_are_there() -> None:
    found = lengths_of("x", np.array([1, 2, 3, 4, 100]))
    assert found.quantiles == {"min": 1, "10 %": 1, "median": 3, "90 %": 100, "99 %": 100, "max": 100}
    assert lengths_of("x", np.array([], np.int64)).quantiles["max"] == 0
