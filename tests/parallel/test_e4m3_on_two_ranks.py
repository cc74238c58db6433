"""`precision: amp_fp8` on every kind of mesh, on a CPU: there the plain references stand for the kernels."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny import Case
from torch import Tensor

from llmfoundry.config import check, dump
from llmfoundry.layers.scaled import ScaledLinear
from llmfoundry.model.transformer import CausalLM, CausalLMConfig
from llmfoundry.moe.layer import Experts
from llmfoundry.parallel.e4m3 import use_e4m3

pytest.importorskip("triton")
pytestmark = pytest.mark.dist
STEPS = 3
CASES = [
    Case("shard 2"),
    Case("shard 2, expert 2, full", {"expert": 2, "recompute": "full"}),
    Case("replicate 2, selective, microbatch 2", {"replicate": 2, "recompute": "selective"}, microbatch=2),
    Case("shard 2, expert 2, bf16_sr", {"expert": 2}, half=True),
]
ALONE = [
    Case("alone, full", {"recompute": "full"}),
    Case("alone, selective", {"recompute": "selective"}),
]


def model_config(case: Case, hidden: int = 32) -> CausalLMConfig:
    """Sizes that products of e4m3 take, and experts without biases."""
    keys = dump(tiny.model_config(case)) | {"no_bias": True}
    keys["ffn_config"] |= {"ffn_hidden_size": hidden, "dense_ffn_hidden_size": 32, "bias": False}
    return check(CausalLMConfig, keys)


def build(case: Case, precision: str) -> CausalLM:
    config = model_config(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "model_config", lambda _: config)
        return tiny.build(case, torch.float32, precision)


def learn(case: Case, precision: str = "amp_fp8") -> dict[str, Tensor]:
    results = tiny.train(build(case, precision), case, STEPS, 1.0)
    return {name: torch.stack([getattr(step, name) for step in results]).double() for name in ("ce", "grad_norm")}


def job(folder: Path) -> None:
    for case in CASES:
        found = learn(case)
        if dist.get_rank() == 0:
            torch.save(found, folder / f"{case.name}.pt")


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("e4m3")
    run_ranks([2], job, folder)
    return folder


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    return learn(Case("alone"))


def test_the_layers_of_blocks_compute_in_e4m3_and_nothing_else() -> None:
    model, plain = (build(Case("alone"), precision) for precision in ("amp_fp8", "amp_bf16"))
    scaled = {name for name, module in model.named_modules() if isinstance(module, ScaledLinear)}
    linear = {name for name, module in model.blocks.named_modules() if type(module) is ScaledLinear}
    assert {name.removeprefix("blocks.") for name in scaled} == linear
    assert {name.rsplit(".", 1)[1] for name in linear} == {"wqkv", "out_proj", "w1", "w2"}
    assert all(module.e4m3 for module in model.modules() if isinstance(module, Experts))
    assert list(model.state_dict()) == list(plain.state_dict()), "a checkpoint has other names"


@pytest.mark.parametrize("case", ALONE, ids=[case.name for case in ALONE])
def test_recompute_changes_nothing(case: Case, alone: dict[str, Tensor]) -> None:
    for name, value in learn(case).items():
        assert torch.equal(value, alone[name]), name


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_every_mesh_learns_alike(case: Case, spread: Path, alone: dict[str, Tensor]) -> None:
    """Rows have their own scales, wherever they are; what differs is bf16's noise, and the choice of experts by it."""
    found, true = torch.load(spread / f"{case.name}.pt", weights_only=True), learn(Case("alone"), "amp_bf16")
    alone = learn(Case("alone", half=True)) if case.half else alone  # its noise is larger than that of a mesh
    torch.testing.assert_close(found["ce"], alone["ce"], rtol=2e-2, atol=0)
    torch.testing.assert_close(found["grad_norm"], alone["grad_norm"], rtol=1e-1, atol=0)
    torch.testing.assert_close(found["ce"], true["ce"], rtol=3e-2, atol=0)
    assert not torch.equal(found["ce"], true["ce"]), "computed in bfloat16"


def test_layers_that_cannot_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    with torch.device("meta"):
        model = model_config(Case("alone"), hidden=24).build()
    with caplog.at_level(logging.WARNING):
        use_e4m3(model.blocks)
    said = [record.message for record in caplog.records]
    assert len(said) == len(set(said)) == 2, said  # experts, and w2 of the shared expert
    assert "precision: amp_fp8 leaves ffn.experts in bfloat16" in "\n".join(said)
    assert "are not multiples of 16" in said[0]
