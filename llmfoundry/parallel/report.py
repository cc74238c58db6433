"""The plan of a run in words, beside that of other meshes of the same GPUs: what `--dry-run` prints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from llmfoundry.config import ConfigError
from llmfoundry.model.config import ModelConfig
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.parallel import hardware
from llmfoundry.parallel.expert import n_experts
from llmfoundry.parallel.hardware import GIB
from llmfoundry.parallel.mesh import Degrees, ParallelConfig, plan_mesh
from llmfoundry.parallel.plan import Plan, Work, plan

MOST_MESHES = 10  # rows of the table


class Run(NamedTuple):
    """What is asked of the plan, its mesh aside."""

    model: CausalLMConfig
    parallel: ParallelConfig
    work: Work

    def on(self, degrees: Degrees) -> Plan:
        """The plan on one mesh."""
        return plan(self.model, self.parallel, degrees, self.work)


def describe(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    world: int,
    global_rows: int,
    micro_rows: int | Literal["auto"],
    seq_len: int,
    compute_bytes: int = 2,
    gpu_memory: float = hardware.GPU_MEMORY,
) -> str:
    """The plan in words, for `world` GPUs of `gpu_memory` bytes.

    Raises:
        ConfigError: the degrees do not fit the GPUs or the model, or a GPU holds no more than is kept free of it.
    """
    assert isinstance(model, CausalLMConfig)
    if not gpu_memory > hardware.RESERVE:
        raise ConfigError(
            f"--gpu-memory {gpu_memory / GIB:g}: {hardware.RESERVE / GIB:g} GiB of it are kept free; write more, or "
            "leave it out"
        )
    rows = -(-global_rows // world)
    micro = rows if micro_rows == "auto" else min(micro_rows, rows)
    run = Run(model, parallel, Work(rows, micro, seq_len, compute_bytes))
    asked = run.on(plan_mesh(parallel, world, n_experts(model)))
    lines = [*_held(asked, world), *_sent(asked, world), *_speed(asked), *_verdict(run, asked, gpu_memory)]
    return "\n".join([*lines, *(_table(run, asked, world, gpu_memory) if world > 1 else [])])


def _held(asked: Plan, world: int) -> Iterator[str]:
    (replicate, shard, expert), work = asked.degrees, asked.work
    mesh, rows = f"replicate {replicate} x shard {shard}, expert {expert}", f"{work.rows} rows each"
    yield f"on {world} device(s) ({mesh}), {rows} in microbatches of {work.micro_rows}, estimated for each:"
    for name, size in (asked.memory._asdict() | {"in all": asked.memory.total}).items():
        yield f"  {name:<14}{size / GIB:10.2f} GiB"


def _sent(asked: Plan, world: int) -> Iterator[str]:
    if world == 1:
        return
    yield "received by each a step:"
    for name, link in asked.traffic._asdict().items():
        between = f" ({link.network / GIB:.2f} between nodes)" if link.network else ""
        yield f"  {name:<14}{link.total / GIB:10.2f} GiB{between}"


def _speed(asked: Plan) -> Iterator[str]:
    time = asked.time
    parts = ", ".join(f"{name} {part:.3g}" for name, part in time._asdict().items())
    yield f"a step on H100s, estimated: {time.total:.3g} s ({parts}; {time.exposed:.3g} waiting for links),"
    yield f"  {asked.tokens_per_second:,.0f} tokens/s a GPU, MFU {asked.mfu:.0%}"


def _verdict(run: Run, asked: Plan, gpu_memory: float) -> Iterator[str]:
    usable = (gpu_memory - hardware.RESERVE) / GIB
    kept = f"{usable:.1f} GiB ({gpu_memory / GIB:g}, of which {hardware.RESERVE / GIB:g} are kept free)"
    if asked.fits(gpu_memory):
        yield f"fits: {asked.memory.total / GIB:.1f} of {kept}"
        return
    yield f"does not fit: {asked.memory.total / GIB:.1f} of {kept}"
    remedies = [
        f"{what} ({found.memory.total / GIB:.1f} GiB, {found.time.total:.3g} s)"
        for what, found in _changes(run, asked.degrees)
        if found.fits(gpu_memory)
    ]
    if remedies:
        yield f"  would fit on this mesh with {', or '.join(remedies[:3])}"
    else:
        yield "  neither recompute nor smaller microbatches make it fit on this mesh; take another mesh, or more GPUs"


def _changes(run: Run, degrees: Degrees) -> Iterator[tuple[str, Plan]]:
    """What could be changed without changing the mesh, the mildest first."""
    parallel, work = run.parallel, run.work
    modes = {"none": ["selective", "full"], "selective": ["full"], "full": []}[parallel.recompute]
    smaller = [work._replace(micro_rows=rows) for rows in _halves(work.micro_rows)]
    for mode in modes:
        changed = parallel.model_copy(update={"recompute": mode, "recompute_save": None})
        yield f"parallel.recompute={mode}", run._replace(parallel=changed).on(degrees)
    for less in smaller:
        yield f"device_train_microbatch_size={less.micro_rows}", run._replace(work=less).on(degrees)
    if modes and smaller:
        changed = parallel.model_copy(update={"recompute": "full", "recompute_save": None})
        both = f"parallel.recompute=full device_train_microbatch_size={smaller[-1].micro_rows}"
        yield both, Run(run.model, changed, smaller[-1]).on(degrees)
    every = parallel.model_copy(update={"reduce_once_a_step": False})
    if work.microbatches > 1 and parallel.reduce_once_a_step:
        yield "parallel.reduce_once_a_step=false", run._replace(parallel=every).on(degrees)
        full = every.model_copy(update={"recompute": "full", "recompute_save": None})
        both = "parallel.reduce_once_a_step=false parallel.recompute=full"
        yield both, run._replace(parallel=full).on(degrees)


def _halves(rows: int) -> Iterator[int]:
    while rows > 1:
        rows //= 2
        yield rows


def meshes(experts: int, world: int) -> list[Degrees]:
    """Those worth a look: copies of one node or some, or of part of the only node; experts divided within a node."""
    nodes = world // hardware.NODE if world % hardware.NODE == 0 else 1
    copies = [c for c in range(1, world + 1) if world % c == 0 and (nodes % c == 0 if nodes > 1 else True)]
    within = [
        e for e in range(1, hardware.NODE + 1) if hardware.NODE % e == 0 and (experts % e == 0 if experts else e == 1)
    ]
    return [Degrees(c, world // c, e) for c in copies for e in within if world // c % e == 0]


def _table(run: Run, asked: Plan, world: int, gpu_memory: float) -> Iterator[str]:
    plans = [run.on(degrees) for degrees in meshes(n_experts(run.model), world)]
    if asked.degrees not in [each.degrees for each in plans]:
        plans.append(asked)
    # Those that fit by their time; the others by how much is missing.
    plans.sort(key=lambda p: (not p.fits(gpu_memory), p.time.total if p.fits(gpu_memory) else p.memory.total))
    fastest = plans[0].degrees if plans[0].fits(gpu_memory) else None
    shown = plans[:MOST_MESHES]
    if asked.degrees not in [each.degrees for each in shown]:
        shown.append(next(each for each in plans if each.degrees == asked.degrees))
    yield f"meshes of {world} GPUs (> asked for, * the fastest that fits), received a step over NVLink and network:"
    yield "    replicate  shard  expert   memory GiB   NVLink GiB  network GiB   step s"
    for each in shown:
        marks = (">" if each.degrees == asked.degrees else " ") + ("*" if each.degrees == fastest else " ")
        nvlink, network = (sum(getattr(link, name) for link in each.traffic) for name in ("nvlink", "network"))
        yield (
            f" {marks}{each.degrees.replicate:>10}{each.degrees.shard:>7}{each.degrees.expert:>8}"
            f"{each.memory.total / GIB:>13.1f}{nvlink / GIB:>13.1f}{network / GIB:>13.1f}{each.time.total:>9.3g}"
            f"  {'fits' if each.fits(gpu_memory) else 'does not fit'}"
        )
