"""The plan of a run against the real thing: full-size models, built and split on the fake process group of any size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from llmfoundry.cli.command import read_config
from llmfoundry.config import ConfigError
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.parallel import hardware
from llmfoundry.parallel.apply import parallelize
from llmfoundry.parallel.hardware import GIB
from llmfoundry.parallel.memory import memory
from llmfoundry.parallel.mesh import Degrees, ParallelConfig, build_mesh, plan_mesh
from llmfoundry.parallel.plan import Link, Work, plan, traffic
from llmfoundry.parallel.report import describe, meshes

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
    assert foretold.optimizer == 2 * foretold.weights


def test_recompute_keeps_less() -> None:
    model, degrees = model_of("olmoe-1b-7b"), Degrees(1, 8, 1)
    modes = [memory(model, ParallelConfig(recompute=mode), degrees, 32768, 2) for mode in ("none", "selective", "full")]
    none, selective, full = modes
    assert none.total > selective.total > full.total
    assert none.weights == selective.weights == full.weights


def test_tokens_travel_only_with_expert_parallelism_and_at_most_once_a_rank() -> None:
    model, work = model_of("olmoe-1b-7b"), Work(1, 1, 4096)

    def sent(expert: int, **keys: str) -> Link:
        return traffic(model, ParallelConfig(expert=expert, **keys), Degrees(1, 8, expert), work).tokens

    assert sent(1).total == 0.0
    every_slot = 4 * 16 * 4096 * 8 * 2048 * 2  # there and back, twice, 16 layers, 8 slots a token
    assert 0 < sent(2).total < sent(8).total < every_slot * 7 / 8
    assert sent(2).total == pytest.approx(4 * 16 * 4096 * 0.5 * 2 * (1 - 0.5**8) * 2048 * 2)
    assert sent(8, recompute="full").total == 1.5 * sent(8).total, "the way there and back is taken again"


def test_replicas_receive_only_gradients_of_each_other() -> None:
    model, work = model_of("olmoe-1b-7b"), Work(1, 1, 4096)
    alone = traffic(model, ParallelConfig(), Degrees(1, 8, 1), work)
    twice = traffic(model, ParallelConfig(replicate=2), Degrees(2, 8, 1), work)
    assert alone.replicate.total == 0 and twice.replicate == Link(0.0, pytest.approx(model.n_params() / 8 * 4))
    assert twice._replace(replicate=alone.replicate) == alone


def test_whole_experts_are_not_gathered() -> None:
    model, work = model_of("mixtral-8x7b"), Work(1, 1, 4096)
    divided = traffic(model, ParallelConfig(), Degrees(1, 8, 8), work)
    split = traffic(model, ParallelConfig(), Degrees(1, 8, 1), work)
    experts = 32 * 8 * 3 * 4096 * 14336
    assert split.gather.total - divided.gather.total == pytest.approx(2 * experts * 2 * 7 / 8)
    assert split.reduce.total - divided.reduce.total == pytest.approx(experts * 4 * 7 / 8)


def test_a_ring_enters_a_node_once() -> None:
    model, work = model_of("olmoe-1b-7b"), Work(1, 1, 4096)
    node = traffic(model, ParallelConfig(), Degrees(1, 8, 1), work).gather
    nodes = traffic(model, ParallelConfig(), Degrees(1, 16, 1), work).gather
    assert node.network == 0
    whole = node.total * 8 / 7
    assert nodes.total == pytest.approx(whole * 15 / 16)
    assert nodes.network == pytest.approx(whole / 2 / 8), "half is on the other node, and eight GPUs fetch it"


def test_the_longer_of_compute_and_gathering_counts() -> None:
    model = model_of("mixtral-8x7b")
    short = plan(model, ParallelConfig(), Degrees(1, 64, 1), Work(1, 1, 512)).time
    assert short.communication > short.compute
    assert short.total == short.communication + short.update and short.exposed == short.communication - short.compute
    long = plan(model, ParallelConfig(), Degrees(1, 64, 1), Work(8, 8, 4096)).time
    assert long.exposed == 0 and long.total == long.compute + long.update
    full = plan(model, ParallelConfig(recompute="full"), Degrees(1, 64, 1), Work(8, 8, 4096)).time
    assert 1.25 * long.compute < full.compute < 4 / 3 * long.compute, "all but the head once more"


def test_rates_of_experts_are_the_measured_ones_and_between() -> None:
    assert hardware.experts_flops(2048, 1024) == 505e12
    assert hardware.experts_flops(4096, 14336) == pytest.approx(627e12)
    assert 505e12 < hardware.experts_flops(4096, 1536) < 627e12
    assert hardware.experts_flops(512, 64) == 461e12 and hardware.experts_flops(8192, 65536) == 637e12


MEASURED = json.loads((ROOT / "scripts" / "bench" / "results" / "train_step.json").read_text())["rows"]


@pytest.mark.parametrize("name", MEASURED)
def test_the_estimate_is_near_a_measured_step(name: str) -> None:
    """OLMoE on one and two H100."""
    row = MEASURED[name]
    config = read_config(str(ROOT / row["yaml"]), row["overrides"])
    assert isinstance(config.model, CausalLMConfig) and config.model.n_params() == row["parameters"]
    degrees = plan_mesh(config.parallel, row["devices"], 64)
    work = Work(row["global_rows"] // row["devices"], row["microbatch_rows"], row["sequence"])
    found = plan(config.model, config.parallel, degrees, work)
    assert found.tokens_per_second == pytest.approx(row["tokens_per_second_per_device"], rel=0.12)
    assert found.memory.total == pytest.approx(row["peak_gib"] * GIB, rel=0.02)


def described(name: str, world: int, rows: int, micro: int, gpu_memory: float = 79 * GIB, **parallel: object) -> str:
    return describe(model_of(name), ParallelConfig.model_validate(parallel), world=world, global_rows=rows,
                    micro_rows=micro, seq_len=4096, gpu_memory=gpu_memory)  # fmt: skip


def test_the_description_names_the_mesh_and_adds_up() -> None:
    text = described("dbrx-132b", 64, 1024, 1, expert=8)
    assert "replicate 1 x shard 64, expert 8" in text and "16 rows each in microbatches of 1" in text
    sizes = {line.split()[0]: float(line.split()[-2]) for line in text.splitlines() if line.endswith("GiB")}
    assert sizes["weights"] == pytest.approx(131.6e9 / 64 * 4 / GIB, abs=0.02)
    kinds = ("weights", "gradients", "optimizer", "gathered", "activations", "temporaries")
    assert sum(sizes[kind] for kind in kinds) == pytest.approx(sizes["in"], abs=0.05)
    with pytest.raises(ConfigError, match="does not divide"):
        described("dbrx-132b", 60, 60, 1, expert=8)


def test_one_gpu_fits_or_not_and_has_no_table() -> None:
    text = described("olmoe-1b-7b", 1, 4, 4)
    assert "does not fit: " in text and "of 74.0 GiB (79, of which 5 are kept free)" in text
    assert "take another mesh, or more GPUs" in text and "meshes of" not in text
    assert "fits: " in described("olmoe-1b-7b", 1, 4, 4, gpu_memory=180 * GIB)


def test_what_does_not_fit_is_told_what_to_change() -> None:
    text = described("olmoe-1b-7b", 2, 8, 4)
    assert "does not fit" not in text.split("meshes of")[0], "FSDP over two GPUs holds it"
    text = described("olmoe-1b-7b", 2, 16, 8)
    verdict = text.split("meshes of")[0]
    assert "does not fit" in verdict and "would fit on this mesh with parallel.recompute=selective (" in verdict
    assert "device_train_microbatch_size" in verdict
    text = described("dbrx-132b", 64, 1024, 1, expert=8)  # sixteen microbatches leave whole gradients
    assert "parallel.reduce_once_a_step=false" in text.split("meshes of")[0]


def test_the_table_marks_the_fastest_that_fits_and_the_one_asked_for() -> None:
    text = described("qwen3-30b-a3b", 16, 64, 1, replicate=2, expert=4, reduce_once_a_step=False)
    lines = text.split("meshes of")[1].splitlines()[2:]
    assert sum(line[1] == ">" for line in lines) == 1 and sum(line[2] == "*" for line in lines) == 1
    asked, fastest = (next(line for line in lines if line[at] == mark) for at, mark in ((1, ">"), (2, "*")))
    assert asked[3:].split()[:3] == ["2", "8", "4"]
    fitting = [float(line[3:].split()[6]) for line in lines if line.endswith("  fits")]
    assert float(fastest[3:].split()[6]) == min(fitting) == fitting[0]
    assert len(lines) <= 11


def test_meshes_divide_the_gpus_the_node_and_the_experts() -> None:
    assert Degrees(8, 8, 8) in meshes(128, 64) and Degrees(1, 64, 1) in meshes(128, 64)
    assert meshes(0, 8) == [Degrees(1, 8, 1), Degrees(2, 4, 1), Degrees(4, 2, 1), Degrees(8, 1, 1)]
    for world in (1, 2, 6, 8, 12, 64, 512):
        for degrees in meshes(16, world):
            asked = ParallelConfig(replicate=degrees.replicate, expert=degrees.expert)
            assert plan_mesh(asked, world, 16) == degrees and degrees.expert <= 8


def test_a_gpu_smaller_than_what_is_kept_free_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--gpu-memory 4: 5 GiB of it are kept free; write more"):
        described("olmoe-1b-7b", 8, 8, 1, gpu_memory=4 * GIB)
