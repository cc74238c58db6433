"""Peers on a CPU: the memory that ranks share is a file of each, mapped by all. What GPUs do by copy engines."""

from __future__ import annotations

import datetime
import itertools
import os
import tempfile
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, distributed_c10d

from llmfoundry.parallel.peers import Peers, Shared

_numbers = itertools.count()


class _Handle(NamedTuple):
    group: ProcessGroup

    def barrier(self, channel: int, timeout_ms: int) -> None:
        options = dist.BarrierOptions()
        options.timeout = datetime.timedelta(milliseconds=timeout_ms)
        self.group.barrier(options).wait()


class PeersOnCPU(Peers):
    """Processes of one machine."""

    allocated: int = 0  # pieces of memory, by all groups
    meetings: int = 0  # of this process, as torch counts them

    @classmethod
    def of(cls, group: ProcessGroup, device: torch.device) -> Peers | None:
        return cls(group) if group.size() > 1 else None

    def _own(self, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        PeersOnCPU.allocated += 1
        self._name = os.path.join(tempfile.gettempdir(), f"shared-{os.getpid()}-{next(_numbers)}")
        with open(self._name, "wb") as file:
            file.truncate(n * dtype.itemsize)
        return torch.from_file(self._name, shared=True, size=n, dtype=dtype)

    def _shared(self, mine: Tensor) -> Shared:
        """By the ranks' common store, as torch's rendezvous does it."""
        store = dist.PrefixStore(
            f"{PeersOnCPU.meetings}/{self.group.group_name}", distributed_c10d._get_default_store()
        )
        PeersOnCPU.meetings += 1
        store.set(str(self.rank), self._name)
        names = [name.decode() for name in store.multi_get([str(rank) for rank in range(self.size)])]
        of_rank = [torch.from_file(each, shared=True, size=mine.numel(), dtype=mine.dtype) for each in names]
        dist.barrier(self.group)
        os.unlink(self._name)
        return Shared(self.rank, of_rank, _Handle(self.group))  # type: ignore[arg-type]
