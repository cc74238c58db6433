"""GPU memory that the other GPUs of a node can read and write, using copy engines.

NCCL's collectives run on SMs and slow down concurrent kernels: on two H200s, while weights were gathered at 154 GB/s,
an expert product took 1.31 times as long. With copy engines, weights were gathered at 370 GB/s, and the same product
took 1.04 times as long. The copies need memory that is mapped on all GPUs (torch.distributed._symmetric_memory), and
their own synchronization: `Shared.barrier` runs on a stream, and the host does not wait.

Shapes: N ranks in a group.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from contextlib import suppress
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, _symmetric_memory

from llmfoundry import runtime

log = logging.getLogger(__name__)

MEETING = 60.0  # maximum seconds that ranks wait for each other to map memory
WAITED = "another rank did not come"  # the reason on a rank that was ready
LONGEST_NAME = 107  # maximum bytes of a Unix socket's name


class Shared(NamedTuple):
    """Memory of the same size on each rank of a group."""

    rank: int  # this rank
    of_rank: list[Tensor]  # N tensors, flat
    handle: _symmetric_memory._SymmetricMemory

    def gather(self, whole: Tensor) -> None:
        """Gather the memory of all ranks, in rank order. Each rank starts with another one, to use all links."""
        ranks = len(self.of_rank)
        parts = whole.view(ranks, -1)
        for rank in ((self.rank + step) % ranks for step in range(1, ranks + 1)):
            parts[rank].copy_(self.of_rank[rank], non_blocking=True)

    def barrier(self, channel: int) -> None:
        """Make the current stream wait until a stream of every rank has reached this barrier.

        What those streams copied before the barrier is visible after it. Barriers of concurrent streams use different
        channels. NCCL's watchdog does not see them: a GPU that waits longer than the timeout of collectives ends the
        process by a CUDA error, which the host sees when it next waits for that GPU.
        """
        self.handle.barrier(channel=channel, timeout_ms=round(1000 * runtime.timeout()))


class Peers:
    """The ranks of a group whose GPUs can access each other's memory."""

    broken = ""  # why this process maps no more memory: PyTorch counts rendezvous, and ranks may differ in it

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = group.rank(), group.size()
        self._warned = False

    @classmethod
    def of(cls, group: ProcessGroup, device: torch.device) -> Peers | None:
        """Return the peers of a group, or None if some GPU cannot, or may not, access another. A collective."""
        if group.size() == 1 or device.type != "cuda" or dist.get_backend(group) == "fake":  # fake: used for planning
            return None
        here, n_local = runtime.rank() // runtime.local_world_size(), runtime.local_world_size()
        others = [rank for rank in dist.get_process_group_ranks(group) if rank != runtime.rank()]
        reached = torch.cuda.device_count() >= n_local and all(
            rank // n_local == here and torch.cuda.can_device_access_peer(device, rank % n_local) for rank in others
        )
        if not _agreed(reached, group, device):
            return None
        peers = cls(group)
        # A container may forbid access.
        return peers if peers.can_meet() and peers.allocate(1, torch.uint8, device) is not None else None

    def can_meet(self) -> bool:
        """Return whether the sockets work by which PyTorch passes memory handles between ranks. A collective.

        Otherwise, ranks would wait for a missing socket without a timeout, with the interpreter's lock held.
        """
        why, folder = "", _folder_of_sockets()
        try:
            _try_socket(folder)
        except OSError as error:
            why = f"{folder}: {error.strerror or error}"
        folders: list[str] = [""] * self.size
        dist.all_gather_object(folders, folder, group=self.group)
        if len(set(folders)) > 1:
            why = why or f"TMPDIR differs between ranks of this node ({', '.join(sorted(set(folders)))})"
        return not self._failed(why)

    def allocate(self, n: int, dtype: torch.dtype, device: torch.device) -> Shared | None:
        """Allocate memory for `n` values on each rank, uninitialized. A collective.

        Returns:
            The memory, or None on every rank if it failed on one, e.g. for lack of memory.
        """
        mine, shared, why = None, None, Peers.broken
        try:
            mine = self._own(n, dtype, device) if not why else None
        except RuntimeError as error:
            why = _first_line(error)
        if self._failed(why) or mine is None:
            return None
        try:
            with runtime.waits_for_ranks(_together()):
                shared = self._shared(mine)
        except RuntimeError as error:
            why = WAITED if isinstance(error, dist.DistStoreError) else _first_line(error)
        if self._failed(why) or shared is None:
            Peers.broken = why or "another rank failed"
            return None
        runtime.count_memory(mine.nbytes)  # PyTorch's allocator does not count it
        return shared

    def _failed(self, why: str) -> bool:
        """Return whether any rank has a reason; the first reason is logged, once. A collective."""
        reasons: list[str] = [""] * self.size
        dist.all_gather_object(reasons, why, group=self.group)
        ranks = dist.get_process_group_ranks(self.group)
        found = [f"rank {rank}: {reason}" for rank, reason in zip(ranks, reasons, strict=True) if reason]
        if found and self.rank == 0 and not self._warned:
            cause = next((each for each in found if WAITED not in each), found[0])  # others only waited for it
            log.warning("GPUs of this node cannot share memory, so NCCL moves what it was for (%s)", cause)
            self._warned = True
        return bool(found)

    def _own(self, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return _symmetric_memory.empty(n, dtype=dtype, device=device)

    def _shared(self, mine: Tensor) -> Shared:
        handle = _symmetric_memory.rendezvous(mine, self.group)
        others = (handle.get_buffer(rank, mine.shape, mine.dtype) for rank in range(self.size))
        return Shared(self.rank, [mine if rank == self.rank else each for rank, each in enumerate(others)], handle)


def _agreed(flag: bool, group: ProcessGroup, device: torch.device) -> bool:
    flags = torch.tensor(int(flag), device=device)
    dist.all_reduce(flags, dist.ReduceOp.MIN, group=group)
    return bool(flags.item())


def _together() -> float:
    """Return the seconds that ranks wait for each other to map memory. All arrive at once, and then agree by NCCL."""
    return min(MEETING, runtime.timeout() / 4)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _folder_of_sockets() -> str:
    """Return the folder where PyTorch's rendezvous creates its sockets."""
    return next((os.environ[name] for name in ("TMPDIR", "TMP", "TEMP", "TEMPDIR") if name in os.environ), "/tmp")


def _try_socket(folder: str) -> None:
    """Create a socket as PyTorch's rendezvous does; remove one left by a killed process with the same process id.

    Raises:
        OSError: if the socket cannot be created, or its name is too long, which PyTorch does not check.
    """
    name = f"{folder}/symm_mem-{os.getpid()}"
    if len(os.fsencode(name)) > LONGEST_NAME:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as mine:
        with suppress(ConnectionRefusedError, FileNotFoundError):
            mine.connect(name)
            raise OSError(errno.EADDRINUSE, f"{os.strerror(errno.EADDRINUSE)}: {name}")
        with suppress(FileNotFoundError):
            os.unlink(name)
        mine.bind(name)
        os.unlink(name)
