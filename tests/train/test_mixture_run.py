"""Runs on mixtures: what they log, and how they go on when the mixture is changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from llmfoundry.cli.inference import eval_main
from llmfoundry.cli.train import train_main
from llmfoundry.data.loader import Loader

LENGTH = 16
TINY = {
    "max_seq_len": LENGTH,
    "model": {
        "name": "causal_lm", "d_model": 16, "n_heads": 2, "n_layers": 1, "vocab_size": 300, "max_seq_len": LENGTH,
        "attn_config": {"rope": True}, "expansion_ratio": 2,
    },
    "tokenizer": {"name": "bpe", "vocab_size": 260},
    "optimizer": {"name": "adamw", "lr": 1.0e-2},
    "scheduler": {"name": "constant_with_warmup", "t_warmup": "0ba"},
    "max_duration": "6ba", "global_train_batch_size": 5, "eval_interval": "3ba", "device_eval_batch_size": 4,
    "save_interval": "3ba", "log_to_console": False, "callbacks": {"report": {"enabled": False}},
}  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The YAML of a tiny run on two texts; it saves to `tmp_path/run`."""
    parts = []
    for name, weight in (("sums", 0.75), ("words", 0.25)):
        folder = tmp_path / name
        folder.mkdir()
        for i in range(12):
            (folder / f"{i}.txt").write_text("".join(f"{name} {n} {i} {n + i}\n" for n in range(30)))
        parts.append({"name": "text_files", "path": str(folder), "weight": weight, "cache_dir": str(tmp_path / "c")})
    held_out = [{"label": part["path"].rpartition("/")[2], "rows": 4,
                 "dataset": {key: part[key] for key in ("name", "path", "cache_dir")}} for part in parts]  # fmt: skip
    config = TINY | {
        "train_loader": {"datasets": parts}, "eval_loaders": held_out, "save_folder": str(tmp_path / "run"),
    }  # fmt: skip
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def lines_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def changed(recipe: Path, **train_loader: object) -> str:
    config = yaml.safe_load(recipe.read_text())
    config["train_loader"] |= train_loader
    other = recipe.with_name("changed.yaml")
    other.write_text(yaml.safe_dump(config))
    return str(other)


def test_loss_and_tokens_of_each_source_are_logged(recipe: Path, tmp_path: Path) -> None:
    assert train_main([str(recipe)]) == 0
    lines = lines_of(tmp_path / "run")
    assert len(lines) == 6
    for n, line in enumerate(lines, 1):
        asked = {"sums": 0.75 * 5 * n, "words": 0.25 * 5 * n}
        assert all(abs(line[f"tokens/{label}"] / LENGTH - rows) < 1 for label, rows in asked.items())
        shares = {label: line[f"tokens/{label}"] - (lines[n - 2][f"tokens/{label}"] if n > 1 else 0) for label in asked}
        mean = sum(line.get(f"loss/train/{label}", 0.0) * tokens for label, tokens in shares.items()) / (5 * LENGTH)
        assert mean == pytest.approx(line["loss/train/ce"], rel=1e-5)  # all rows are full of labels
    for label in ("sums", "words"):
        assert 0 < lines[2][f"metrics/eval/{label}/LanguageCrossEntropy"] < 10
        assert f"metrics/eval/{label}/bits_per_byte" not in lines[2], "only a part of it was read"
    assert "metrics/eval/LanguageCrossEntropy" not in lines[2]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["validation/sums/nats_per_token"] == lines[-1]["metrics/eval/sums/LanguageCrossEntropy"]


def test_microbatches_do_not_change_what_is_logged(recipe: Path, tmp_path: Path) -> None:
    assert train_main([str(recipe), f"save_folder={tmp_path / 'one'}"]) == 0
    assert train_main([str(recipe), f"save_folder={tmp_path / 'many'}", "device_train_microbatch_size=2"]) == 0
    for one, many in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "many"), strict=True):
        keys = [key for key in one if key.startswith(("loss/", "tokens"))]
        assert keys and all(many[key] == pytest.approx(one[key], rel=1e-4) for key in keys)


def test_a_run_resumes_in_its_mixture(recipe: Path, tmp_path: Path) -> None:
    assert train_main([str(recipe), f"save_folder={tmp_path / 'whole'}"]) == 0
    assert train_main([str(recipe), "max_duration=3ba"]) == 0
    assert train_main([str(recipe), "autoresume=true"]) == 0
    for whole, part in zip(lines_of(tmp_path / "whole"), lines_of(tmp_path / "run"), strict=True):
        assert whole["loss/train/ce"] == part["loss/train/ce"] and whole["tokens/sums"] == part["tokens/sums"]


