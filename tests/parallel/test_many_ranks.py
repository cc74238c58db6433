"""What the machinery costs one process at 4,096 ranks: bars, on a fake process group and on many small processes."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

from llmfoundry import runtime
from llmfoundry.checkpoint.index import Box, index_of
from llmfoundry.checkpoint.storage import SavePlan, plan_save
from llmfoundry.config import ConfigError
from llmfoundry.parallel.mesh import Degrees
from llmfoundry.tree import FANOUT, levels
from tests.parallel.ranks import free_port

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts" / "bench"))
from many_ranks import Costs, as_rank, box_of, boxes_of_all, costs, tensors_of  # noqa: E402

FEW = "model.n_layers=2"


@pytest.fixture(scope="module")
def found() -> dict[int, Costs]:
    """Of DBRX's shapes with two layers: layers of one shape share what grows with ranks."""
    return {degrees.replicate * degrees.shard: costs(degrees, FEW) for degrees in MESHES}


MESHES = [Degrees(4, 128, 8), Degrees(32, 128, 8)]


def test_an_index_and_its_parsing_do_not_grow_with_ranks(found: dict[int, Costs]) -> None:
    """At 512 shards it was 50 MB, and 18 s in each rank."""
    for cost in found.values():
        assert cost.index_bytes < 100_000 and cost.told_bytes < 2_000 and cost.header_bytes < 20_000
        assert cost.manifest_bytes < 500 * cost.ranks
        assert cost.index_seconds < 2 and cost.read_seconds < 2 and cost.find_seconds < 2 and cost.plan_seconds < 2


def test_each_rank_writes_its_part_of_what_replicas_hold_alike(found: dict[int, Costs]) -> None:
    full = costs(Degrees(4, 16, 8), "model.n_layers=8")
    assert full.staged_share < 1.2
    # Of few tensors, the largest is one replica's: an even share cannot be had.
    assert all(
        cost.files <= 2 * cost.ranks // 128 + 1 and cost.files_on_half <= cost.files + 4 for cost in found.values()
    )


