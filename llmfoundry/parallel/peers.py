"""Memory of one GPU that the other GPUs of its node read and write, moved by copy engines.

A collective of NCCL runs on SMs, and everything beside it slows down: on two H200s, while weights were gathered at 154
GB/s, a product of experts took 1.31 times as long. Copied by the GPUs' copy engines they came at 370 GB/s, and the same
product took 1.04 times as long. Copies need memory that is mapped on all GPUs (torch.distributed._symmetric_memory),
and their own signals: `Shared.barrier` runs on a stream, and the host waits for nothing.

Shapes: N ranks in a group.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, _symmetric_memory

from llmfoundry import runtime

log = logging.getLogger(__name__)


class Shared(NamedTuple):
    """Memory of the same size on each rank."""

    rank: int  # this one
    of_rank: list[Tensor]  # N of them, flat
    handle: _symmetric_memory._SymmetricMemory

    def gather(self, whole: Tensor) -> None:
        """Copy all of it, in the order of ranks; each rank begins with another one, so that all links are used."""
        ranks = len(self.of_rank)
        parts = whole.view(ranks, -1)
        for rank in ((self.rank + step) % ranks for step in range(1, ranks + 1)):
            parts[rank].copy_(self.of_rank[rank], non_blocking=True)

    def barrier(self, channel: int) -> None:
        """Let the current stream wait until a stream of every rank is here.

        What those streams copied before is there after it. Barriers of streams that run beside each other use other
        channels.
        """
        self.handle.barrier(channel=channel)


class Peers:
    """The ranks of a group whose GPUs reach each other's memory."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = group.rank(), group.size()

    @classmethod
    def of(cls, group: ProcessGroup, device: torch.device) -> Peers | None:
        """Those of a group, or None where a GPU does not reach another, or may not. A collective."""
        if group.size() == 1 or device.type != "cuda" or dist.get_backend(group) == "fake":  # fake: the plan's
            return None
        here, n_local = runtime.rank() // runtime.local_world_size(), runtime.local_world_size()
        others = [rank for rank in dist.get_process_group_ranks(group) if rank != runtime.rank()]
        reached = torch.cuda.device_count() >= n_local and all(
            rank // n_local == here and torch.cuda.can_device_access_peer(device, rank % n_local) for rank in others
        )
        if _agreed(reached, group, device):
            try:
                reached = cls(group).allocate(1, torch.uint8, device) is not None
            except RuntimeError as error:  # a container that forbids it, say
                log.warning("GPUs of this node cannot share memory, so NCCL gathers experts: %s", error)
                reached = False
        return cls(group) if _agreed(reached, group, device) else None

    def allocate(self, n: int, dtype: torch.dtype, device: torch.device) -> Shared | None:
        """Memory for `n` values on each rank, unset. A collective.

        Returns:
            None on every rank where one of them has not as much left: the others would wait for it.
        """
        mine: Tensor | None = None
        try:
            mine = self._own(n, dtype, device)
        except RuntimeError as error:
            log.warning("no memory to share with GPUs of this node, so NCCL moves what it was for: %s", error)
        there = _agreed(mine is not None, self.group, device)
        return self._shared(mine) if there and mine is not None else None

    def _own(self, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return _symmetric_memory.empty(n, dtype=dtype, device=device)

    def _shared(self, mine: Tensor) -> Shared:
        handle = _symmetric_memory.rendezvous(mine, self.group)
        runtime.count_memory(mine.nbytes)  # torch's allocator does not know of it
        others = (handle.get_buffer(rank, mine.shape, mine.dtype) for rank in range(self.size))
        return Shared(self.rank, [mine if rank == self.rank else each for rank, each in enumerate(others)], handle)


def _agreed(flag: bool, group: ProcessGroup, device: torch.device) -> bool:
    flags = torch.tensor(int(flag), device=device)
    dist.all_reduce(flags, dist.ReduceOp.MIN, group=group)
    return bool(flags.item())
