"""The plan of a run against the real thing: full-size models, built and split on the fake process group of any size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from llmfoundry.cli import read_config
from llmfoundry.config import ConfigError
from llmfoundry.model.config import CausalLMConfig
from llmfoundry.parallel.apply import parallelize
from llmfoundry.parallel.mesh import Degrees, ParallelConfig, build_mesh
from llmfoundry.parallel.plan import GIB, describe, memory, traffic

ROOT = Path(__file__).resolve().parents[2]


def model_of(name: str) -> CausalLMConfig:
    model = read_config(str(ROOT / "yamls" / f"{name}.yaml"), []).model
    assert isinstance(model, CausalLMConfig)
    return model


@pytest.fixture
def world(request: pytest.FixtureRequest) -> Iterator[int]:
    dist.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


CASES = [
    ("olmoe-1b-7b", 8, ParallelConfig()),
    ("olmoe-1b-7b", 8, ParallelConfig(expert=8)),
    ("mixtral-8x7b", 64, ParallelConfig(replicate=2, expert=8)),
    ("dbrx-132b", 256, ParallelConfig(replicate=4, expert=16)),
    ("qwen3-30b-a3b", 512, ParallelConfig(replicate=8, expert=8)),
]


@pytest.mark.parametrize(("name", "world", "parallel"), CASES, indirect=["world"])
def test_each_rank_holds_what_was_foretold(name: str, world: int, parallel: ParallelConfig) -> None:
    model = model_of(name)
    mesh = build_mesh(parallel, "cpu", model.ffn_config.moe_num_experts)
    with torch.device("meta"):
        built = model.build()
    parallelize(built, mesh, parallel, "amp_bf16")
    held = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in built.parameters())
    foretold = memory(model, parallel, mesh.degrees, tokens=4096, compute_bytes=2)
    # Rank 0 also holds the rows by which a dim does not divide.
    assert held * 4 == pytest.approx(foretold.weights, rel=0.01)
    assert foretold.optimizer == 2 * foretold.gradients == 2 * foretold.weights


def test_recompute_holds_less_and_only_activations_change() -> None:
    model, degrees = model_of("olmoe-1b-7b"), Degrees(1, 8, 1)
    modes = [memory(model, ParallelConfig(recompute=mode), degrees, 4096, 2) for mode in ("none", "full")]
    assert modes[0].activations > 5 * modes[1].activations > 0
    assert modes[0]._replace(activations=0) == modes[1]._replace(activations=0)


def test_activations_are_at_least_x_and_h_of_each_mixture() -> None:
    model, tokens = model_of("olmoe-1b-7b"), 4096
    held = memory(model, ParallelConfig(), Degrees(1, 8, 1), tokens, 2).activations
    x_and_h = 16 * tokens * (2048 + 8 * 2 * 1024) * 2
    assert x_and_h < held < 1.7 * x_and_h, "the rest is attention's"


def test_tokens_travel_only_with_expert_parallelism_and_at_most_once_a_rank() -> None:
    model, tokens = model_of("olmoe-1b-7b"), 4096

    def sent(expert: int) -> float:
        return traffic(model, ParallelConfig(expert=expert), Degrees(1, 8, expert), tokens, 1, 2).tokens

    assert sent(1) == 0.0
    every_slot = 4 * 16 * tokens * 8 * 2048 * 2  # there and back, twice, 16 layers, 8 slots a token
    assert 0 < sent(2) < sent(8) < every_slot * 7 / 8
    assert sent(2) == pytest.approx(4 * 16 * tokens * 0.5 * 2 * (1 - 0.5**8) * 2048 * 2)


def test_replicas_receive_only_gradients_of_each_other() -> None:
    model = model_of("olmoe-1b-7b")
    alone = traffic(model, ParallelConfig(), Degrees(1, 8, 1), 4096, 1, 2)
    twice = traffic(model, ParallelConfig(replicate=2), Degrees(2, 8, 1), 4096, 1, 2)
    assert alone.replicate == 0 and twice.replicate == pytest.approx(model.n_params() / 8 * 4)
    assert twice._replace(replicate=0.0) == alone


def test_the_description_names_the_mesh_and_adds_up() -> None:
    text = describe(model_of("dbrx-132b"), ParallelConfig(expert=8), world=64, global_rows=1024, micro_rows=1,
                    seq_len=4096)  # fmt: skip
    assert "replicate 1 x shard 64, expert 8" in text and "16 rows each in microbatches of 1" in text
    sizes = {line.split()[0]: float(line.split()[-2]) for line in text.splitlines() if line.endswith("GiB")}
    assert sizes["weights"] == pytest.approx(131.6e9 / 64 * 4 / GIB, abs=0.02)
    with pytest.raises(ConfigError, match="does not divide"):
        describe(model_of("dbrx-132b"), ParallelConfig(expert=8), world=60, global_rows=60, micro_rows=1, seq_len=64)
