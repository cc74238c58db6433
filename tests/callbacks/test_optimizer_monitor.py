"""`optimizer_monitor` against norms that are worked out from the checkpoints of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmfoundry.cli.train import train_main
from tests.callbacks.conftest import lines

CLIPPED = "algorithms.gradient_clipping={clipping_threshold: 0.1}"


def tensors_of(checkpoint: Path, part: str) -> dict[str, torch.Tensor]:
    (file,) = checkpoint.glob(f"{part}-*.safetensors")
    return {name.removeprefix(f"{part}/"): tensor for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    "optimizer", ["adamw", "decoupled_adamw", "decoupled_lionw", "muon", "adamw, master_weights: fp32_split"]
)
def test_norms_are_those_of_the_checkpoints(tiny: Path, tmp_path: Path, optimizer: str) -> None:
    options = ["save_interval=1ba", f"optimizer={{name: {optimizer}, lr: 0.01}}", CLIPPED, "max_duration=2ba"]
    assert train_main([str(tiny), *options, "callbacks.optimizer_monitor={batch_log_interval: 2}"]) == 0
    first, second = lines(tmp_path / "run")
    assert not any(key.startswith("l2_norm/") for key in first)
    one, two = (tensors_of(tmp_path / "run" / "checkpoints" / f"step-{step}", "model") for step in (1, 2))
    state = tensors_of(tmp_path / "run" / "checkpoints" / "step-2", "optimizer")
    parameters = [key.removeprefix("l2_norm/param/") for key in second if key.startswith("l2_norm/param/")]
    assert {"wte.weight", "blocks.1.ffn.experts.w1"} <= set(parameters)
    for name in parameters:
        assert second[f"l2_norm/param/{name}"] == pytest.approx(float(two[name].norm()), rel=1e-5)
        assert second[f"l2_norm/update/{name}"] == pytest.approx(float((two[name] - one[name]).norm()), rel=1e-4)
        moment = state.get(f"{name}/exp_avg", state.get(f"{name}/momentum_buffer"))
        assert moment is not None
        assert second[f"l2_norm/moment/{name}"] == pytest.approx(float(moment.norm()), rel=1e-5)
    squares = sum(second[f"l2_norm/grad/{name}"] ** 2 for name in parameters)
    assert second["l2_norm/grad/global"] == pytest.approx(squares**0.5)
    assert second["l2_norm/grad/global"] == pytest.approx(min(0.1, second["grad_norm"]), rel=1e-4)


def test_the_global_norm_alone(tiny: Path, tmp_path: Path) -> None:
    monitor = "callbacks.optimizer_monitor={batch_log_interval: 1, only_global: true}"
    assert train_main([str(tiny), monitor]) == 0
    for line in lines(tmp_path / "run"):
        assert [key for key in line if key.startswith("l2_norm/")] == ["l2_norm/grad/global"]
        assert line["l2_norm/grad/global"] == pytest.approx(line["grad_norm"], rel=1e-5)


def test_gradients_alone(tiny: Path, tmp_path: Path) -> None:
    monitor = "callbacks.optimizer_monitor={batch_log_interval: 4, log_optimizer_metrics: false}"
    assert train_main([str(tiny), monitor]) == 0
    found = [key for key in lines(tmp_path / "run")[-1] if key.startswith("l2_norm/")]
    assert len(found) > 10 and all(key.startswith("l2_norm/grad/") for key in found)
