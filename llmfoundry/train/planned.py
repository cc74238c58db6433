"""The plan's estimate of memory for a run that is about to start, or that has run out of memory."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
from typing import NamedTuple

import torch

from llmfoundry import runtime
from llmfoundry.parallel.mesh import Mesh, ParallelConfig, settled_exchange
from llmfoundry.train.config import RunConfig

log = logging.getLogger(__name__)

_TIMEOUT = 120.0  # seconds; a simulation takes 2 to 6


class Planned(NamedTuple):
    """The estimate for one GPU."""

    once: bool  # whether gradients are summed once a step
    held: dict[str, float]  # bytes at the highest moment of a step, by kind (planning/ledger.py)


def planned(config: RunConfig, gpus: int, memory: float) -> Planned | str:
    """Simulate a step of a run on this many GPUs in a separate process; returns the reason if that is not possible.

    Args:
        memory: bytes of one GPU.
    """
    asked = config.model_copy(update={"callbacks": {}, "loggers": {}})
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "llmfoundry.planning.settle"],
            input=pickle.dumps((asked, gpus, memory)), env=environment, capture_output=True, timeout=_TIMEOUT,
        )  # fmt: skip
        found = json.loads(done.stdout.splitlines()[-1])
        return str(found["why"]) if "why" in found else Planned(found["once"], found["held"])
    except (OSError, subprocess.SubprocessError, pickle.PicklingError, AttributeError, TypeError, ValueError,
            IndexError, KeyError) as error:  # fmt: skip
        return f"{type(error).__name__}: {error}"  # a plug-in that another process cannot load, for example


def settle(config: RunConfig, mesh: Mesh, device: torch.device) -> ParallelConfig:
    """`config.parallel` with `reduce_once_a_step: auto` resolved, the same on every rank; the choice is logged.

    If ranks have different numbers of rows, tokens are not gathered.
    """
    parallel = settled_exchange(config.parallel, config.global_train_batch_size, mesh.data_ranks)
    micro = config.device_train_microbatch_size
    if parallel.reduce_once_a_step != "auto":
        return parallel
    rows = -(-config.global_train_batch_size // mesh.data_ranks)
    once = True
    if device.type == "cuda" and mesh.degrees.shard > 1 and (micro == "auto" or micro < rows):
        once = _once(config, mesh, device)
    return parallel.model_copy(update={"reduce_once_a_step": once})


def _once(config: RunConfig, mesh: Mesh, device: torch.device) -> bool:
    if config.device_train_microbatch_size == "auto":  # there are several once memory has run out
        return False
    memory = float(runtime.of_ranks([card_memory(device)]).min())

    def choose() -> tuple[bool, str]:
        found = planned(config, mesh.data_ranks, memory)
        if isinstance(found, str):
            return True, f"once a step: not planned ({found})"
        size = f"{sum(found.held.values()) / 2**30:.1f} of {memory / 2**30:.1f} GiB are planned"
        return found.once, f"{'once a step' if found.once else 'every microbatch'}, as is best by the plan: {size}"

    once, why = runtime.on_rank0(choose)
    log.info("parallel.reduce_once_a_step: auto: gradients are summed over ranks %s", why)
    return once


def card_memory(device: torch.device) -> int:
    """Bytes of a GPU."""
    return torch.cuda.get_device_properties(device).total_memory