def test_a_changed_mixture_needs_its_key_and_reads_on(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train_main([str(recipe), "max_duration=3ba"]) == 0
    parts = yaml.safe_load(recipe.read_text())["train_loader"]["datasets"]
    other = changed(recipe, datasets=[parts[0] | {"weight": 0.2}, parts[1] | {"weight": 0.8}])
    assert train_main([other, "autoresume=true"]) == 2
    assert "load_allow=[mixture]" in capsys.readouterr().err
    seen: list[list[int]] = []
    batch = Loader.batch

    def recorded(self: Loader, *where: int) -> object:
        found = batch(self, *where)
        if self.labels:
            seen.append(self.order._where(found.rows.numpy())[1][found.sources.numpy() == 0].tolist())
        return found

    monkeypatch.setattr(Loader, "batch", recorded)
    options = ["autoresume=true", "load_allow=[mixture]", "max_duration=5ba"]
    assert train_main([other, *options]) == 0
    lines = lines_of(tmp_path / "run")
    taken = lines[2]["tokens/sums"] / LENGTH  # by step 3, of the first mixture
    assert abs(lines[4]["tokens/sums"] / LENGTH - taken - 0.2 * 10) <= 1
    assert sum(seen, [])[0] == taken, "the source goes on after the row that it had reached"
    seen.clear()
    # Its own checkpoints know where it changed: no key is needed any more.
    assert train_main([other, "autoresume=true", "max_duration=8ba"]) == 0
    lines = lines_of(tmp_path / "run")
    assert abs(lines[7]["tokens/sums"] / LENGTH - taken - 0.2 * 25) <= 1


def test_phases_follow_the_time_of_the_run(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    phases = [{"until": "0.5dur", "weights": {"sums": 1.0}}, {"weights": {"words": 1.0}}]
    path = changed(recipe, mixture=phases)
    assert train_main([path]) == 0
    assert [line["tokens/words"] // LENGTH for line in lines_of(tmp_path / "run")] == [0, 0, 0, 5, 10, 15]
    assert train_main([path, "autoresume=true", "max_duration=12ba"]) == 2, "the phase would now end at step 6"
    assert "ends its phases at other times now" in capsys.readouterr().err
    assert train_main([path, "autoresume=true", "max_duration=12ba", "load_allow=[mixture]"]) == 0


@pytest.mark.parametrize(
    ("train_loader", "message"),
    [
        ({"mixture": [{"until": "soon", "weights": {"sums": 1.0}}, {"weights": {"words": 1.0}}]}, "mixture.0.until"),
        ({"mixture": [{"weights": {"sum": 1.0}}]}, "'sum' is not a dataset; known: sums, words"),
        ({"mixture": [{"until": "4ba", "weights": {"sums": 1.0}}, {"until": "3ba", "weights": {"sums": 1.0}},
                      {"weights": {"words": 1.0}}]}, "mixture.1.until: 3ba is not after the phase before it"),
    ],
)  # fmt: skip
def test_mistakes_end_the_run_in_one_line(
    recipe: Path, train_loader: dict[str, object], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert train_main([changed(recipe, **train_loader)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("labels", [("a", "a"), (None, "b"), ("a/b", "c")])
def test_evaluations_need_labels(recipe: Path, labels: tuple[str | None, str], capsys: pytest.CaptureFixture) -> None:
    config = yaml.safe_load(recipe.read_text())
    for each, label in zip(config["eval_loaders"], labels, strict=True):
        each["label"] = label
    recipe.write_text(yaml.safe_dump(config))
    assert train_main([str(recipe)]) == 2
    assert "label" in capsys.readouterr().err


def test_a_list_of_eval_loader_is_llm_foundrys_way_to_say_it(recipe: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(recipe.read_text())
    config["eval_loader"] = config.pop("eval_loaders")
    recipe.write_text(yaml.safe_dump(config))
    assert train_main([str(recipe), "max_duration=3ba"]) == 0
    assert "metrics/eval/words/LanguageCrossEntropy" in lines_of(tmp_path / "run")[2]


def test_eval_measures_all_evaluations(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert train_main([str(recipe), "max_duration=3ba"]) == 0
    line = lines_of(tmp_path / "run")[2]
    capsys.readouterr()
    assert eval_main(["--checkpoint", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    for label in ("sums", "words"):
        assert f"{label}: {line[f'metrics/eval/{label}/LanguageCrossEntropy']:.4f} nats per token" in said
