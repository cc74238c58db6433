"""A run that trains adapters on another run's weights, stops, and goes on."""

import shutil
from pathlib import Path

import pytest
import torch
from test_run import metrics_of, recipe, weights_of  # noqa: F401

from llmfoundry.cli.train import train_main
from llmfoundry.layers.lora import is_adapter

LORA = ["model.lora.rank=2", "model.lora.alpha=8.0", "load_weights_only=true", "optimizer.lr=3.0e-2"]


def test_adapters_begin_on_a_base_checkpoint_and_resume_bitwise(
    recipe: Path,  # noqa: F811
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert train_main([str(recipe)]) == 0
    base = tmp_path / "run"
    begin = [str(recipe), *LORA, f"load_path={base / 'checkpoints' / 'latest'}", "max_duration=12ba"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train_main([*begin, f"save_folder={whole}"]) == 0
    lines = metrics_of(whole)
    assert lines[0]["loss/train/ce"] < metrics_of(base)[0]["loss/train/ce"]  # it did begin where the base had ended
    assert lines[-1]["loss/train/ce"] < lines[0]["loss/train/ce"]
    after = weights_of(whole)
    assert after and all(is_adapter(name) for name in after), "the base has the rest"
    assert any(value.abs().max() > 0 for name, value in after.items() if name.endswith("lora_B"))

    assert train_main([*begin, f"save_folder={parts}", "save_interval=5ba"]) == 0
    for later in (parts / "checkpoints").glob("step-1*"):  # as if it had been killed after step 5
        shutil.rmtree(later)
    (parts / "checkpoints" / "latest").unlink()
    (parts / "checkpoints" / "latest").symlink_to("step-5")
    assert train_main([*begin, f"save_folder={parts}", "save_interval=5ba", "autoresume=true"]) == 0
    assert all(torch.equal(after[name], value) for name, value in weights_of(parts).items())
