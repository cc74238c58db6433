"""Small messages among the processes of a run, over a tree of small groups, so that no process is connected to all.

A gloo group connects each member to every other and reduces in a ring. With 4,096 ranks that is 4,095 sockets in every
process, and 8,190 sequential messages for each number that ranks agree on. Here FANOUT neighbours form a group, the
first ranks of the groups form the groups of the next level, and so on up to a single one:

    ranks 0-15, 16-31, ... 4080-4095      0, 16, ... 240    256, 272, ...      0, 256, ... 3840

A rank has at most FANOUT - 1 connections per level, and an agreement goes up and down once. Tensors of a step use the
groups of the mesh instead.
"""

from __future__ import annotations

import datetime
import pickle
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
FANOUT = 16


def levels(rank: int, world: int) -> list[range]:
    """The groups of ranks that a rank belongs to, lowest first; it is the first rank of each but the last."""
    found, step = [], 1
    while step < world and rank % step == 0:
        first = rank // (step * FANOUT) * (step * FANOUT)
        found.append(range(first, min(world, first + step * FANOUT), step))
        step *= FANOUT
    return found


class Tree:
    """All ranks of a run; each calls the same methods in the same order, in one thread.

    Args:
        store: a store for this tree alone.
        timeout: seconds to wait for a message.
    """

    def __init__(self, store: dist.Store, rank: int, world: int, timeout: float) -> None:
        own = levels(rank, world)
        self._in_top = not own or own[-1].step * FANOUT >= world
        self._groups = [_group(store, ranks, rank, timeout) for ranks in own if len(ranks) > 1]
        self._rank, self._world = rank, world

    def set_timeout(self, seconds: float) -> None:
        """Change how long to wait for a message."""
        for group in self._groups:
            group._set_default_timeout(datetime.timedelta(seconds=seconds))  # type: ignore[attr-defined]  # of gloo

    def reduce(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        """Reduce a CPU tensor over all ranks, in place."""
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp(op)
        for group in self._groups:
            group.allreduce([tensor], options).wait()
        for group in reversed(self._groups[:-1] if self._in_top else self._groups):
            _broadcast(group, tensor)
        return tensor

    def broadcast(self, value: T) -> T:
        """Return rank 0's value."""
        content = _pickled(value) if self._rank == 0 else torch.empty(0, dtype=torch.uint8)
        size = torch.tensor([content.numel()])
        for group in reversed(self._groups):
            _broadcast(group, size)
        if self._rank != 0:
            content = torch.empty(int(size), dtype=torch.uint8)
        for group in reversed(self._groups):
            _broadcast(group, content)
        return value if self._rank == 0 else pickle.loads(content.numpy().tobytes())

    def gather(self, value: T) -> list[T]:
        """Gather the values of all ranks, in order of rank, on rank 0; other ranks get an empty list."""
        found = [value]
        for group in self._groups:
            if group.rank() > 0:
                content = _pickled(found)
                group.send([torch.tensor([content.numel()])], 0, 0).wait()
                group.send([content], 0, 0).wait()
                return []
            for other in range(1, group.size()):
                size = torch.empty(1, dtype=torch.int64)
                group.recv([size], other, 0).wait()
                content = torch.empty(int(size), dtype=torch.uint8)
                group.recv([content], other, 0).wait()
                found += pickle.loads(content.numpy().tobytes())
        return found if self._rank == 0 else []

    def all_gather(self, value: T) -> list[T]:
        """Gather the values of all ranks, in order of rank. Its cost grows with the number of ranks: not for steps."""
        return self.broadcast(self.gather(value))


def _group(store: dist.Store, ranks: range, rank: int, timeout: float) -> dist.ProcessGroup:
    own = dist.PrefixStore(f"{ranks.start}/{ranks.step}", store)
    made = dist.ProcessGroupGloo(own, ranks.index(rank), len(ranks), datetime.timedelta(seconds=timeout))
    return cast(dist.ProcessGroup, made)  # it has the methods, which torch's stub lacks


def _broadcast(group: dist.ProcessGroup, tensor: Tensor) -> None:
    """Broadcast from the first member of a group to the others."""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    group.broadcast([tensor], options).wait()


def _pickled(value: object) -> Tensor:
    """Pickle a value; only processes of this run read it."""
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
