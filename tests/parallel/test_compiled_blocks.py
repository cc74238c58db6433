"""Compiled blocks train as plain ones do: in one process, split, with experts divided, and recomputed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
from ranks import run_ranks
from tiny import Case
from torch import Tensor
from torch._dynamo.utils import counters

from llmfoundry.config import check, dump
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.moe.layer import MoE
from llmfoundry.parallel.apply import materialize, parallelize
from llmfoundry.parallel.mesh import ParallelConfig, build_mesh

NO_COMPILER = not any(map(shutil.which, ("g++", "clang++")))
pytestmark = [
    pytest.mark.dist,
    pytest.mark.slow,
    pytest.mark.skipif(NO_COMPILER, reason="compiling for a CPU needs a C++ compiler"),
]
STEPS = 3
PLAIN = Case("plain")
RECOMPUTE = ("none", "full", "selective")
ALONE = [Case(f"alone, {how}", {"compile": True, "recompute": how}) for how in RECOMPUTE]
SPREAD = [
    Case("shard 2, full", {"compile": True, "recompute": "full"}),
    *(Case(f"shard 2, expert 2, {how}", {"compile": True, "expert": 2, "recompute": how}) for how in RECOMPUTE),
]


def learn(case: Case, steps: int = STEPS, precision: str = "fp32") -> dict[str, Tensor]:
    """Losses, gradient norms and the last weights, which are float32."""
    model = tiny.build(case, torch.float32, precision)
    results = tiny.train(model, case, steps, 1.0)
    curve = {name: torch.stack([getattr(step, name) for step in results]).double() for name in ("total", "grad_norm")}
    return curve | tiny.weights(model)


def job(folder: Path) -> None:
    for case in SPREAD:
        found = learn(case)
        if torch.distributed.get_rank() == 0:
            torch.save(found, folder / f"{case.name}.pt")


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """No code compiled by another test, and none left to others."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def true() -> dict[str, Tensor]:
    return learn(PLAIN)


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    run_ranks([2], job, folder)
    return folder


def assert_same(found: dict[str, Tensor], true: dict[str, Tensor]) -> None:
    assert found.keys() == true.keys()
    for name, value in true.items():
        # float32; fused code rounds otherwise, and Adam divides what is nearly zero by its own size.
        tolerance = 1e-5 if name in ("total", "grad_norm") else 2e-3
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("case", ALONE, ids=[case.name for case in ALONE])
def test_a_compiled_model_learns_the_same(case: Case, true: dict[str, Tensor]) -> None:
    assert_same(learn(case), true)


@pytest.mark.parametrize("case", SPREAD, ids=[case.name for case in SPREAD])
def test_a_compiled_model_learns_the_same_when_spread(case: Case, spread: Path, true: dict[str, Tensor]) -> None:
    assert_same(torch.load(spread / f"{case.name}.pt", weights_only=True), true)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_a_block_with_the_triton_kernels_is_one_graph(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    whole = tiny.model_config

    def with_experts(impl: str) -> None:
        keys = dump(whole(PLAIN)) | {"no_bias": True}
        keys["ffn_config"] |= {"moe_impl": impl, "bias": False}
        monkeypatch.setattr(tiny, "model_config", lambda case: check(CausalLMConfig, keys))

    with_experts("grouped_mm")
    true = learn(PLAIN, steps=1)
    with_experts("triton")
    assert_same(learn(Case("triton", {"compile": True, "recompute": recompute}), steps=1), true)
    assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]


def test_layers_of_one_kind_share_their_constants() -> None:
    """torch.compile guards the kind of a layer's experts by identity: another object is another graph."""
    model = tiny.model_config(PLAIN).build()
    kinds = [block.ffn.experts.kind for block in model.blocks if isinstance(block.ffn, MoE)]
    assert len(kinds) > 1 and all(kind is kinds[0] for kind in kinds)


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("dense", [True, False], ids=["one graph", "parts"])
def test_a_process_alone_casts_weights_for_compiled_blocks(
    recompute: str, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = dump(tiny.model_config(PLAIN))
    if dense:
        keys["ffn_config"] = {"ffn_type": "mptglu", "ffn_hidden_size": 24, "ffn_act_fn": {"name": "silu"}}
    monkeypatch.setattr(tiny, "model_config", lambda case: check(CausalLMConfig, keys))
    true, found = (learn(case, 2, "amp_bf16") for case in (PLAIN, Case("c", {"compile": True, "recompute": recompute})))
    # bf16 has eight bits, and fused code rounds where plain code does not; Adam's first step makes much of that.
    torch.testing.assert_close(found["total"], true["total"], rtol=5e-3, atol=0)
    torch.testing.assert_close(found["grad_norm"][0], true["grad_norm"][0], rtol=5e-3, atol=0)


def test_many_kinds_of_blocks_are_all_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, dense layers and mixtures make more kinds than torch's limit of 8 for one function."""
    keys = dump(tiny.model_config(PLAIN)) | {"n_layers": 12, "attn_window_pattern": [3, 4, 5, -1, 6]}
    keys["ffn_config"] |= {"moe_impl": "reference", "first_k_dense": 1, "moe_layer_freq": 2}
    keys["attn_config"] |= {"sliding_window_size": -1}
    config = check(CausalLMConfig, keys)
    compile_as_it_is = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compile_as_it_is(f, backend="eager"))
    with torch.device("meta"):
        model = config.build()
    parallel = ParallelConfig(compile=True)
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    with torch._dynamo.config.patch(recompile_limit=2):  # as if there were four times as many kinds
        model = materialize(parallelize(model, build_mesh(parallel, "cpu", 0), parallel, "fp32"), parallel, 1)
        for training in (True, False):
            model.train(training)
            model(tokens, tokens, keys=torch.arange(2)).loss_sum.backward()
    frames = counters["frames"]
    assert frames["total"] > 2 and frames["ok"] == frames["total"]
    assert not counters["unimplemented"], "no limit was hit"