@pytest.mark.parametrize("degrees", [Degrees(1, 24, 8), Degrees(2, 16, 4), Degrees(3, 10, 2)], ids=str)
def test_ranks_write_every_element_once_and_none_asks_another(degrees: Degrees) -> None:
    world = degrees.replicate * degrees.shard

    def plan_of(rank: int) -> tuple[SavePlan, dict[str, Box]]:
        with as_rank(rank, world):
            tensors = tensors_of(degrees, FEW)
            at = {name: Box(rank, *box_of(each, rank)) for name, each in tensors.items() if isinstance(each, DTensor)}
            return plan_save(tensors), at

    with as_rank(0, world):
        _, layouts, _ = boxes_of_all(tensors_of(degrees, FEW), degrees)
    boxes = [{box.rank: box for box in each} for each in layouts]
    # In a thread for each: torch takes meshes of one thread for equal, and reads the rank from the first.
    threads = [(rank, ThreadPoolExecutor(1)) for rank in (0, 1, world // 2, world - 1)]
    for rank, thread in threads:
        plan, at = thread.submit(plan_of, rank).result()
        assert [each.get(rank) for each in boxes] == plan.boxes
        assert all(at.get(name, box) == box for name, box in _written(plan, rank).items())
    index_of(plan.tensors, layouts)  # raises if boxes overlap or leave a part out


def _written(plan: SavePlan, rank: int) -> dict[str, Box]:
    return {part.name: Box(rank, part.offsets, tuple(part.tensor.shape)) for part in plan.parts}


@pytest.mark.parametrize("world", [1, 2, 15, 16, 17, 255, 256, 257, 4096])
def test_a_tree_has_all_ranks_and_few_connections(world: int) -> None:
    groups = [levels(rank, world) for rank in range(world)]
    assert max((sum(len(ranks) - 1 for ranks in own) for own in groups), default=0) <= 3 * (FANOUT - 1)
    assert max(map(len, groups)) <= 3
    for rank, own in enumerate(groups):
        assert all(rank in ranks and ranks in groups[ranks[0]] for ranks in own)
        assert all(ranks[0] == rank for ranks in own[:-1])
    reached = {0}
    for own in reversed(groups[0]):
        reached |= {each for first in reached for ranks in groups[first] if ranks.step == own.step for each in ranks}
    assert reached == set(range(world)), "what rank 0 has goes to all"


WORLD = 20


def _agree(rank: int, world: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": str(port)}
    before = _sockets()
    runtime.start(timeout_seconds=120)
    other = runtime.plant(120.0)  # as of a thread that saves
    assert runtime.most_of_ranks([rank, -rank]) == [world - 1, 0]
    assert runtime.of_ranks([rank])[:, 0].tolist() == list(range(world))
    assert runtime.of_each_rank(f"rank {rank}") == [f"rank {each}" for each in range(world)]
    assert runtime.on_rank0(lambda: rank) == 0 and other.broadcast(rank) == 0
    assert other.gather(rank) == (list(range(world)) if rank == 0 else [])
    try:
        runtime.agreed(lambda: 1 // (rank - world + 1))
        raise AssertionError("an error on one rank is all ranks'")
    except ZeroDivisionError:
        pass
    _raise_what_others_cannot_read(rank)
    _fetch(rank, folder / "fetched")
    dist.all_reduce(torch.ones(1))  # a step's, on the mesh
    (folder / str(rank)).write_text(str(_sockets() - before))
    runtime.barrier()
    runtime.stop()
    os._exit(0)


class Particular(Exception):
    """As libraries have them: made of two values, so that pickle cannot make it anew from its one message."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}: {why}")


def _raise_what_others_cannot_read(rank: int) -> None:
    """Nobody waits for a rank that could not tell its exception."""

    def fail() -> None:
        raise Particular("a store", "is away")

    for act in (lambda: runtime.on_rank0(fail), lambda: runtime.agreed(fail if rank == 1 else lambda: None)):
        try:
            act()
            raise AssertionError("it failed")
        except RuntimeError as error:
            assert str(error) == "Particular: a store: is away"


def _fetch(rank: int, file: Path) -> None:
    """Of a node, one process asks the hub, and the others after it; if it cannot have it, none asks."""

    def fetch() -> bool:
        if rank == 0:
            file.write_text("a tokenizer")
        return runtime.asks_hub() == (rank == 0) and file.exists()

    assert runtime.first_of_node("a tokenizer", fetch) and runtime.asks_hub()
    try:
        runtime.first_of_node("another", lambda: {}["missing"] if rank == 0 else os._exit(2))
    except (KeyError, ConfigError) as error:
        assert rank == 0 or "another: could not be loaded by rank 0" in str(error)


def _sockets() -> int:
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link).startswith("socket") for link in links if os.path.lexists(link))


def _fork_all(index: int, folder: Path) -> None:
    torch.set_num_threads(1)  # a fork has no other thread
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "CUDA_VISIBLE_DEVICES": ""}
    port, children = free_port(), []
    for rank in range(WORLD):
        if (child := os.fork()) == 0:
            try:
                _agree(rank, WORLD, port, folder)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * WORLD


@pytest.mark.dist
@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts sockets under /proc")
def test_no_process_is_connected_to_all_others(tmp_path: Path) -> None:
    """20 real processes: three groups over all ranks would be 57 sockets in each."""
    mp.spawn(_fork_all, (tmp_path,), nprocs=1)
    sockets = [int((tmp_path / str(rank)).read_text()) for rank in range(WORLD)]
    # To the store, which rank 0 keeps; of two trees; of the ring of a step: two neighbours, and one listens.
    for rank, n in enumerate(sockets):
        assert n <= 2 * sum(len(ranks) - 1 for ranks in levels(rank, WORLD)) + (WORLD if rank == 0 else 0) + 12, sockets
    assert sorted(sockets)[WORLD // 2] < WORLD
