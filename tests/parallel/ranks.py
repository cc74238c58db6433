"""Several real processes on one machine, joined by gloo: what the tests of this room run on."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import torch
import torch.multiprocessing as mp

from llmfoundry import runtime


def run_ranks(world: int, job: Callable[..., None], *args: object) -> None:
    """Run `job(*args)` in `world` processes that form a gloo group; raises what any of them raises."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(_rank, (world, port, job, args), nprocs=world, start_method="spawn")


def _rank(rank: int, world: int, port: int, job: Callable[..., None], args: tuple[object, ...]) -> None:
    here = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": rank}
    os.environ.update({key: str(value) for key, value in here.items()}, CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    runtime.start(timeout_seconds=60)
    try:
        job(*args)
    finally:
        runtime.stop()
