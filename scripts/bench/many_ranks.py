"""What a run's machinery costs one process at 16, 512 and 4,096 ranks: DBRX's shapes, on a fake process group.

Counts and bytes are those of the code; seconds are of one core. `render_readme.py` writes them into
docs/planning.md, and tests/parallel/test_many_ranks.py holds the bars.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

from llmfoundry.callbacks import console  # noqa: F401  registers the callbacks that the YAMLs name
from llmfoundry.checkpoint.index import Box, index_of, read_index
from llmfoundry.checkpoint.manifest import INDEX, MANIFEST, Written, read_manifest, write_manifest
from llmfoundry.checkpoint.storage import SavePlan, TensorReader, _header, plan_save
from llmfoundry.cli.command import read_run_config
from llmfoundry.parallel.apply import parallelize
from llmfoundry.parallel.expert import n_experts
from llmfoundry.parallel.mesh import Degrees, build_mesh
from llmfoundry.planning.job import Job
from llmfoundry.tree import levels

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "scripts" / "bench" / "results" / "many_ranks.json"
MESHES = [Degrees(1, 16, 8), Degrees(4, 128, 8), Degrees(32, 128, 8), Degrees(1, 4096, 8)]


class Costs(NamedTuple):
    """Of one rank, or of rank 0 where it is said."""

    ranks: int
    mesh: str
    tensors: int
    sockets: int  # of the rank that has most of them, for what ranks agree on
    hops: int  # of one agreement: messages that wait for each other
    plan_seconds: float  # to decide what to write
    told_bytes: int  # what a rank tells rank 0 in a save
    staged_share: float  # of the bytes that one rank writes, beside an even share of all: the largest
    index_bytes: int
    index_seconds: float  # rank 0, in its thread
    read_seconds: float  # the index, read and checked
    manifest_bytes: int
    manifest_seconds: float
    files: int  # that a rank reads on the same mesh
    files_on_half: int  # on half as many ranks
    header_bytes: int  # of a file of weights
    find_seconds: float  # to find out what to read


@contextmanager
def as_rank(rank: int, world: int) -> Iterator[None]:
    """One rank of a fake process group."""
    with patch.dict(os.environ, RANK=str(rank), WORLD_SIZE=str(world)):
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        try:
            yield
        finally:
            dist.destroy_process_group()


def tensors_of(degrees: Degrees, *overrides: str) -> dict[str, Tensor]:
    """What a run of DBRX saves: weights, and two moments and a count of each; without values."""
    parallel = [f"parallel.{name}={value}" for name, value in degrees._asdict().items()]
    job = Job.of(read_run_config(str(ROOT / "yamls" / "dbrx-132b.yaml"), [*parallel, *overrides]))
    with torch.device("meta"):
        model = job.model.build()
    parallelize(model, build_mesh(job.parallel, "cpu", n_experts(job.model)), job.parallel, "amp_bf16")
    saved = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        saved |= {f"optimizer/{name}/{key}": parameter for key in ("exp_avg", "exp_avg_sq")}
        saved[f"optimizer/{name}/step"] = torch.zeros((), device="meta")
    return saved | {"rng/cpu": torch.zeros(5056, dtype=torch.uint8)}


def boxes_of_all(tensors: dict[str, Tensor], degrees: Degrees) -> tuple[SavePlan, list[list[Box]], list[int]]:
    """Rank 0's plan; the boxes of all ranks, by layout; and the bytes that the first rank of each replica writes."""
    world = degrees.replicate * degrees.shard
    plan = plan_save(tensors)
    first = {laid.layout: name for name, laid in reversed(plan.tensors.items())}
    writer, written = {}, []
    for replica in range(degrees.replicate):
        with _at(replica * degrees.shard):
            own = plan_save(tensors)
        written.append(sum(part.tensor.numel() * part.tensor.dtype.itemsize for part in own.parts))
        writer |= {layout: replica for layout, box in enumerate(own.boxes) if box is not None}
    layouts: list[list[Box]] = []
    for layout, name in sorted(first.items()):
        tensor = tensors[name]
        if not isinstance(tensor, DTensor):
            each = range(world) if name.startswith("rng/") else range(1)
            shape = (1, *tensor.shape) if name.startswith("rng/") else tuple(tensor.shape)
            layouts.append([Box(rank, _row(rank, shape, name), shape) for rank in each])
            continue
        ranks = range(writer[layout] * degrees.shard, (writer[layout] + 1) * degrees.shard)
        found = [Box(rank, *box_of(tensor, rank)) for rank in ranks]
        layouts.append([box for box in found if math.prod(box.shape)])
    return plan, layouts, written


