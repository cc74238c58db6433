"""What the plan says of the memory of a run that is about to begin, or that has run out of it."""

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
from llmfoundry.model.transformer import CausalLMConfig
from llmfoundry.parallel.fsdp import can_keep_copies
from llmfoundry.parallel.mesh import Mesh, ParallelConfig
from llmfoundry.train.config import RunConfig

log = logging.getLogger(__name__)

_TIMEOUT = 120.0  # seconds; a simulation takes 2 to 6


class Planned(NamedTuple):
    """Of one GPU."""

    once: bool  # whether gradients are summed once a step
    copies: bool  # whether experts are kept in the compute dtype too
    held: dict[str, float]  # bytes at the highest moment of a step, by kind (planning/ledger.py)


def planned(config: RunConfig, gpus: int, memory: float) -> Planned | str:
    """Simulate a step of a run on this many GPUs, in a process of its own; why not, where that cannot be done.

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
        return str(found["why"]) if "why" in found else Planned(found["once"], found["copies"], found["held"])
    except (OSError, subprocess.SubprocessError, pickle.PicklingError, AttributeError, TypeError, ValueError,
            IndexError, KeyError) as error:  # fmt: skip
        return f"{type(error).__name__}: {error}"  # a plug-in that another process cannot load, for example


def settle(config: RunConfig, mesh: Mesh, device: torch.device) -> ParallelConfig:
    """`config.parallel` without what a plan decides, the same on every rank; says what was chosen, and why."""
    parallel, micro = config.parallel, config.device_train_microbatch_size
    rows = -(-config.global_train_batch_size // mesh.data_ranks)
    sharded = device.type == "cuda" and mesh.degrees.shard > 1
    sums = parallel.reduce_once_a_step == "auto" and sharded and (micro == "auto" or micro < rows)
    copies = parallel.keep_copies == "auto" and sharded and keeps_copies(config, mesh, device)
    choice = _Choice(True, True, "")
    if micro == "auto":  # there are several microbatches once memory has run out
        choice = _Choice(not sums, not copies, "")
    elif sums or copies:
        choice = _planned_choice(config, mesh, device)
    if choice.why and sums:
        how = "once a step" if choice.once else "every microbatch, for whole ones do not fit"
        log.info("parallel.reduce_once_a_step: auto: gradients are summed over ranks %s: %s", how, choice.why)
    if choice.why and copies:
        how = "are kept in bfloat16 too" if choice.copies else "are cast at each gather, for copies do not fit"
        log.info("parallel.keep_copies: auto: experts %s: %s", how, choice.why)
    chosen = {"reduce_once_a_step": choice.once, "keep_copies": choice.copies}
    return parallel.model_copy(update={key: value for key, value in chosen.items() if getattr(parallel, key) == "auto"})


def keeps_copies(config: RunConfig, mesh: Mesh, device: torch.device) -> bool:
    """Whether `parallel.keep_copies` changes anything."""
    if not isinstance(config.model, CausalLMConfig):
        return False
    precision, weights = config.precision_on(device.type), config.optimizer.weight_dtype
    return can_keep_copies(config.model, config.parallel, mesh.degrees, precision, weights)


class _Choice(NamedTuple):
    once: bool
    copies: bool
    why: str


def _planned_choice(config: RunConfig, mesh: Mesh, device: torch.device) -> _Choice:
    memory = float(runtime.of_ranks([card_memory(device)]).min())

    def choose() -> _Choice:
        found = planned(config, mesh.data_ranks, memory)
        if isinstance(found, str):
            return _Choice(True, False, f"not planned ({found})")
        size = f"{sum(found.held.values()) / 2**30:.1f} of {memory / 2**30:.1f} GiB are planned"
        return _Choice(found.once, found.copies, size)

    return runtime.on_rank0(choose)


def card_memory(device: torch.device) -> int:
    """Bytes of a GPU."""
    return torch.cuda.get_device_properties(device).total_memory
