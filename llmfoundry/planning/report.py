"""What `--dry-run` prints: the plan of one mesh, what to change if it does not fit, and other meshes to compare.

Lines are yielded as soon as they are known, because the simulation of a mesh takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from llmfoundry.config import ConfigError
from llmfoundry.moe.layer import MoEConfig
from llmfoundry.parallel.expert import n_experts
from llmfoundry.parallel.mesh import Degrees
from llmfoundry.planning import hardware
from llmfoundry.planning.hardware import GIB
from llmfoundry.planning.job import Job
from llmfoundry.planning.ledger import Memory
from llmfoundry.planning.memory import memory
from llmfoundry.planning.plan import MASTER, Plan, plan
from llmfoundry.planning.settle import settled
from llmfoundry.planning.simulation import CannotSimulateError
from llmfoundry.train.config import RunConfig

MOST_GPUS = 8192  # limit of the search for a mesh on which the run fits
MOST_MESHES = 3  # maximum number of fitting meshes in the table, besides the requested one
MOST_SIMULATED = 4  # meshes, including those that do not fit
MOST_REMEDIES = 2


class GPU(NamedTuple):
    """The memory of one card."""

    memory: float  # bytes

    @property
    def usable(self) -> float:
        """Bytes that a plan may use."""
        return self.memory - hardware.RESERVE

    def fits(self, held: Memory) -> bool:
        """Return whether the card has room for it."""
        return held.total <= self.usable

    def __str__(self) -> str:
        return f"{self.usable / GIB:.1f} GiB ({self.memory / GIB:g}, of which {hardware.RESERVE / GIB:g} are kept free)"


def describe(config: RunConfig, gpus: int | None, gpu_memory: float = hardware.GPU_MEMORY) -> Iterator[str]:
    """Yield the plan of a run in words.

    Args:
        gpus: how many; None: find the fewest that the run fits on.
        gpu_memory: bytes of one GPU.

    Raises:
        ConfigError: if the mesh does not fit the GPUs or the model, or `gpu_memory` is not more than the reserve.
    """
    if config.model.name == "transformers":
        yield "memory and time are not planned for modules of transformers"
        return
    card, job = GPU(gpu_memory), Job.of(config)
    if not card.usable > 0:
        raise ConfigError(
            f"--gpu-memory {gpu_memory / GIB:g}: {hardware.RESERVE / GIB:g} GiB of it are kept free; write more, or "
            "leave it out"
        )
    try:
        yield from _least_gpus(job, card) if gpus is None else _plan(job, gpus, card)
    except CannotSimulateError as reason:
        yield f"memory cannot be simulated: {reason}"
    finally:
        torch._dynamo.reset()  # drops the graphs that the simulations share


def _plan(asked_for: Job, gpus: int, card: GPU) -> Iterator[str]:
    degrees = asked_for.degrees(gpus)
    asked_for.check_rows(degrees)
    work, job, held, reason = asked_for.work(degrees), asked_for, Memory(), None
    rows, micro_rows = work.rows // asked_for.sequences, work.micro_rows // asked_for.sequences
    yield f"on {gpus} GPU(s) ({_mesh(degrees)}), {rows} rows each in microbatches of {micro_rows}"
    try:
        job, held = settled(asked_for, degrees, card.usable)
    except CannotSimulateError as error:  # its time is known all the same
        reason = error
    asked = plan(job, degrees)
    if gpus > 1:
        yield from _received(asked)
    yield from _exchanged(asked_for, degrees)
    yield from _speed(job, asked)
    if reason is not None:
        raise reason
    if job.parallel != asked_for.parallel and asked.work.microbatches > 1:
        how = "once a step" if job.parallel.reduce_once_a_step else "after each microbatch"
        yield f"parallel.reduce_once_a_step: auto: gradients are summed {how}"
    yield from _held(held)
    yield from _verdict(job, degrees, held, card)
    if gpus > 1:
        yield from _table(asked_for, asked, held, gpus, card)


def _mesh(degrees: Degrees) -> str:
    return f"replicate {degrees.replicate} x shard {degrees.shard}, expert {degrees.expert}"


def _least_gpus(job: Job, card: GPU) -> Iterator[str]:
    """Yield the fewest GPUs on which the YAML's mesh fits: 1, 2, 4, 8, ... times the ranks that its degrees need."""
    wanted, model = job.parallel, job.model
    ranks = wanted.replicate * (wanted.expert if wanted.shard == -1 else wanted.shard)
    choices = [ranks] if wanted.shard != -1 else [ranks * 2**i for i in range(MOST_GPUS.bit_length())]
    choices = [n for n in choices if n <= min(MOST_GPUS, job.global_rows // job.sequences)] or [ranks]
    choices = [n for n in choices if _runs(job, job.degrees(n))]
    if not choices:
        job.check_rows(job.degrees(ranks))  # which says why
    if wanted.exchange_tokens == "gather":  # it needs equally many rows on every rank
        choices = [n for n in choices if job.global_rows % n == 0] or choices[:1]
    sizes: dict[int, Memory] = {}

    def fits(i: int) -> bool:
        if i not in sizes:
            sizes[i] = settled(job, job.degrees(choices[i]), card.usable)[1]
        return card.fits(sizes[i])

    # Start where weights, gradients and AdamW's moments take three quarters of the memory; go up or down from there.
    divided = 0 if wanted.cpu_offload else MASTER * (model.n_params() + 3 * model.n_trainable_params())
    last = len(choices) - 1
    i = next((i for i, n in enumerate(choices) if divided / job.degrees(n).shard <= 0.75 * card.usable), last)
    while not fits(i) and i < last:
        i += 1
    # With half the GPUs, each holds twice the weights and optimizer state, and at least as much of the rest.
    while i > 0 and fits(i) and sizes[i].total + sizes[i].weights + sizes[i].optimizer <= card.usable and fits(i - 1):
        i -= 1
    held = f"{sizes[i].total / GIB:.1f} of {card}"
    where = f"{choices[i]} GPU(s) ({_mesh(job.degrees(choices[i]))})"
    if fits(i):
        yield f"fits from {where}: {held}; --gpus {choices[i]} prints the plan"
        return
    yield f"does not fit on {where}: {held}; --gpus {choices[i]} prints what to change"
    if wanted.shard != -1:
        yield "  the mesh is for exactly this many; parallel.shard=-1 lets it grow"
    elif (more := choices[i] * 2) <= MOST_GPUS:
        rows = job.global_rows // job.sequences
        why = "has no rows for" if more > rows else "cannot be divided into as many microbatches on each of"
        yield f"  global_train_batch_size={rows} {why} more GPUs"


def _runs(job: Job, degrees: Degrees) -> bool:
    """Return whether each rank has rows, and as many microbatches as the others."""
    try:
        job.check_rows(degrees)
    except ConfigError:
        return False
    return True


def _held(held: Memory) -> Iterator[str]:
    yield "held by each at the highest moment of a step, simulated:"
    for name, size in (held._asdict() | {"in all": held.total}).items():
        yield f"  {name:<14}{size / GIB:10.2f} GiB"


def _received(asked: Plan) -> Iterator[str]:
    yield "received by each per step:"
    for name, link in asked.traffic._asdict().items():
        between = f" ({link.network / GIB:.2f} between nodes)" if link.network else ""
        yield f"  {name:<14}{link.total / GIB:10.2f} GiB{between}"


def _exchanged(job: Job, degrees: Degrees) -> Iterator[str]:
    ffn = job.model.ffn_config
    if degrees.expert > 1 and isinstance(ffn, MoEConfig):
        way = "gathered" if job.gathers(degrees, ffn.moe_top_k) else "sent to the ranks of their experts"
        yield f"parallel.exchange_tokens: {job.parallel.exchange_tokens}: tokens are {way}"


def _speed(job: Job, asked: Plan) -> Iterator[str]:
    time = asked.time
    parts = ", ".join(f"{name} {part:.3g}" for name, part in time._asdict().items())
    yield f"a step on H100s, estimated: {time.total:.3g} s ({parts}; {time.exposed:.3g} waiting for links),"
    yield f"  {asked.tokens_per_second:,.0f} tokens/s per GPU, MFU {asked.mfu:.0%}"
    if job.parallel.cpu_offload:
        yield "  too fast: copies from and to the host, and its update of the weights, are not planned"
    each = time.compute / job.model.n_layers / asked.work.microbatches
    if each < hardware.LAUNCH_SECONDS:
        yield (
            f"  too fast: kernels of a layer take {each * 1e3:.2g} ms per microbatch, and the host up to "
            f"{hardware.LAUNCH_SECONDS * 1e3:g} ms to launch them, which is not planned"
        )


def _verdict(job: Job, degrees: Degrees, held: Memory, card: GPU) -> Iterator[str]:
    if card.fits(held):
        yield f"fits: {held.total / GIB:.1f} of {card}"
        return
    yield f"does not fit: {held.total / GIB:.1f} of {card}"
    if held.weights + held.optimizer > card.usable:
        yield "  weights and optimizer state do not fit even without activations; use more GPUs, or a larger shard"
        return
    changes = list(_changes(job, degrees))
    found: list[str] = []
    # The last one changes most: if it does not help, none does.
    if changes and card.fits(memory(changes[-1][1], degrees)):
        for keys, changed in changes:
            less = memory(changed, degrees)
            if card.fits(less):
                found.append(f"{keys} ({less.total / GIB:.1f} GiB, {plan(changed, degrees).time.total:.3g} s)")
            if len(found) == MOST_REMEDIES:
                break
    if found:
        yield f"  would fit on this mesh with {', or '.join(found)}"
    else:
        yield "  neither recompute nor smaller microbatches make it fit on this mesh; use another mesh, or more GPUs"


def _changes(job: Job, degrees: Degrees) -> Iterator[tuple[str, Job]]:
    """Yield changes that keep the mesh, as keys and as a job, mildest first; a run accepts each."""
    parallel, work, smaller = job.parallel, job.work(degrees), []
    modes = {"none": ["selective", "full"], "selective": ["full"], "full": []}[parallel.recompute]
    for mode in modes:
        yield f"parallel.recompute={mode}", job.changed(recompute=mode, recompute_save=None)
    rows = work.micro_rows // job.sequences
    while rows > 1:
        rows //= 2
        fewer = job._replace(micro_rows=rows * job.sequences)
        if _runs(fewer, degrees):
            smaller.append((f"device_train_microbatch_size={rows}", fewer))
    yield from smaller
    each = "parallel.reduce_once_a_step=false"
    if parallel.reduce_once_a_step and work.microbatches > 1:
        yield each, job.changed(reduce_once_a_step=False)
    words, least = smaller[-1] if smaller else ("", job)
    if modes and smaller:
        full = least.changed(recompute="full", recompute_save=None)
        yield f"parallel.recompute=full {words}", full
    keys = [each] * (parallel.reduce_once_a_step and least.work(degrees).microbatches > 1)
    keys += ["parallel.recompute=full"] * bool(modes) + [words] * bool(smaller)
    if len(keys) > 1:
        yield " ".join(keys), least.changed(reduce_once_a_step=False, recompute="full", recompute_save=None)


def meshes(experts: int, gpus: int) -> list[Degrees]:
    """Yield meshes to compare: copies of one or more nodes, or of part of one; experts divided within a node."""
    nodes = gpus // hardware.NODE if gpus % hardware.NODE == 0 else 1
    copies = [c for c in range(1, gpus + 1) if gpus % c == 0 and (nodes % c == 0 if nodes > 1 else True)]
    within = [
        e for e in range(1, hardware.NODE + 1) if hardware.NODE % e == 0 and (experts % e == 0 if experts else e == 1)
    ]
    return [Degrees(c, gpus // c, e) for c in copies for e in within if gpus // c % e == 0]


def _table(job: Job, asked: Plan, held: Memory, gpus: int, card: GPU) -> Iterator[str]:
    """Yield the mesh asked for, then others by estimated time, until `MOST_MESHES` are found that fit."""
    shared = (held.weights + held.optimizer) * asked.degrees.shard
    others = [each for each in meshes(n_experts(job.model), gpus) if each != asked.degrees]
    able = [each for each in others if shared / each.shard <= card.usable]
    plans = sorted((plan(job, each) for each in able), key=lambda each: each.time.total)
    yield f"meshes of {gpus} GPUs, fastest first (> the one above); received per step over NVLink and network:"
    yield "    replicate  shard  expert   memory GiB   NVLink GiB  network GiB   step s"
    yield _row(asked, held, ">", card)
    fitting = 0
    for n, each in enumerate(plans[:MOST_SIMULATED]):
        changed, found = settled(job, each.degrees, card.usable)
        fitting += card.fits(found)
        yield _row(plan(changed, each.degrees), found, " ", card)
        if fitting == MOST_MESHES:
            plans = plans[: n + 1]
            break
    if left := len(others) - len(able):
        yield f"  {left} more cannot hold weights and optimizer state"
    if left := len(able) - min(len(plans), MOST_SIMULATED):
        yield f"  {left} more are slower"


def _row(found: Plan, held: Memory, mark: str, card: GPU) -> str:
    nvlink, network = (sum(getattr(link, name) for link in found.traffic) for name in ("nvlink", "network"))
    replicate, shard, expert = found.degrees
    return (
        f"  {mark}{replicate:>10}{shard:>7}{expert:>8}{held.total / GIB:>13.1f}{nvlink / GIB:>13.1f}"
        f"{network / GIB:>13.1f}{found.time.total:>9.3g}  {'fits' if card.fits(held) else 'does not fit'}"
    )
