"""What is held out is not trained on, and what is named for one purpose is read whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from llmfoundry.cli.inference import eval_main
from llmfoundry.cli.prepare import prepare_data_main
from llmfoundry.cli.train import train_main
from llmfoundry.config import ConfigError, check, dump
from llmfoundry.data import DatasetConfig
from llmfoundry.data.sources import check_apart, paired
from llmfoundry.data.split import cut
from llmfoundry.settings import load_yaml
from llmfoundry.train.config import RunConfig

Pair = tuple[list[str], list[str] | None]


def write(root: Path, names: Sequence[str], repeat: int = 1) -> Path:
    """Files that hold their own names: a text each, or a row with it."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"text": name}) if ".jsonl" in name else name
        (root / name).write_text("\n".join([line] * repeat))
    return root


def read(dataset: DatasetConfig) -> list[str]:
    return [document.splitlines()[0] for document in dataset.build().documents()]


def pair(train: dict[str, object], evaluation: dict[str, object] | None) -> Pair:
    """What the two loaders of a run read."""
    one, other = (None if keys is None else check(DatasetConfig, keys) for keys in (train, evaluation))
    assert one is not None
    one, other = paired(one, other)
    check_apart(one, other)
    return read(one), None if other is None else read(other)


def text_files(path: Path | str, **keys: object) -> dict[str, object]:
    return {"name": "text_files", "path": str(path)} | keys


A_AND_B = ["train/a.txt", "train/b.txt"]
LAYOUTS = {
    "val": (A_AND_B, ["val/v.txt"], []),
    "valid": (A_AND_B, ["valid/v.txt"], []),
    "validation": (A_AND_B, ["validation/deep/w.txt", "validation/v.txt"], []),
    "dev": (A_AND_B, ["dev/v.txt"], []),
    "held-out": (["training/a.txt"], ["held_out/v.txt"], []),
    "upper case": (["Train/a.txt"], ["VAL/v.TXT"], []),
    "test alone": (A_AND_B, ["test/v.txt"], []),
    "three folders": (A_AND_B, ["val/v.txt"], ["test/t.txt"]),
    "a file outside": (A_AND_B, ["val/v.txt"], ["x.txt"]),
    "files": (["train.jsonl"], ["val.jsonl"], ["test.jsonl"]),
    "a folder and files": (["train/00.jsonl", "train/01.jsonl"], ["val.jsonl"], ["test.jsonl"]),
    "shards": (
        ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002-a09b74b3ef9c3b56.jsonl"],
        ["data/validation-00000-of-00001.jsonl"],
        ["data/test-00000-of-00001.jsonl"],
    ),
    "a prefix": (["en/c4-train.00000.jsonl", "en/c4-train.00001.jsonl"], ["en/c4-validation.00000.jsonl"], []),
    "languages": (["train_de.txt", "train_en.txt", "train_fr.txt"], ["valid_de.txt", "valid_en.txt"], []),
    "one kind unnamed": (["a.txt", "b.txt", "sub/c.txt"], ["val/v.txt"], []),
    "one unnamed file": (["a.txt", "b.txt"], ["heldout.txt"], []),
    "words in other names": (["a/the-test.txt", "a/train-ride.txt"], ["dev.txt"], []),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("given", ["both", "train alone", "apart"])
def test_usual_names_are_the_splits(tmp_path: Path, layout: str, given: str) -> None:
    train, held_out, neither = LAYOUTS[layout]
    root = write(tmp_path / "texts", [*train, *held_out, *neither])
    other = write(tmp_path / "other", ["any.txt"])
    if given == "both":
        assert pair(text_files(root), text_files(root)) == (train, held_out)
    elif given == "train alone":
        assert pair(text_files(root), None) == (train, None)
    else:
        assert pair(text_files(root), text_files(other)) == (train, ["any.txt"])


@pytest.mark.parametrize("names", [["a.txt", "test.txt"], ["a/val.txt", "b/x.txt"], ["train/a.txt", "train/b.txt"]])
def test_a_path_of_its_own_is_read_whole(tmp_path: Path, names: list[str]) -> None:
    """Also where a name in it could be that of a split, as long as nothing in it is for training too."""
    train, held_out = write(tmp_path / "one", ["many.txt"]), write(tmp_path / "other", names)
    keys = {"split": "validation", "validation_fraction": 0.2}  # of a config that read one text for both
    for evaluation in (text_files(held_out), text_files(held_out, **keys)):
        assert pair(text_files(train), evaluation) == (["many.txt"], names)


def test_separate_files_lose_nothing(tmp_path: Path) -> None:
    rows = {side: [f"{side} {i}" for i in range(200)] for side in ("train", "val")}
    for side, texts in rows.items():
        (tmp_path / f"{side}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = pair(text_files(tmp_path / "train.jsonl"), text_files(tmp_path / "val.jsonl"))
    assert found == (rows["train"], rows["val"])
    assert pair(text_files(tmp_path / "train.jsonl"), None) == (rows["train"], None)


@pytest.mark.parametrize("stated", [(None, None), (0.3, None), (None, 0.3), (0.3, 0.3)])
def test_one_text_for_both_is_divided_once(tmp_path: Path, stated: tuple[float | None, float | None]) -> None:
    names = [f"{i:03}.txt" for i in range(200)]
    root = write(tmp_path / "texts", names)
    (tmp_path / "link").symlink_to(root)
    one, other = ({} if f is None else {"validation_fraction": f} for f in stated)
    train, held_out = pair(text_files(root, **one), text_files(tmp_path / "link", **other))
    assert held_out is not None and sorted(train + held_out) == names
    low, high = (0.01, 0.1) if stated == (None, None) else (0.2, 0.4)
    assert low < len(held_out) / 200 < high


def test_two_fractions_of_one_text_are_an_error(tmp_path: Path) -> None:
    root = write(tmp_path, ["a.txt", "b.txt"])
    with pytest.raises(ConfigError, match="validation_fraction: 0.3 of a text of which train_loader holds out 0.1"):
        pair(text_files(root, validation_fraction=0.1), text_files(root, validation_fraction=0.3))


@pytest.mark.parametrize("ending", [".txt", ".md", ".txt.gz", ".jsonl", ".parquet"])
@pytest.mark.parametrize("fraction", [None, 0.5])
def test_a_single_text_is_cut(tmp_path: Path, ending: str, fraction: float | None) -> None:
    import gzip

    import pyarrow
    import pyarrow.parquet

    lines = [f"line {i} of the only text\n" for i in range(500)]
    text, path = "".join(lines), tmp_path / f"input{ending}"
    if ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), path)
    else:
        data = (json.dumps({"text": text}) if ending == ".jsonl" else text).encode()
        path.write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)
    (tmp_path / "empty.txt").touch()
    keys = text_files(tmp_path if ending == ".txt" else path, validation_fraction=fraction)
    one, other = paired(check(DatasetConfig, keys), check(DatasetConfig, keys))
    assert other is not None
    (train,), (held_out,) = one.build().documents(), other.build().documents()
    n = len(held_out.splitlines())
    assert train + held_out == text and held_out.startswith("line ")
    assert n == pytest.approx(500 * (0.05 if fraction is None else fraction), abs=12)
    assert one.build().fingerprint != other.build().fingerprint


