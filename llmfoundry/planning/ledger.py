"""Counts the bytes of all live tensors while a step is simulated, by kind and by moment."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import NamedTuple, Self, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from llmfoundry.moe.all_gather import AllGather
from llmfoundry.parallel import direct

aten, c10d = torch.ops.aten, torch.ops.c10d


class Memory(NamedTuple):
    """Bytes on one GPU at one moment, by purpose."""

    weights: float = 0.0  # weights: this GPU's share
    optimizer: float = 0.0  # optimizer state of the same share
    gradients: float = 0.0  # finished gradients, whole or this GPU's share, and the buffers that sum them over GPUs
    gathered: float = 0.0  # whole weights in the compute dtype, in use or being gathered
    activations: float = 0.0  # allocated in forward
    temporaries: float = 0.0  # allocated in backward, including recomputed activations

    @property
    def total(self) -> float:
        """The sum over all purposes."""
        return sum(self)

    def extrapolated(self, longer: Self, steps: float) -> Memory:
        """Extrapolate linearly from here through `longer`, which is at `steps` = 1."""
        return Memory(*(a + steps * (b - a) for a, b in zip(self, longer, strict=True)))


Kind = int  # a field of Memory, by its number
WEIGHTS, OPTIMIZER, GRADIENTS, GATHERED, ACTIVATIONS, TEMPORARIES = range(6)


class Moment(NamedTuple):
    """A part of a step, from one boundary between blocks to the next."""

    part: str  # forward or backward
    block: int  # -1: outside the blocks, before the first in forward and after it in backward


class Received(NamedTuple):
    """One collective."""

    operation: str
    ranks: tuple[int, ...]  # number of ranks of its group
    bytes: int  # bytes that this rank holds after it (gather, exchange), or puts in (reduce)


class Ledger(TorchDispatchMode):
    """Counts every tensor that an operator returns until its storage is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.paused = False  # whether inside a fused kernel, which writes no intermediate results
        self.kind: Kind = WEIGHTS  # kind of what is allocated now
        self.moment = Moment("forward", -1)
        # Memory after each allocation: one list for each time that a moment occurs (once or more per microbatch).
        self.held: dict[Moment, list[list[Memory]]] = {}
        self.received: list[Received] = []
        self.bodies: dict[object, Callable[..., object]] = {}  # implementations of operators whose allocations count
        self.parameters: list[Tensor] = []
        self.on_host = False  # whether parameters, gradients and optimizer state are in host memory
        self._sizes: dict[int, tuple[int, Kind]] = {}
        self._now = [0] * len(Memory._fields)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Compiled code may run under this mode."""
        return True

    def enter(self, moment: Moment, kind: Kind) -> None:
        """Begin the next moment of the step."""
        for parameter in self.parameters:
            if parameter.grad is not None and (key := _storage(parameter.grad)._cdata) in self._sizes:
                self._move(key, GRADIENTS)
                if self.on_host:
                    self._resize(key, 0)
        self.moment, self.kind = moment, kind
        self.held.setdefault(moment, []).append([Memory(*self._now)])

    def restart(self) -> None:
        """Forget what was recorded so far, but keep the live tensors."""
        self.held, self.received = {self.moment: [[Memory(*self._now)]]}, []

    def count(self, tensor: Tensor) -> None:
        """Add a tensor that was allocated, or whose size has changed."""
        storage = _storage(tensor)
        key = storage._cdata
        if key not in self._sizes:
            weakref.finalize(storage, self._freed, key)
            self._sizes[key] = (0, self._kind_by_caller())
        self._resize(key, 0 if self.on_host and self._sizes[key][1] in (WEIGHTS, OPTIMIZER) else storage.nbytes())

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Note that the size of a storage has changed: FSDP frees and fills gathered weights this way."""
        if storage._cdata in self._sizes:
            self._resize(storage._cdata, storage.nbytes())

    def _resize(self, key: int, size: int) -> None:
        before, kind = self._sizes[key]
        self._sizes[key] = (size, kind)
        self._now[kind] += size - before
        if size > before:
            self.held.setdefault(self.moment, [[]])[-1].append(Memory(*self._now))

    def _move(self, key: int, kind: Kind) -> None:
        size, before = self._sizes[key]
        self._sizes[key] = (size, kind)
        self._now[before] -= size
        self._now[kind] += size

    def _freed(self, key: int) -> None:
        size, kind = self._sizes.pop(key)
        self._now[kind] -= size

    def _kind_by_caller(self) -> Kind:
        """Return the kind of a new tensor. FSDP's buffers are recognized by the torch function that allocates them."""
        if self.kind in (WEIGHTS, OPTIMIZER):
            return self.kind
        frame: FrameType | None = sys._getframe(2)
        fsdp = False
        for _ in range(20):
            if frame is None:
                break
            name = frame.f_code.co_name
            if "_fully_shard" in frame.f_code.co_filename:
                fsdp = True
                if name in ("post_backward", "foreach_reduce", "finalize_backward"):
                    return GRADIENTS
            elif _called_by(direct.Parameter.exchange, frame):  # sums whole gradients over ranks
                return GRADIENTS
            elif name == "cast_forward":
                return GATHERED
            elif fsdp:
                return GATHERED
            elif name == "forward":
                break
            frame = frame.f_back
        return GATHERED if fsdp else self.kind

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return 1  # tensors have no values here, and a step reads one: whether the gradient is finite
        if func in _RECEIVED:
            collective = _RECEIVED[func](*args)
            if func is c10d.alltoall_base_.default and _called_by(direct.Parameter.exchange, sys._getframe(1)):
                collective = collective._replace(operation="reduce")
            if func is c10d._allgather_base_.default and _called_by(AllGather.to_experts, sys._getframe(1)):
                collective = collective._replace(operation="tokens")
            self.received.append(collective)
        body = self.bodies.get(func)
        if body is not None:
            with self:
                result = body(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        if not self.paused:
            for part in tree_iter(result):
                if isinstance(part, Tensor):
                    self.count(part)
        return result


def _called_by(function: Callable[..., object], frame: FrameType | None) -> bool:
    """Return whether a function is among the near callers; modes of recompute may stand between."""
    for _ in range(16):
        if frame is None:
            return False
        if frame.f_code is function.__code__:
            return True
        frame = frame.f_back
    return False


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()


def _collective(operation: str, tensor: int, group: int) -> Callable[..., Received]:
    """Records a collective; `tensor` and `group` are the positions of these arguments."""

    def entered(*args: object) -> Received:
        whole = sum(part.nbytes for part in tree_iter(args[tensor]) if isinstance(part, Tensor))
        ranks = dist.get_process_group_ranks(dist.ProcessGroup.unbox(cast(torch.ScriptObject, args[group])))
        return Received(operation, tuple(ranks), whole)

    return entered


_RECEIVED = {
    c10d._allgather_base_.default: _collective("gather", 0, 2),
    c10d._reduce_scatter_base_.default: _collective("reduce", 1, 2),
    c10d.allreduce_.default: _collective("replicate", 0, 1),
    c10d.alltoall_base_.default: _collective("tokens", 0, 2),
}
