"""Peers on a CPU: the memory that ranks share is a file of each, mapped by all. What GPUs do by copy engines."""

from __future__ import annotations

import itertools
import os
import tempfile
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from llmfoundry.parallel.peers import Peers, Shared

_numbers = itertools.count()


class _Handle(NamedTuple):
    group: ProcessGroup

    def barrier(self, channel: int) -> None:
        dist.barrier(self.group)


class PeersOnCPU(Peers):
    """Processes of one machine."""

    allocated: int = 0  # pieces of memory, by all groups

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
        names: list[str] = [""] * self.size
        dist.all_gather_object(names, self._name, group=self.group)
        of_rank = [torch.from_file(each, shared=True, size=mine.numel(), dtype=mine.dtype) for each in names]
        dist.barrier(self.group)
        os.unlink(self._name)
        return Shared(self.rank, of_rank, _Handle(self.group))  # type: ignore[arg-type]
