"""What `auto` means of keys of `parallel`, by the plan's memory; and the plan as a process of its own.

    python -m llmfoundry.planning.settle < pickled (RunConfig, number of GPUs, bytes of one)

A run asks such a process (train/planned.py), because a simulation needs a process group of its own kind. It prints one
line of JSON.
"""

from __future__ import annotations

import itertools
import json
import pickle
import sys

from llmfoundry.parallel.mesh import Degrees
from llmfoundry.planning.hardware import RESERVE
from llmfoundry.planning.job import Job
from llmfoundry.planning.ledger import Memory
from llmfoundry.planning.memory import memory
from llmfoundry.planning.simulation import CannotSimulateError


def settled(job: Job, degrees: Degrees, usable: float) -> tuple[Job, Memory]:
    """The job without `auto`, and what one GPU holds.

    Args:
        usable: bytes of one GPU that a plan may use. Gradients are summed once a step if that fits, and copies of
            experts are kept if they fit too.
    """
    once, copies = job.parallel.reduce_once_a_step, job.parallel.keep_copies
    several = degrees.shard > 1 and job.work(degrees).microbatches > 1
    every = [True, False][: 1 + several] if once == "auto" else [once]
    kept = [True, False][: 1 + job.has_copies(degrees)] if copies == "auto" else [copies]
    for choice in itertools.product(every, kept):
        found = job.changed(reduce_once_a_step=choice[0], keep_copies=choice[1])
        held = memory(found, degrees)
        if held.total <= usable:
            break
    return found, held


def main() -> None:
    """Read a run, and print what `auto` means and what is held, or why that cannot be simulated."""
    config, gpus, size = pickle.load(sys.stdin.buffer)
    job = Job.of(config)
    try:
        job, held = settled(job, job.degrees(gpus), size - RESERVE)
    except CannotSimulateError as error:
        print(json.dumps({"why": str(error)}))
        return
    parallel = job.parallel
    print(json.dumps({"once": parallel.reduce_once_a_step, "copies": parallel.keep_copies, "held": held._asdict()}))


if __name__ == "__main__":
    main()