@pytest.mark.parametrize("text", ["ab", "x" * 1000, "one line\n" + "y" * 1000, "é🙂" * 50, "a\n" * 3])
def test_cut_leaves_both_sides_something_and_loses_nothing(text: str) -> None:
    for fraction in (0.001, 0.05, 0.5, 0.999):
        train, held_out = cut(text, "train", fraction), cut(text, "validation", fraction)
        assert train + held_out == text and train and held_out
        assert len(held_out) <= 1.5 * fraction * len(text) + 1


@pytest.mark.parametrize("n", [2, 3, 5])
def test_few_rows_still_fill_both_splits(tmp_path: Path, n: int) -> None:
    texts = [f"row {i}" for i in range(n)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train, held_out = pair(text_files(tmp_path), text_files(tmp_path))
    assert held_out and train and sorted(train + held_out) == texts
    (tmp_path / "b.txt").write_text("of a file")
    train, held_out = pair(text_files(tmp_path), text_files(tmp_path))
    assert held_out and train and sorted(train + held_out) == ["of a file", *texts]


def test_the_same_documents_twice_are_an_error(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one", ["a.txt", "b.txt"]), tmp_path / "other"
    other.mkdir()
    for name in ("a", "b"):
        (other / f"{name}-copy.txt").write_bytes((one / f"{name}.txt").read_bytes())
    same = [
        (text_files(one), text_files(other)),
        (text_files(one), text_files(one, split="train")),
        (text_files(one, validation_fraction=0.0), text_files(one)),
        ({"name": "synthetic"}, {"name": "synthetic", "split": "train"}),
        ({"name": "synthetic", "validation_fraction": 0.0}, {"name": "synthetic"}),
        ({"name": "python_stdlib"}, {"name": "python_stdlib", "split": "train"}),
    ]
    for train, evaluation in same:
        with pytest.raises(ConfigError, match="holds the same documents as train_loader.dataset .* give eval_loader"):
            pair(train, evaluation)


@pytest.mark.parametrize("held_out", ["b.txt", "sub", "b.*"])
def test_a_file_that_both_read_is_an_error(tmp_path: Path, held_out: str) -> None:
    root = write(tmp_path, ["a.txt", "b.txt", "sub/c.txt"])
    with pytest.raises(ConfigError, match=r"(b|c)\.txt is read by train_loader too; move it"):
        pair(text_files(root), text_files(root / held_out))
    with pytest.raises(ConfigError, match=r"(b|c)\.txt is read by train_loader too; move it"):
        pair(text_files(root / held_out), text_files(root))


def test_a_text_of_which_nothing_is_held_out_is_not_evaluated_on(tmp_path: Path) -> None:
    root = write(tmp_path, ["a.txt", "b.txt", "val/v.txt"])
    assert pair(text_files(root), text_files(root)) == (["a.txt", "b.txt"], ["val/v.txt"])
    with pytest.raises(ConfigError, match=r"a\.txt is read by train_loader too"):
        pair(text_files(root, validation_fraction=0.0), text_files(root, validation_fraction=1.0))


def test_most_of_the_text_in_files_of_no_split_is_an_error(tmp_path: Path) -> None:
    root = write(tmp_path, ["train.txt", "test.txt", *(f"chapter {i}.txt" for i in range(9))])
    with pytest.raises(ConfigError, match=r"train\.txt and test\.txt look like splits, but .* 9 files of no split"):
        pair(text_files(root), None)


def test_a_train_loader_may_hold_out_for_later(tmp_path: Path) -> None:
    names = [f"{i:03}.txt" for i in range(100)]
    root = write(tmp_path, names)
    train, _ = pair(text_files(root, validation_fraction=0.3), None)
    assert 50 < len(train) < 90 and pair(text_files(root), None) == (names, None)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The YAML of a tiny run on thirty files, for training and evaluation."""
    write(tmp_path / "texts", [f"{i:02}.txt" for i in range(30)], repeat=30)
    dataset = text_files(tmp_path / "texts", cache_dir=str(tmp_path / "cache"))
    config = {
        "max_seq_len": 16, "tokenizer": {"name": "bpe", "vocab_size": 257},
        "train_loader": {"dataset": dataset}, "eval_loader": {"dataset": dataset},
        "model": {"name": "causal_lm", "d_model": 16, "n_heads": 2, "n_layers": 1, "vocab_size": 257, "max_seq_len": 16,
                  "attn_config": {"rope": True}, "ffn_config": {"ffn_type": "mptmlp"}},
        "optimizer": {"name": "adamw", "lr": 1.0e-3}, "scheduler": {"name": "constant_with_warmup"},
        "max_duration": "1ba", "global_train_batch_size": 2, "save_folder": str(tmp_path / "run"),
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_an_evaluation_reads_validation_unless_told(recipe: Path) -> None:
    config = check(RunConfig, load_yaml(recipe))
    assert config.eval_loader is not None and config.eval_loader.dataset.split == "validation"
    assert config.train_loader.dataset.validation_fraction == config.eval_loader.dataset.validation_fraction == 0.05
    assert check(RunConfig, dump(config)) == config
    told = check(RunConfig, load_yaml(recipe, ["eval_loader.dataset.split=train"]))
    assert told.eval_loader is not None and told.eval_loader.dataset.split == "train"
    alone = check(RunConfig, load_yaml(recipe, ["eval_loader=null"]))
    assert alone.train_loader.dataset.validation_fraction == 0 and check(RunConfig, dump(alone)) == alone


def test_a_run_says_what_it_reads_and_refuses_its_own_text(
    recipe: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts" / "image.png").touch()
    (tmp_path / "texts" / "notes.PDF").touch()
    for command in (train_main, prepare_data_main):
        assert command([str(recipe), "eval_loader.dataset.split=train"]) == 2
        assert "holds the same documents as train_loader.dataset" in capsys.readouterr().err
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()
    for command in (train_main, prepare_data_main):
        caplog.clear()
        caplog.set_level("INFO")
        assert command([str(recipe)]) == 0
        said = [line for line in caplog.messages if " reads " in line]
        assert [line.partition(":")[0] for line in said] == ["text_files-train", "text_files-validation"]
        for line in said:
            assert "held out for validation: 1 of 30 files, by a hash of their names" in line
            assert line.endswith("skipped: 1 .png (e.g. image.png), 1 .pdf (e.g. notes.PDF)") and "\n" not in line


def test_eval_reads_all_of_the_file_that_it_is_given(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": f"{i:02}.txt"}) + "\n" for i in range(80)))

    def tokens(*overrides: str) -> int:
        capsys.readouterr()
        assert eval_main(["--checkpoint", str(tmp_path / "run"), *overrides]) == 0
        return int(capsys.readouterr().out.split(" over ")[1].split()[0].replace(",", ""))

    # A token per byte, and one per document: 30 files of 209 bytes, 80 rows of 6.
    everything = 30 * 210
    assert train_main([str(recipe), "train_loader.dataset.validation_fraction=0.2"]) == 0
    held_out = tokens()
    assert 0 < held_out < everything / 2
    assert tokens("eval_loader.dataset.split=train") == everything - held_out
    assert tokens(f"eval_loader.dataset.path={other}") == 80 * 7
    assert tokens(f"eval_loader.dataset.path={tmp_path / 'texts' / '07.txt'}") == 210
    assert train_main([str(recipe), "eval_loader=null", f"save_folder={tmp_path / 'alone'}"]) == 0
    (tmp_path / "run").rename(tmp_path / "before")
    (tmp_path / "alone").rename(tmp_path / "run")
    dataset = f"{{name: text_files, path: {tmp_path / 'texts'}, cache_dir: {tmp_path / 'cache'}}}"
    assert tokens(f"eval_loader.dataset={dataset}") == everything, "nothing was held out: the path is read whole"
