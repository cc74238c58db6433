"""What `parallel.reduce_once_a_step: auto` means, by the plan's memory and time; and the plan as a process of its own.

    python -m llmfoundry.planning.settle < pickled (RunConfig, number of GPUs, bytes of one)

A run asks such a process (train/planned.py), because a simulation needs a process group of its own kind. It prints one
line of JSON.
"""

from __future__ import annotations

import json
import pickle
import sys

from llmfoundry.parallel.mesh import Degrees
from llmfoundry.planning.hardware import RESERVE
from llmfoundry.planning.job import Job
from llmfoundry.planning.ledger import Memory
from llmfoundry.planning.memory import memory
from llmfoundry.planning.plan import plan
from llmfoundry.planning.simulation import CannotSimulateError


def settled(job: Job, degrees: Degrees, usable: float) -> tuple[Job, Memory]:
    """Return the job without `auto`, and what one GPU holds.

    Args:
        usable: bytes of one GPU that a plan may use. Gradients are reduced once per step if that fits and makes the
            step shorter: adding up whole gradients in float32 takes longer than collectives that compute hides.
    """
    quick = shortest(job, degrees)
    held = memory(quick, degrees)
    chosen = job.parallel.reduce_once_a_step == "auto" and quick.parallel.reduce_once_a_step and _sums(job, degrees)
    if not chosen or held.total <= usable:
        return quick, held
    each = job.changed(reduce_once_a_step=False)
    return each, memory(each, degrees)


def shortest(job: Job, degrees: Degrees) -> Job:
    """Return the job without `auto`, choosing by time only."""
    if job.parallel.reduce_once_a_step != "auto":
        return job
    once, each = job.changed(reduce_once_a_step=True), job.changed(reduce_once_a_step=False)
    ways = (once, each) if _sums(job, degrees) else (once,)
    return min(ways, key=lambda way: plan(way, degrees).time.total)


def _sums(job: Job, degrees: Degrees) -> bool:
    """Return whether there are gradients of several microbatches to sum over ranks."""
    return degrees.shard > 1 and job.work(degrees).microbatches > 1


def main() -> None:
    """Read a run, and print `{"once": ..., "held": {...}}`, or `{"why": ...}` if it cannot be simulated."""
    config, gpus, size = pickle.load(sys.stdin.buffer)
    job = Job.of(config)
    try:
        job, held = settled(job, job.degrees(gpus), size - RESERVE)
    except CannotSimulateError as error:
        print(json.dumps({"why": str(error)}))
        return
    print(json.dumps({"once": job.parallel.reduce_once_a_step, "held": held._asdict()}))


if __name__ == "__main__":
    main()
