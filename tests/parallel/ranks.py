"""Several real processes on one machine, joined by gloo: what the tests of this room run on."""

from __future__ import annotations

import logging
import os
import random
import socket
from collections.abc import Callable, Sequence

import torch

from llmfoundry import runtime
from tests import forks


def run_ranks(worlds: Sequence[int], job: Callable[..., None], *args: object) -> None:
    """Run `job(*args)` in worlds of so many processes, one after the other; raises what any process raises.

    Args:
        worlds: sizes, falling: a process that is not in the next world ends.
    """
    assert list(worlds) == sorted(worlds, reverse=True)
    ports = [free_port() for _ in worlds]
    forks.in_processes(_rank, (worlds, ports, job, args), worlds[0])


def _rank(
    rank: int, worlds: Sequence[int], ports: list[int], job: Callable[..., None], args: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # says how slow gathering for a test is
    here = {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
    os.environ.update(here)
    for world, port in zip(worlds, ports, strict=True):
        if rank >= world:
            break
        os.environ.update(WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world), MASTER_PORT=str(port))
        runtime.start(timeout_seconds=60)
        try:
            job(*args)
        finally:
            runtime.stop()
    runtime.leave(0)


def free_port() -> int:
    """A port that nobody listens at, below those that the system gives to connections: none takes it meanwhile."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