def _row(rank: int, shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    return (rank, *(0 for _ in shape[1:])) if name.startswith("rng/") else (0,) * len(shape)


@contextmanager
def _at(rank: int) -> Iterator[None]:
    """Another rank of the same meshes."""
    with (
        patch.dict(os.environ, RANK=str(rank)),
        patch.object(DeviceMesh, "get_coordinate", lambda mesh: tuple((mesh.mesh == rank).nonzero()[0].tolist())),
    ):
        yield


def box_of(tensor: DTensor, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Offsets and shape of a rank's part."""
    mesh = tensor.device_mesh
    at = (mesh.mesh == rank).nonzero()[0].tolist()
    shape, offsets = _compute_local_shape_and_global_offset(tensor.shape, mesh.shape, at, tensor.placements)
    return tuple(offsets), tuple(shape)


def costs(degrees: Degrees, *overrides: str) -> Costs:
    """Measure one mesh."""
    world = degrees.replicate * degrees.shard
    with as_rank(0, world), tempfile.TemporaryDirectory() as folder:
        tensors = tensors_of(degrees, *overrides)
        plan_save(tensors)
        start = time.process_time()
        plan_save(tensors)
        plan_seconds = time.process_time() - start
        plan, layouts, written = boxes_of_all(tensors, degrees)
        start = time.process_time()
        index = index_of(plan.tensors, layouts)
        index_seconds = time.process_time() - start
        (Path(folder) / INDEX).write_bytes(index)
        start = time.process_time()
        entries = read_index(Path(folder))
        read_seconds = time.process_time() - start
        start = time.process_time()
        wanted = TensorReader(Path(folder), entries).wanted(tensors)
        find_seconds = time.process_time() - start
        digest = Written(10**9, "0" * 64)
        names = [f"{group}-{rank:05d}.safetensors" for group in ("model", "optimizer", "rng") for rank in range(world)]
        write_manifest(Path(folder), 1, dict.fromkeys((*names, INDEX, "trainer.json", "config.yaml"), digest))
        start = time.process_time()
        read_manifest(Path(folder))
        manifest_seconds = time.process_time() - start
        manifest_bytes = (Path(folder) / MANIFEST).stat().st_size
        header = _header([part for part in plan.parts if part.name.startswith("model/")])
        told = pickle.dumps((plan.boxes, dict.fromkeys(names[:3], digest), "", "0" * 64))
    half = degrees._replace(shard=degrees.shard // 2) if degrees.replicate == 1 else degrees._replace(
        replicate=degrees.replicate // 2)  # fmt: skip
    with as_rank(0, world // 2):
        on_half = TensorReader(Path(folder), entries).wanted(tensors_of(half, *overrides))
    groups = [levels(rank, world) for rank in range(world)]
    return Costs(
        world, " x ".join(map(str, degrees[:2])) + f", expert {degrees.expert}", len(tensors),
        max(sum(len(ranks) - 1 for ranks in own) for own in groups),
        # Each level sums in a ring, 2 (n - 1) messages, and hands on in a binary tree.
        sum(2 * (len(ranks) - 1) + (math.ceil(math.log2(len(ranks))) if i + 1 < len(groups[0]) else 0)
            for i, ranks in enumerate(groups[0])),
        plan_seconds, len(told), max(written) / (sum(written) / len(written)), len(index), index_seconds, read_seconds,
        manifest_bytes, manifest_seconds, len(wanted), len(on_half), len(header), find_seconds,
    )  # fmt: skip


def main() -> int:
    """Measure, and write the results."""
    rows = [costs(degrees)._asdict() for degrees in MESHES]
    RESULTS.write_text(json.dumps({"model": "DBRX-132B", "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    print(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
