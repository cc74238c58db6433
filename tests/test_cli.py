"""The commands' options, and what they say of a user's mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from llmfoundry.cli import prepare_data_main, train_main


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
