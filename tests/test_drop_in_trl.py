"""`llmfoundry.drop_in` under TRL's SFTTrainer, which knows nothing of it: the curve is that of the eager experts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig
from trl import SFTConfig, SFTTrainer

from llmfoundry import drop_in
from llmfoundry.data.tokenizer import END_OF_TEXT, train_bpe

TEXTS = [f"{a} plus {b} is {a + b}." for a in range(8) for b in range(8)]


def _losses(folder: Path, implementation: str) -> list[float]:
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(TEXTS, 280), eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, intermediate_size=32, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, experts_implementation=implementation)
    options = SFTConfig(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, bf16=False, max_length=32, seed=1,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=options, train_dataset=Dataset.from_dict({"text": TEXTS}), processing_class=tokenizer
    )
    trainer.train()
    assert model.config._experts_implementation == implementation
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_sft_trains_through_our_experts(tmp_path: Path) -> None:
    theirs = _losses(tmp_path / "eager", "eager")
    for implementation in (drop_in.NAME, "llmfoundry_triton"):
        ours = _losses(tmp_path / implementation, implementation)
        assert len(ours) == 4 and ours[-1] < ours[0], implementation
        assert ours == pytest.approx(theirs, rel=1e-4), implementation
