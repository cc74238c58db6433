"""A tiny mixture trained by axolotl with our experts, in an environment that has axolotl."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from llmfoundry.data.tokenizer import END_OF_TEXT, train_bpe
from tests.pages import ROOT, blocks

pytest.importorskip("axolotl", reason="axolotl pins its packages, so it has an environment of its own")

TEXTS = [f"{a} plus {b} is {a + b}." for a in range(8) for b in range(8)]


def test_the_documented_yaml_trains_like_eager_experts(tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(TEXTS, 280), bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, intermediate_size=32, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    for files in (Qwen3MoeForCausalLM(config), tokenizer):
        files.save_pretrained(tmp_path / "base")
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 4)
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    (documented,) = (
        yaml.safe_load(block.text)
        for block in blocks(ROOT / "docs" / "from-torchtitan.md", "yaml")
        if "plugins:" in block.text
    )
    assert documented["experts_implementation"] == "llmfoundry"
    ours, eager = (_losses(tmp_path, documented | {"experts_implementation": name}) for name in ("llmfoundry", "eager"))
    assert len(ours) == 4 and ours[-1] < ours[0] and ours == eager  # axolotl prints four digits


def _losses(folder: Path, documented: dict[str, object]) -> list[str]:
    run = documented | {
        "base_model": "base",
        "datasets": [{"path": "rows.jsonl", "ds_type": "json", "type": "completion"}],
        "sequence_len": 64, "micro_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 4, "seed": 1,
        "learning_rate": 1e-2, "optimizer": "adamw_torch", "lr_scheduler": "constant", "logging_steps": 1,
        "bf16": False, "tf32": False, "output_dir": f"out-{documented['experts_implementation']}",
    }  # fmt: skip
    path = folder / f"{documented['experts_implementation']}.yaml"
    path.write_text(yaml.safe_dump(run), encoding="utf-8")
    quiet = {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(
        [sys.executable, "-m", "axolotl.cli.train", path.name], cwd=folder, env=os.environ | quiet, text=True,
        capture_output=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return re.findall(r"'loss': '([\d.]+)'", ran.stdout + ran.stderr)
