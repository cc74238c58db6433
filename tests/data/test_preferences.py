"""Preferences: their formats, and the rows of pairs that they become."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llmfoundry.config import ConfigError, check
from llmfoundry.data import IGNORE
from llmfoundry.data.conversations import Pair
from llmfoundry.data.loader import LoaderConfig
from llmfoundry.data.preferences import apart, preference_of
from tests.data.chat_tokenizer import tokenizer

USER, GOOD, BAD = ({"role": role, "content": text} for role, text in
                   (("user", "how are you?"), ("assistant", "fine, thanks"), ("assistant", "go away")))  # fmt: skip
ROWS = [
    {"prompt": "how are you?", "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    {"prompt": [USER], "chosen": GOOD["content"], "rejected": BAD["content"]},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": "how are you?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},  # as UltraFeedback
]


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_formats_mean_the_same(row: dict[str, object]) -> None:
    found = preference_of(row)
    assert [each.messages for each in found] == [[USER, GOOD], [USER, BAD]]


def test_texts_are_joined_as_they_are() -> None:
    found = preference_of({"prompt": "1+1=", "chosen": "2", "rejected": "3"})
    assert found == (Pair("1+1=", "2"), Pair("1+1=", "3"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "no rejected; name it in preprocessing_fn"),
        ({"chosen": "b", "rejected": "c"}, "and no prompt"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "start with the assistant, and no prompt"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}, "are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"chosen": [USER, GOOD], "rejected": [USER | {"content": "?"}, BAD]}, "start with different messages"),
    ],
)
def test_what_is_wrong_is_named(row: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preference_of(row)


def _loader(tmp_path: Path, rows: list[dict[str, object]], length: int = 64) -> object:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = {"path": str(tmp_path / "train.jsonl"), "cache_dir": str(tmp_path / "c"), "shuffle": False,
               "validation_fraction": 0.0}  # fmt: skip
    config = check(LoaderConfig, {"name": "preferences", "dataset": dataset})
    return config.build(tokenizer(), seed=1, max_seq_len=length)


def test_a_row_is_a_pair_and_only_answers_are_learned(tmp_path: Path) -> None:
    again = {"role": "user", "content": "and now?"}
    rows = [{"chosen": [USER, GOOD, again, GOOD], "rejected": [USER, GOOD, again, BAD]}, ROWS[0]]
    loader = _loader(tmp_path, rows)
    assert loader.max_seq_len == 128 and loader.rows_per_epoch == 2 and loader.order.sequences == 2
    batch = loader.batch(0, 2)
    sequences = apart(batch)
    assert sequences.tokens.shape == (4, 64) and sequences.rows.tolist() == [0, 0, 1, 1]
    own = tokenizer()
    said = [own.decode(labels[labels != IGNORE]) for labels in sequences.labels]
    assert [text.startswith(answer["content"]) for text, answer in zip(said, [GOOD, BAD] * 2, strict=True)] == [
        True
    ] * 4
    assert not any("how are you" in text or text.count("fine") > 1 for text in said)
    assert torch.equal(sequences.tokens[0], batch.tokens[0, :64]) and torch.equal(
        sequences.tokens[1], batch.tokens[0, 64:]
    )
    assert sequences.positions[1, :5].tolist() == [0, 1, 2, 3, 4]


def test_a_pair_that_does_not_fit_is_left_out(tmp_path: Path) -> None:
    long = {"prompt": "x " * 200, "chosen": "yes", "rejected": "no"}
    assert _loader(tmp_path, [long, ROWS[0]]).rows_per_epoch == 1
    with pytest.raises(ConfigError, match="none of 1 preferences has two answers that begin within max_seq_len=64"):
        _loader(tmp_path, [long])
