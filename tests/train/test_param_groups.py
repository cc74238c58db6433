"""`optimizer.param_groups` and `disable_grad`: whose learning rate and decay, what is frozen, resume, two ranks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

import llmfoundry.train.lion  # noqa: F401  registers its optimizer
import llmfoundry.train.muon  # noqa: F401  registers its optimizer
from llmfoundry.cli.train import train_main
from llmfoundry.config import Config, ConfigError, check
from llmfoundry.train.optim import OptimizerConfig, set_learning_rate
from tests import forks
from tests.callbacks.conftest import tiny_run

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["adamw", "decoupled_adamw", "decoupled_lionw", "muon"]
ROUTER = {"param_str_match": "router", "lr": 0.5, "weight_decay": 0.25}


class Block(Config):
    """As in a run."""

    optimizer: OptimizerConfig


class Tiny(nn.Module):
    """A few kinds of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.norm, self.router = nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 4)


def build(model: nn.Module, **settings: object) -> torch.optim.Optimizer:
    return check(Block, {"optimizer": {"lr": 0.1} | settings}).optimizer.build(model)


@pytest.mark.parametrize("name", NAMES)
def test_each_group_decays_and_follows_the_schedule_by_its_own_rate(name: str) -> None:
    model = Tiny()
    before = {key: each.detach().clone() for key, each in model.named_parameters()}
    optimizer = build(model, name=name, weight_decay=0.125, param_groups=[ROUTER, {"param_str_match": "norm"}])
    for each in model.parameters():
        each.grad = torch.zeros_like(each)  # only decay moves weights
    assert set_learning_rate(optimizer, 0.5) == 0.05, "of the rest"
    optimizer.step()
    factor = {"wte.weight": 0.125, "router.weight": 0.25, "router.bias": 0.25}  # given to a group: biases too
    for key, each in model.named_parameters():
        decay = factor.get(key, 0.0) * 0.5
        if name in ("adamw", "muon"):
            decay *= 0.5 if key.startswith("router") else 0.1
        torch.testing.assert_close(each.detach(), before[key] * (1 - decay), msg=key)
    rates = {group["number"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {0: 0.05, 1: 0.25, 2: 0.05}


def test_the_first_group_that_matches_has_a_parameter() -> None:
    groups = [{"param_str_match": "bias", "lr": 1.0}, {"param_str_match": "router", "lr": 2.0}]
    model = Tiny()
    optimizer = build(model, name="adamw", param_groups=groups)
    rates = {id(each): group["lr"] for group in optimizer.param_groups for each in group["params"]}
    assert rates[id(model.router.bias)] == 1.0 and rates[id(model.router.weight)] == 2.0


@pytest.mark.parametrize("disabled", ["wte|norm", ["wte", "norm"]])
def test_what_is_disabled_is_frozen(disabled: str | list[str]) -> None:
    model = Tiny()
    optimizer = build(model, name="adamw", disable_grad=disabled)
    assert {key for key, each in model.named_parameters() if each.requires_grad} == {"router.weight", "router.bias"}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"param_groups": [{"param_str_match": "rooter"}]}, "param_groups.0.param_str_match: 'rooter' matches no"),
        ({"param_groups": [{"param_str_match": "rooter"}]}, "known: wte.weight, norm.weight, norm.bias, router.weight"),
        ({"disable_grad": ["wpe"]}, "disable_grad.0: 'wpe' matches no parameter"),
        ({"disable_grad": "."}, "leaves none to train"),
        ({"param_groups": [{"param_str_match": "("}]}, "'(' is not a regular expression"),
        ({"param_groups": [{"param_str_match": "wte", "momentum": 1.0}]}, "momentum: unknown key"),
        ({"param_groups": [{"param_str_match": "."}, ROUTER]}, "known: none (earlier patterns match all)"),
        ({"name": "decoupled_lionw", "param_groups": [ROUTER | {"eps": 1e-6}]}, "decoupled_lionw has none"),
    ],
)
def test_mistakes_are_told(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(Tiny(), **({"name": "adamw"} | settings))
    assert said in str(error.value)


GROUPED = {
    "param_groups": [{"param_str_match": "router", "lr": 0.002, "weight_decay": 0.0, "betas": [0.8, 0.9]}],
    "disable_grad": ["wte", r"blocks\.0\.ffn\.experts"],
}
RUN = {"max_duration": "6ba", "save_interval": "3ba", "eval_interval": "0ba", "callbacks": {"lr_monitor": {}}}


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The model of the last checkpoint, whole; from a run of one process."""
    (file,) = (run / "checkpoints" / "latest").glob("model-*.safetensors")
    return load_file(file)


@pytest.mark.parametrize(
    ("name", "kept"),
    [*((each, "fp32") for each in NAMES), ("decoupled_lionw", "bf16_sr"), ("muon", "bf16_sr"), ("adamw", "fp32_split")],
)
def test_a_run_with_groups_keeps_frozen_weights_and_resumes_bitwise(tmp_path: Path, name: str, kept: str) -> None:
    optimizer = {"optimizer": {"name": name, "lr": 0.01, "master_weights": kept} | GROUPED}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tiny_run(tmp_path) | RUN | optimizer))
    assert train_main([str(file)]) == 0
    halves = [str(file), f"save_folder={tmp_path / 'halves'}"]
    assert train_main([*halves, "max_duration=3ba"]) == 0
    first = weights(tmp_path / "halves")
    assert train_main([*halves, "autoresume=true"]) == 0
    whole, resumed = weights(tmp_path / "run"), weights(tmp_path / "halves")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    changed = {key for key in whole if not torch.equal(whole[key], first[key])}
    frozen = {key for key in whole if "wte" in key or "blocks.0.ffn.experts" in key}
    assert frozen and changed == whole.keys() - frozen
    half = {key for key in whole if whole[key].dtype == torch.bfloat16}
    assert half == {"fp32": set(), "fp32_split": frozen, "bf16_sr": whole.keys()}[kept]
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    classes = ("AdamW", "DecoupledAdamW", "DecoupledLionW", "Muon")
    kind = dict(zip(NAMES, classes, strict=True))[name]
    assert (line[f"lr-{kind}/group0"], line[f"lr-{kind}/group1"]) == (0.01, 0.002)


@pytest.mark.dist
def test_two_ranks_train_the_groups_as_one_does(tmp_path: Path) -> None:
    files = []
    for name, more in (("one", {}), ("two", {"parallel": {"expert": 2}})):
        own = {"optimizer": {"name": "adamw", "lr": 0.01} | GROUPED, "save_folder": str(tmp_path / name)}
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump(tiny_run(tmp_path) | RUN | own | more))
    assert train_main([str(files[0])]) == 0
    command = [*forks.TORCHRUN, "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = str(ROOT / "scripts" / "train.py")
    done = forks.run(*command, script, str(files[1]), env=environment)
    assert done.returncode == 0, done.stderr
    losses = []
    for name in ("one", "two"):
        text = (tmp_path / name / "metrics.jsonl").read_text()
        losses.append([json.loads(line)["loss/train/ce"] for line in text.splitlines()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0][-1] < losses[0][0]
