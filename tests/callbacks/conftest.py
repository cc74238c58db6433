"""A tiny run that every test of callbacks and loggers shares."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

STEPS = 4


def tiny_run(folder: Path) -> dict[str, object]:
    """4 rows of 32 tokens a step, two mixtures of 4 experts; it saves to `folder/run`."""
    text = {"name": "synthetic", "n_documents": 40, "document_words": 50, "cache_dir": str(folder / "cache")}
    ffn = {"ffn_type": "moe", "ffn_hidden_size": 32, "moe_num_experts": 4, "ffn_act_fn": {"name": "silu"}}
    return {
        "max_seq_len": 32,
        "model": {"d_model": 32, "n_heads": 2, "n_layers": 2, "vocab_size": 320, "max_seq_len": 32, "ffn_config": ffn},
        "tokenizer": {"name": "bpe", "vocab_size": 300},
        "train_loader": {"dataset": text | {"split": "train"}},
        "eval_loader": {"dataset": text | {"split": "validation", "validation_fraction": 0.2}},
        "optimizer": {"name": "adamw", "lr": 0.01},
        "scheduler": {"name": "constant_with_warmup"},
        "max_duration": f"{STEPS}ba",
        "global_train_batch_size": 4,
        "save_folder": str(folder / "run"),
        "log_to_console": False,
    }


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The YAML of `tiny_run`."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_run(tmp_path)))
    return path


def lines(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl of a run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
