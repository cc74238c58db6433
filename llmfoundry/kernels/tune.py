"""Chooses a kernel's tile sizes: fixed, or the fastest of a few candidates, timed once and cached on disk.

There are few candidates, because each costs a compilation: the first step with a cold cache takes less than a minute.
Timings are keyed by shape and by rows per expert, rounded to a power of two. Nothing is timed while a CUDA graph is
captured, or with `LLMFOUNDRY_AUTOTUNE=0`. All candidates sum over the K dim bitwise equally (same depth), but ranks
that must agree bitwise should still turn timing off.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch
import triton

from llmfoundry.atomic import atomic_write
from llmfoundry.kernels.grouped import GroupedConfig
from llmfoundry.kernels.narrow import NarrowConfig, NarrowGradConfig
from llmfoundry.kernels.tiles import HopperConfig, turns
from llmfoundry.kernels.up import UpConfig
from llmfoundry.kernels.up_backward import UpBackwardConfig
from llmfoundry.kernels.weight_grad import WeightGradConfig
from llmfoundry.runtime import cache_root
from llmfoundry.strict_json import read_mapping, whole_number

log = logging.getLogger(__name__)
Config = TypeVar("Config", UpConfig, GroupedConfig, UpBackwardConfig, WeightGradConfig, NarrowConfig, NarrowGradConfig)
Result = TypeVar("Result")


class Problem(NamedTuple):
    """What the best tile sizes depend on."""

    device: torch.device
    dtype: str
    d_model: int
    hidden: int
    n_experts: int
    halves: int
    n_rows: int

    def bucket(self) -> Problem:
        """Return a key for problems that share a choice: rows per expert are rounded down to a power of two."""
        return self._replace(n_rows=(self.n_rows // self.n_experts).bit_length())


LARGE_TILES_BYTES = 227 * 2**10  # shared memory per program on Hopper, for which the large tiles were chosen


class Candidates(NamedTuple, Generic[Config]):
    """A kernel's candidate configurations; the first is the default."""

    name: str
    large: tuple[Config, ...]
    small: Config  # for float32, and for GPUs with less shared memory than Hopper
    hopper: tuple[HopperConfig, ...] = ()  # of the kernel in `hopper.py`, also timed where it runs


HOPPER = (HopperConfig(group=4),)
UP = Candidates(
    "up",
    (UpConfig(group=4, flatten=True), UpConfig(flatten=True)),
    UpConfig(columns=32, depth=32, num_warps=4, num_stages=2),
    HOPPER,
)
DOWN = Candidates(
    "down",
    (GroupedConfig(flatten=True), GroupedConfig(group=4, flatten=True)),
    GroupedConfig(columns=64, depth=32, num_warps=4, num_stages=2),
    HOPPER,
)
DX = Candidates(
    "dx",
    (GroupedConfig(pieces=2, num_stages=4, group=4, flatten=True), GroupedConfig(pieces=2, num_stages=4, flatten=True)),
    GroupedConfig(columns=64, depth=32, num_warps=4, num_stages=2),
    HOPPER,
)
UP_BACKWARD = Candidates(
    "up_backward",
    (
        UpBackwardConfig(columns=256, group=4, num_warps=16, flatten=True),
        UpBackwardConfig(columns=256, num_warps=16, num_stages=3, flatten=True),
    ),
    UpBackwardConfig(columns=64, depth=32, num_warps=4, num_stages=2),
)
DW1 = Candidates(
    "dw1",
    (WeightGradConfig(pieces=2, num_stages=4, group=4, flatten=True),),
    WeightGradConfig(height=64, width=64, depth=32, num_warps=4, num_stages=2),
    (HopperConfig(),),
)
DW2 = Candidates("dw2", DW1.large, DW1.small, DW1.hopper)
NARROW = Candidates("narrow", (NarrowConfig(),), NarrowConfig(depth=32, num_stages=2))
NARROW_GRAD = Candidates("narrow_grad", (NarrowGradConfig(),), NarrowGradConfig(width=64, depth=32, num_stages=2))


def pick(
    candidates: Candidates[Config], problem: Problem, run: Callable[..., Result], *, plain: bool = False
) -> Result:
    """Run a kernel with the configuration that suits the problem.

    Args:
        candidates: of the kernel.
        problem: the shape, dtype and device.
        run: launches the kernel, given `config`. Timing calls it many times.
        plain: whether `hopper.py` implements this product.
    """
    choice: Config | HopperConfig | None = _fixed(candidates, problem)
    if choice is None:
        configs: tuple[Config | HopperConfig, ...] = candidates.large
        if plain and problem.dtype == "torch.bfloat16" and runs_gluon(problem.device):
            configs += candidates.hopper
        untimed = len(configs) == 1 or os.environ.get("LLMFOUNDRY_AUTOTUNE", "1") == "0"
        choice = configs[0 if untimed else _timed_choice(candidates.name, configs, problem, run)]
    return run(config=choice)


def _fixed(candidates: Candidates[Config], problem: Problem) -> Config | None:
    """Return the only configuration that fits, or None if there are several."""
    return candidates.small if problem.dtype == "torch.float32" or not holds_large(problem.device) else None


@cache
def holds_large(device: torch.device) -> bool:
    """Return whether a GPU has Hopper's shared memory, as data-center Blackwell (10.x) does; 8.x and 12.x do not."""
    if device.type != "cuda":
        return False
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0) >= LARGE_TILES_BYTES  # missing in torch's stubs


@cache
def runs_gluon(device: torch.device) -> bool:
    """Return whether `hopper.py` runs: on Hopper, with the Triton release whose experimental Gluon it uses."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return hopper and triton.__version__.startswith("3.6.")


_chosen: dict[tuple[str, int, Problem], int] = {}


def _timed_choice(
    name: str, configs: tuple[Config | HopperConfig, ...], problem: Problem, run: Callable[..., Result]
) -> int:
    bucket = problem.bucket()
    choice = _chosen.get((name, len(configs), bucket))
    if choice is not None:  # every launch comes here
        return choice
    versions = f"triton {triton.__version__} torch {torch.__version__}"
    key = (
        f"{name} {configs} turns {turns()} {bucket.dtype} D{bucket.d_model} "
        f"F{bucket.hidden}x{bucket.halves} E{bucket.n_experts} rows2^{bucket.n_rows} {versions}"
    )
    choice = _read(problem.device).get(key, len(configs))
    if choice >= len(configs):  # missing or damaged
        if torch.cuda.is_current_stream_capturing():
            return 0
        for _ in range(2):  # at its power limit, as in training, a card prefers other tiles than when it is cool
            times = [
                triton.testing.do_bench(partial(run, config=config), warmup=2, rep=10, return_mode="median")
                for config in configs
            ]
        choice = min(range(len(times)), key=times.__getitem__)
        _write(problem.device, {key: choice})
    _chosen[name, len(configs), bucket] = choice
    return choice


def _cache_file(device: torch.device) -> Path:
    return cache_root() / f"tiles {torch.cuda.get_device_name(device)}.json"


def _read(device: torch.device) -> dict[str, int]:
    try:
        return {key: whole_number(value) for key, value in read_mapping(_cache_file(device)).items()}
    except (OSError, ValueError):
        return {}


def _write(device: torch.device, new: dict[str, int]) -> None:
    path = _cache_file(device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, [json.dumps(_read(device) | new, indent=1).encode()], shared=True)
    except OSError as error:
        log.warning("tile choices are not kept: %s", error)
