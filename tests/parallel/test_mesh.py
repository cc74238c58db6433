"""Mesh arithmetic by numbers alone, and torch's meshes on the fake process group: no hardware."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from llmfoundry.config import ConfigError, check
from llmfoundry.parallel.mesh import Degrees, Mesh, ParallelConfig, build_mesh, plan_mesh, settled_exchange


class Coordinates(NamedTuple):
    """Where one rank stands on every axis."""

    replicate: int
    shard: int
    expert_shard: int
    expert: int


def coordinates(degrees: Degrees, rank: int) -> Coordinates:
    """Ranks are numbered with ep innermost, then efsdp, then dp_replicate."""
    replica, shard = divmod(rank, degrees.shard)
    return Coordinates(replica, shard, *divmod(shard, degrees.expert))


def degrees_of(world: int) -> Iterator[Degrees]:
    """Every (replicate, shard, expert) with powers of two."""
    powers = [2**i for i in range(world.bit_length())]
    for replicate in powers:
        for expert in powers:
            if replicate * expert <= world:
                yield Degrees(replicate, world // replicate, expert)


def config_of(degrees: Degrees) -> ParallelConfig:
    return ParallelConfig(replicate=degrees.replicate, shard=degrees.shard, expert=degrees.expert)


@pytest.mark.parametrize("world", [2**i for i in range(13)] + [6, 96])
def test_degrees_that_fit_are_taken_as_they_are(world: int) -> None:
    for degrees in degrees_of(world) if world & (world - 1) == 0 else [Degrees(2, world // 2, world // 2)]:
        assert plan_mesh(config_of(degrees), world, 4096 if world & (world - 1) == 0 else world) == degrees


def test_shard_minus_one_is_processes_over_replicas() -> None:
    assert plan_mesh(ParallelConfig(replicate=4, expert=8), 128, 64) == Degrees(4, 32, 8)


# (replicate, expert) of each world
MESHES = {
    1: [(1, 1)],
    8: [(1, 1), (1, 2), (1, 8), (2, 2), (2, 4), (8, 1)],
    64: [(2, 8), (8, 8)],
    4096: [(32, 16)],
}


@pytest.fixture
def fake_world(request: pytest.FixtureRequest) -> Iterator[tuple[int, int]]:
    world, rank = request.param
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    yield world, rank
    dist.destroy_process_group()


@pytest.mark.parametrize("fake_world", [(1, 0), (8, 5), (64, 63), (4096, 2741)], indirect=True)
def test_torch_meshes_agree_with_the_arithmetic(fake_world: tuple[int, int]) -> None:
    world, rank = fake_world
    for replicate, expert in MESHES[world]:
        mesh = build_mesh(ParallelConfig(replicate=replicate, expert=expert), "cpu", 128)
        assert (mesh.data_rank, mesh.data_ranks) == (rank, world)
        where = coordinates(mesh.degrees, rank)
        assert mesh.dense is not None
        assert mesh.dense.get_local_rank("fsdp") == where.shard
        if replicate > 1:
            assert mesh.dense.get_local_rank("dp_replicate") == where.replicate
        if expert == 1:
            assert mesh.sparse is None and mesh.expert_group is None and mesh.expert_shards is None
            continue
        assert mesh.experts is not None and mesh.expert_shards is not None
        assert mesh.experts.get_local_rank() == where.expert
        assert mesh.expert_shards.get_local_rank("efsdp") == where.expert_shard
        names = ("dp_replicate", "efsdp") if replicate > 1 else ("efsdp",)
        assert mesh.expert_shards.mesh_dim_names == names
        neighbours = list(range(rank - where.expert, rank - where.expert + expert))
        assert mesh.experts.mesh.tolist() == neighbours


def test_one_process_without_a_group_has_no_axes() -> None:
    mesh = build_mesh(ParallelConfig(), "cpu", 8)
    assert mesh == Mesh(Degrees(1, 1, 1), None, None, 0, 1)
    assert mesh.experts is None and mesh.expert_group is None


@pytest.mark.parametrize(
    ("settings", "world", "n_experts", "says"),
    [
        ({"replicate": 2, "shard": 3}, 8, 8, "is 6, but there are 8 processes"),
        ({"replicate": 3}, 8, 8, "parallel.replicate=3 does not divide the 8 processes"),
        ({"expert": 3}, 8, 9, "parallel.expert=3 does not divide parallel.shard=8"),
        ({"replicate": 4, "expert": 4}, 8, 8, "parallel.expert=4 needs at least 16 processes, this run has 8"),
        ({"expert": 4}, 8, 6, "parallel.expert=4 does not divide model.ffn_config.moe_num_experts=6"),
        ({"expert": 16}, 16, 8, "moe_num_experts=8"),
        ({"expert": 2}, 8, 0, "the model is dense or a module of transformers; set expert: 1"),
        ({"shard": 8}, 1, 0, "is 8, but there are 1 processes"),
    ],
)
def test_degrees_that_do_not_fit_are_a_mistake_in_the_config(
    settings: dict[str, int], world: int, n_experts: int, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        plan_mesh(check(ParallelConfig, settings), world, n_experts)


@pytest.mark.parametrize("settings", [{"shard": 0}, {"shard": -2}, {"replicate": 0}, {"expert": 0}])
def test_what_is_not_a_degree_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        check(ParallelConfig, settings)


def test_tokens_are_gathered_only_where_every_rank_has_as_many_rows() -> None:
    for way in ("auto", "gather", "all_to_all"):
        asked = ParallelConfig(expert=2, exchange_tokens=way)
        assert settled_exchange(asked, 12, 4) == asked
        if way != "gather":
            assert settled_exchange(asked, 13, 4) == ParallelConfig(expert=2, exchange_tokens="all_to_all")
    with pytest.raises(ConfigError, match=r"exchange_tokens=gather .* global_train_batch_size=13 is not a multiple of"):
        settled_exchange(ParallelConfig(expert=2, exchange_tokens="gather"), 13, 4)
    alone = ParallelConfig(exchange_tokens="gather")
    assert settled_exchange(alone, 13, 4) == alone, "without divided experts nothing is exchanged"
