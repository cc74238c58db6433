"""Adapters on two ranks, with and without experts divided: the same gradients, curve and file as in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from tiny import Case
from torch import Tensor

from llmfoundry.config import check, dump
from llmfoundry.layers.lora import is_adapter
from llmfoundry.model.adapters import PeftPart, folded, load_peft, save_peft
from llmfoundry.model.transformer import CausalLMConfig

pytestmark = pytest.mark.dist

STEPS = 6
CASES = [
    Case("shard 2", microbatch=4),
    Case("shard 2, expert 2", {"expert": 2}),
    Case("shard 2, expert 2, full", {"expert": 2, "recompute": "full"}, microbatch=2),
    Case("shard 2, tied, full", {"recompute": "full"}, tied=True),
    Case("shard 2, 3 experts", n_experts=3),  # 3 do not divide among 2 ranks: cut through each
]


def _alone(case: Case) -> Case:
    return Case("alone", n_experts=case.n_experts, tied=case.tied)


def _config(case: Case, whole: Callable[[Case], CausalLMConfig] = tiny.model_config) -> CausalLMConfig:
    keys = dump(whole(case))
    keys["ffn_config"] |= {"moe_bias_update_rate": 0.0}
    return check(CausalLMConfig, keys | {"lora": {"rank": 2, "alpha": 8.0}})


def _names(name: str) -> list[PeftPart]:
    if name.endswith("wqkv"):
        return [PeftPart(f"{name}.q", slice(0, 16)), PeftPart(f"{name}.kv", slice(16, None))]
    return [PeftPart(name)]


def _learn(case: Case, folder: Path) -> dict[str, Tensor]:
    """Gradients of the first step, the losses, the adapters' files, and the weights after it all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "model_config", _config)
        model = tiny.build(case, torch.float64)
    found = tiny.train_adapters(model, case, STEPS)
    save_peft(model, folder / case.name, _names)
    found |= {f"file/{k}": v for k, v in load_file(folder / case.name / "adapter_model.safetensors").items()}
    found |= {f"folded/{name}": value.clone() for name, value in folded(model)}
    before = tiny.weights(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.fill_(5)
    load_peft(model, folder / case.name, _names)
    assert all(torch.equal(value, before[name]) for name, value in tiny.weights(model).items())
    return found


def job(folder: Path) -> None:
    """What each process does; the first one writes what they found."""
    for case in CASES:
        found = _learn(case, folder)
        if torch.distributed.get_rank() == 0:
            torch.save(found, folder / f"{case.name}.pt")


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    run_ranks([2], job, folder)
    return folder


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_adapters_learn_the_same_on_every_mesh(case: Case, spread: Path, tmp_path: Path) -> None:
    true, ours = _learn(_alone(case), tmp_path), torch.load(spread / f"{case.name}.pt", weights_only=True)
    assert true.keys() == ours.keys() and sum(name.startswith("grad/") for name in true) == 2 * (2 * 3 + 2 + 5 * 2)
    assert true["loss"][-1] < true["loss"][0]
    for name, value in true.items():
        # A loss is float32; weights come after six steps of Adam, which magnifies what is nearly zero.
        tolerance = {"loss": 1e-6}.get(name, 1e-12 if name.startswith("grad/") else 1e-10)
        torch.testing.assert_close(
            ours[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )
