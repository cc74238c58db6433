"""Rows of token ids in tables: taken as they are, in any run and split, and mistakes named in one line."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from llmfoundry.config import ConfigError, check
from llmfoundry.data import IGNORE, Loader, LoaderConfig
from tests.data.chat_tokenizer import tokenizer

LENGTH = 8


def made(n: int, length: int = LENGTH) -> list[list[int]]:
    return np.random.default_rng(n).integers(1, 256, (n, length)).tolist()


def loader(path: Path, *, documents: bool = True, **keys: object) -> Loader:
    data = {"name": "ids", "path": str(path), "shuffle": False, "validation_fraction": 0.0} | keys
    return check(LoaderConfig, {"dataset": data}).build(tokenizer(), seed=0, max_seq_len=LENGTH, sequence_ids=documents)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMFOUNDRY_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".json", ".parquet"])
def test_rows_are_taken_as_they_are(tmp_path: Path, ending: str) -> None:
    eos = tokenizer().eos_token_id
    rows = made(20, LENGTH + 3)
    rows[0][2] = rows[0][5] = eos
    file = tmp_path / "data" / f"part{ending}"
    file.parent.mkdir()
    if ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"input_ids": rows, "n": list(range(20))}), file)
    else:
        lines = [json.dumps({"input_ids": ids, "n": n}) for n, ids in enumerate(rows)]
        text = f"[{','.join(lines)}]" if ending == ".json" else "\n".join(lines)
        file.write_bytes(gzip.compress(text.encode()) if ending.endswith(".gz") else text.encode())
    found = loader(file.parent)
    assert found.rows_per_epoch == 20
    batch = found.batch(0, 20)
    assert batch.tokens.tolist() == [ids[:LENGTH] for ids in rows]
    assert batch.labels.tolist() == [[*ids[1:LENGTH], IGNORE] for ids in rows]
    assert batch.sequence_ids is not None
    assert batch.sequence_ids[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2], "a document ends with its end-of-text token"
    assert loader(file.parent, documents=False).batch(3, 5).tokens.equal(batch.tokens[3:8])


def test_both_sides_of_a_run_divide_the_rows(tmp_path: Path) -> None:
    rows = made(200)
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"tokens": ids}) for ids in rows))
    keys = {"ids_key": "tokens", "validation_fraction": 0.2}
    sides = [loader(tmp_path / "rows.jsonl", split=split, **keys) for split in ("train", "validation")]
    read = [side.batch(0, side.rows_per_epoch).tokens.tolist() for side in sides]
    assert sorted(read[0] + read[1]) == sorted(rows) and 20 < len(read[1]) < 60


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"tokens": [1] * 8}, "row 1: input_ids: is None, and must be a list of token ids; its columns are tokens"),
        ({"input_ids": [1] * 7}, "row 1: input_ids: has 7 tokens, and max_seq_len is 8; lower it, or join short rows"),
        ({"input_ids": [1] * 7 + [True]}, "must be a list of token ids"),
        ({"input_ids": [-1, *[1] * 7]}, "has the id -1"),
        ({"input_ids": [10**6, *[1] * 7]}, "has the id 1000000, and the tokenizer's end at"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_read_is_named(tmp_path: Path, row: dict[str, object], said: str) -> None:
    lines = [json.dumps({"input_ids": [1] * LENGTH}), json.dumps(row)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(ConfigError) as error:
        loader(tmp_path / "rows.jsonl")
    assert said in str(error.value)
    assert not list((tmp_path / "cache").glob("ids/*")), "nothing is left of it"


def test_a_copy_that_becomes_shorter_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"input_ids": ids}) for ids in made(20)))
    found = loader(tmp_path / "rows.jsonl")
    (copy,) = (tmp_path / "cache").rglob("ids.bin")
    os.truncate(copy, 40)
    with pytest.raises(ConfigError, match=r"ids\.bin: has become shorter than \d+ bytes"):
        found.batch(0, 20)


@pytest.mark.parametrize("dataset", [{"name": "ids", "path": "a"}, {"name": "megatron", "path": "a"}, {"local": "a"}])
def test_an_id_that_no_tokenizer_has_is_refused(dataset: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="dataset.eos_token_id: input should be less than 4294967296"):
        check(LoaderConfig, {"dataset": dataset | {"eos_token_id": 10**30}})
