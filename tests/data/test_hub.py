"""Datasets by name, read by the real `datasets` from a folder laid out as on the hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmfoundry.config import ConfigError, check
from llmfoundry.data import DatasetConfig
from llmfoundry.data.sources import check_apart, paired


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two subsets with two splits; what `datasets` stores goes into a folder of this test's own."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    head = "---\nconfigs:\n"
    for subset in ("en", "de"):
        (tmp_path / "corpus" / subset).mkdir(parents=True)
        head += f"- config_name: {subset}\n  data_files:\n"
        for split in ("train", "validation"):
            head += f"  - split: {split}\n    path: {subset}/{split}.jsonl\n"
            rows = [json.dumps({"text": f"{subset} {split} {i}", "id": i}) for i in range(8)]
            (tmp_path / "corpus" / subset / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "corpus" / "README.md").write_text(head + "---\n")
    return tmp_path / "corpus"


def dataset(hub: Path | str, **keys: object) -> DatasetConfig:
    return check(DatasetConfig, {"name": "hub", "hf_name": str(hub)} | keys)


def test_a_split_of_a_subset_is_read_stored_or_streamed(hub: Path, tmp_path: Path) -> None:
    expected = [f"de train {i}" for i in range(8)]
    streamed = dataset(hub, subset="de", streaming=True).build()
    assert list(streamed.documents()) == list(streamed.documents()) == expected
    assert not list((tmp_path / "cache").rglob("*.arrow")), "a stream stores nothing"
    stored = dataset(hub, subset="de").build()
    assert list(stored.documents()) == expected and list((tmp_path / "cache").rglob("*.arrow"))
    assert stored.fingerprint == streamed.fingerprint
    assert list(dataset(hub, subset="de", split="train[2:4]").build().documents()) == expected[2:4]
    assert list(dataset(hub, subset="de", streaming=True, max_documents=3).build().documents()) == expected[:3]


def test_other_documents_have_another_fingerprint(hub: Path) -> None:
    choices = [{"subset": "de"}, {"subset": "en"}, {"subset": "de", "split": "validation"},
               {"subset": "de", "max_documents": 3}]  # fmt: skip
    assert len({dataset(hub, streaming=True, **keys).build().fingerprint for keys in choices}) == 4
    before = dataset(hub, subset="en").build().fingerprint
    (hub / "en" / "train.jsonl").write_text('{"text": "other", "id": 0}\n')
    after = dataset(hub, subset="en").build()
    assert after.fingerprint != before and list(after.documents()) == ["other"]


def test_an_evaluation_reads_the_validation_split(hub: Path) -> None:
    train, validation = paired(dataset(hub, subset="en"), dataset(hub, subset="en"))
    assert validation is not None and list(validation.build().documents())[0] == "en validation 0"
    check_apart(train, validation)
    with pytest.raises(ConfigError, match="holds the same documents as train_loader"):
        check_apart(train, dataset(hub, subset="en", split="train"))


def test_mistakes_are_named(hub: Path) -> None:
    for keys, message in [
        ({"subset": "fr"}, r"corpus, subset fr, split train: cannot be loaded: .*Available: \['en', 'de'\]"),
        ({"subset": "en", "split": "test"}, r"split test: cannot be loaded: ValueError: .*test"),
        ({"subset": "en", "text_key": "txt"}, "'txt' is not among text, id"),
        ({"subset": "en", "text_key": "id"}, "row 0: 'id' is 0"),
    ]:
        with pytest.raises(ConfigError, match=message) as caught:
            list(dataset(hub, **keys).build().documents())
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="no/where, subset None, split train: cannot be loaded: .*Offline"):
        dataset("no/where").build()
