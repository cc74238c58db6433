"""The commands' options, and what they say of a user's mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from llmfoundry.cli.command import Command
from llmfoundry.cli.train import prepare_data_main, train_main


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The YAML of a tiny run on made-up text."""
    dataset = {"name": "synthetic", "n_documents": 40, "document_words": 50, "cache_dir": str(tmp_path / "cache")}
    config = {
        "max_seq_len": 32,
        "model": {"name": "causal_lm", "d_model": 32, "n_heads": 2, "n_layers": 1, "vocab_size": 320},
        "tokenizer": {"name": "bpe", "vocab_size": 300},
        "train_loader": {"dataset": dataset},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "scheduler": {"name": "cosine_with_warmup", "t_warmup": "1ba"},
        "max_duration": "2ba",
        "global_train_batch_size": 4,
        "save_folder": str(tmp_path / "run"),
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_overrides_may_follow_options(recipe: Path, capsys: pytest.CaptureFixture) -> None:
    assert train_main([str(recipe), "--dry-run", "seed=1"]) == 0
    assert "seed: 1\n" in capsys.readouterr().out
    assert train_main([str(recipe), "seed=2", "--gpus", "1", "max_seq_len=16", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "seed: 2\n" in out and "max_seq_len: 16\n" in out
    assert prepare_data_main([str(recipe), "seed=1"]) == 0


def test_dry_run_says_whether_it_fits(recipe: Path, capsys: pytest.CaptureFixture) -> None:
    assert train_main([str(recipe), "--dry-run", "--gpus", "2", "--gpu-memory", "40"]) == 0
    out = capsys.readouterr().out
    assert "of 35.0 GiB (40, of which 5 are kept free)" in out and "meshes of 2 GPUs" in out
    for options, says in (
        (["--gpu-memory", "40"], "--gpu-memory 40: is for --dry-run"),
        (["--dry-run", "--gpu-memory", "nan"], "--gpu-memory nan: is for --dry-run, and a number of GiB"),
        (["--dry-run", "--gpu-memory", "5"], "--gpu-memory 5: 5 GiB of it are kept free"),
        (["--dry-run", "--gpus", "0"], "--gpus 0: is for --dry-run, and 1 or more"),
    ):
        assert train_main([str(recipe), *options]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("save_num_checkpoints_to_keep=-2", "save_num_checkpoints_to_keep=-2 keeps nothing"),
        ("eval_subset_num_batches=0", "eval_subset_num_batches=0 evaluates on nothing"),
        ("eval_subset_num_batches=-2", "eval_subset_num_batches=-2 evaluates on nothing"),
        ("seed=9223372036854775808", "seed: input should be less than 9223372036854775808"),
        ("model.ffn_config.ffn_hidden_size=0", "ffn_hidden_size: input should be greater than or equal to 1"),
        ("model.expansion_ratio=0.01", "expansion_ratio=0.01 of d_model=32 leaves no hidden unit"),
        ("model.init_config.init_div_is_residual=0.0", "init_div_is_residual: residual outputs cannot be divided by 0"),
        ("model.expansion_ratio=.inf", "model.expansion_ratio: input should be a finite number, found inf"),
        ("parallel.recompute_save=[aten.mm]", "recompute_save is for recompute: selective, not none"),
        ("train_loader=[]", "train_loader=[]: does not fit what stands there"),
        ("eval_first=true", "eval_first=true has no text to evaluate on; add an eval_loader"),
        ("precision=bf16", "precision: input should be 'fp32' or 'amp_bf16' or 'auto', found 'bf16'"),
        (
            "device_train_microbatch_size=all",
            "device_train_microbatch_size: input should be a valid integer or 'auto', found 'all'",
        ),
        ("[=1", "[=1: does not fit what stands there"),
    ],
)
def test_a_value_out_of_bounds_is_one_line(
    recipe: Path, capsys: pytest.CaptureFixture, override: str, says: str
) -> None:
    assert train_main([str(recipe), "--dry-run", override]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and says in line


@pytest.mark.parametrize("command", [train_main, prepare_data_main])
def test_what_is_missing_is_the_yaml_alone(command: Command, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        command([])
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip().endswith("the following arguments are required: yaml")


def test_no_text_to_validate_on_leaves_nothing(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = yaml.safe_load(recipe.read_text())
    config["train_loader"]["dataset"]["validation_fraction"] = 0.0
    config["eval_loader"] = {"dataset": config["train_loader"]["dataset"] | {"split": "validation"}}
    recipe.write_text(yaml.safe_dump(config))
    assert prepare_data_main([str(recipe)]) == 2
    assert "holds no text" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [recipe.name]


def test_folders_may_be_at_home(recipe: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert train_main([str(recipe), "--dry-run", "save_folder=~/runs/a", "load_path=~/runs/b"]) == 0
    out = capsys.readouterr().out
    assert "save_folder: /home/me/runs/a\n" in out and "load_path: /home/me/runs/b\n" in out
