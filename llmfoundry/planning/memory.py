"""The memory of one GPU at the highest moment of a step: simulated with few layers, extended to all of them.

Layers of one kind add the same bytes at each instant of a step, so memory is linear in the number of layers, and two
short models give the line. Which instant is the highest depends on the number of layers. Therefore each allocation is
extrapolated by itself, from the same allocation in the two models, and the highest result counts.
"""

from __future__ import annotations

from llmfoundry.moe.layer import MoEConfig
from llmfoundry.parallel.mesh import Degrees
from llmfoundry.planning.job import Job
from llmfoundry.planning.ledger import Memory, Moment
from llmfoundry.planning.simulation import simulate

Held = dict[Moment, list[list[Memory]]]


def memory(job: Job, degrees: Degrees) -> Memory:
    """Return what one GPU holds at the highest moment of a step."""
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
    """Return each allocation in both; only the highest of each if their numbers differ, as they do in the update."""
    if len(near) != len(far):
        near, far = ([max(held, key=lambda memory: memory.total)] for held in (near, far))
    return list(zip(near, far, strict=True))


def _with_layers(job: Job, n_layers: int) -> Job:
    return job._replace(model=job.model.model_copy(update={"n_layers": n_layers}))


def _ahead(job: Job) -> int:
    """Return the number of blocks gathered ahead; with `prefetch: 0` FSDP itself still gathers one."""
    return max(1, job.parallel.prefetch)


def _pattern(job: Job) -> tuple[int, int]:
    """Return the period of the kinds of blocks, and the fewest layers in which some block has all its neighbours.

    Near both ends, fewer blocks are gathered ahead.
    """
    model, ffn = job.model, job.model.ffn_config
    dense, period = (ffn.first_k_dense, ffn.moe_layer_freq) if isinstance(ffn, MoEConfig) else (0, 1)
    repeats = -(-(2 * _ahead(job) + 2) // period)
    return period, dense + repeats * period + (model.n_layers - dense) % period


def _by_border(held: Held, n_layers: int, reach: int) -> Held:
    """Return the moments near both ends; those near the last block are counted from there, with numbers below -1."""
    first = {moment: times for moment, times in held.items() if moment.block <= reach}
    last = {
        moment._replace(block=moment.block - n_layers - 2): times
        for moment, times in held.items()
        if moment.block >= n_layers - 1 - reach
    }
    return first | last
