"""The memory of one GPU at the highest moment of a step: simulated with few layers, extended to all of them.

Layers of one kind add the same bytes to each instant of a step, so two short models give the line on which a long one
lies. Which instant is the highest depends on the length. So each allocation of the shorter model is compared with the
same one of the longer, not the highest of one with the highest of the other, and the highest of all lines counts.
"""

from __future__ import annotations

from llmfoundry.moe.layer import MoEConfig
from llmfoundry.parallel.mesh import Degrees
from llmfoundry.planning.job import Job
from llmfoundry.planning.ledger import Memory, Moment
from llmfoundry.planning.simulation import simulate

Held = dict[Moment, list[list[Memory]]]


def memory(job: Job, degrees: Degrees) -> Memory:
    """What one GPU holds when a step stands highest."""
    model = job.model
    period, short = _pattern(job)
    if model.n_layers <= short + period:
        return simulate(job, degrees).highest
    near, far = (
        _by_border(simulate(_with_layers(job, n), degrees).held, n, max(_ahead(job), period))
        for n in (short, short + period)
    )
    steps = (model.n_layers - short) / period
    lines = (
        a.extrapolated(b, steps)
        for moment in near
        for shorter, longer in zip(near[moment], far[moment], strict=True)
        for a, b in _pairs(shorter, longer)
    )
    return max(lines, key=lambda memory: memory.total)


def _pairs(near: list[Memory], far: list[Memory]) -> list[tuple[Memory, Memory]]:
    """The same allocations of both; the highest of each where they are not equally many, as in the update."""
    if len(near) != len(far):
        near, far = ([max(held, key=lambda memory: memory.total)] for held in (near, far))
    return list(zip(near, far, strict=True))


def _with_layers(job: Job, n_layers: int) -> Job:
    return job._replace(model=job.model.model_copy(update={"n_layers": n_layers}))


def _ahead(job: Job) -> int:
    """Blocks whose weights are gathered ahead; with `prefetch: 0` FSDP still does one by itself."""
    return max(1, job.parallel.prefetch)


def _pattern(job: Job) -> tuple[int, int]:
    """Layers after which the kinds of blocks repeat, and the fewest in which every block has all its neighbours.

    Blocks near both ends differ in how many others are gathered ahead of them.
    """
    model, ffn = job.model, job.model.ffn_config
    dense, period = (ffn.first_k_dense, ffn.moe_layer_freq) if isinstance(ffn, MoEConfig) else (0, 1)
    repeats = -(-(2 * _ahead(job) + 2) // period)
    return period, dense + repeats * period + (model.n_layers - dense) % period


def _by_border(held: Held, n_layers: int, reach: int) -> Held:
    """The moments near either end; those near the last block are numbered from there, below -1."""
    first = {moment: times for moment, times in held.items() if moment.block <= reach}
    last = {
        moment._replace(block=moment.block - n_layers - 2): times
        for moment, times in held.items()
        if moment.block >= n_layers - 1 - reach
    }
    return first | last
