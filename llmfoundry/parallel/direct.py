"""Gathers and reduces the experts of an FSDP unit without intermediate copies.

FSDP packs what a unit gathers: it casts this rank's shards into one buffer, copies that into the buffer of all ranks,
and copies each parameter out of it. Unsharded gradients are copied, as float32, into a buffer that is reduced. One
packed collective is right for many small parameters. But stacked experts are most of a mixture's bytes, and each tensor
is large. Here they are gathered one by one: the collective reads this rank's shard in the compute dtype and writes the
full parameter. For gradients, each rank sends every other rank its rows in the dtype of backward, half the bytes of
float32, and adds up what it receives in float32, in rank order. If the GPUs of a node can access each other's memory,
and weights are kept in the compute dtype, both are done by the GPUs' copy engines, which take no SMs from the matrix
products (peers.py).

This uses PyTorch's own hooks: an all-gather extension of the sharded parameter, a custom all-gather, and a gradient
hook of the unsharded parameter. FSDP still frees and reallocates the unsharded parameter. Its packed buffer holds one
value per expert tensor, which is never read.

Shapes: N ranks; a shard ("part") is 1/N of a parameter ("whole"), split evenly in dim 0.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter  # types of set_custom_*
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from llmfoundry import runtime
from llmfoundry.dtensor import local_part
from llmfoundry.kernels.accumulate import sum_parts
from llmfoundry.parallel.peers import Peers, Shared

log = logging.getLogger(__name__)

# torch 2.13 renamed reduce_scatter_tensor.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

MOST_RANKS = 8  # limit for exchanging gradient rows directly: a node's ranks. A ring is better for more.
WEIGHTS, GRADIENTS = 0, 1  # barrier channels of the compute stream and of the stream that reduces gradients


class Wanted(NamedTuple):
    """A parameter to be gathered."""

    whole: Tensor  # the full parameter, flat
    part: Tensor  # this rank's shard, flat
    shared: Shared | None  # the memory of the shard, if other ranks read it there


class Gather(AllGather):
    """The all-gather of a unit: FSDP's packed one, and one per directly gathered parameter."""

    def __init__(self) -> None:
        self.wanted: list[Wanted] = []

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        runtime.meet()
        wanted, self.wanted = self.wanted, []
        for whole, part, shared in wanted:
            with torch.autograd._unsafe_preserve_version_counter(whole):  # as FSDP does: graphs keep the parameter
                if shared is None:
                    runtime.all_gather(whole, part, group=group)
                else:
                    shared.gather(whole)
            if part.device.type == "cuda":  # may be a temporary cast, allocated on another stream
                part.record_stream(torch.cuda.current_stream())
        work: dist.Work | None = runtime.all_gather(output_tensor, input_tensor, group=group, async_op=async_op)
        return work


class Reduce(ReduceScatter):
    """FSDP's own reduce-scatter, preceded by `runtime.meet`."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> dist.Work | None:
        runtime.meet()
        work: dist.Work | None = reduce_scatter(output_tensor, input_tensor, group=group, op=op, async_op=async_op)
        return work


class _Sent(NamedTuple):
    """A gradient whose rows are being sent."""

    grad: Tensor
    done: torch.Event | None  # None if nothing runs asynchronously


class Inbox:
    """Double buffer where the other ranks write their gradient rows: one slot is filled while the other is summed."""

    def __init__(self, peers: Peers, slots: Sequence[Shared]) -> None:
        self._peers, self._slots, self._turn = peers, slots, 0

    @classmethod
    def of(cls, peers: Peers, n_bytes: int, device: torch.device) -> Inbox | None:
        """Allocate this rank's inbox. A collective; returns None on every rank if one of them lacks memory.

        Args:
            peers: the ranks that exchange gradients.
            n_bytes: size of the largest unsharded gradient.
            device: of the buffers.
        """
        size = n_bytes // peers.size * (peers.size - 1)
        slots = [peers.allocate(size, torch.uint8, device) for _ in range(2)]
        there = [slot for slot in slots if slot is not None]
        return cls(peers, there) if len(there) == len(slots) else None

    def holds(self, grad: Tensor) -> bool:
        return grad.nbytes // self._peers.size * (self._peers.size - 1) <= self._slots[0].of_rank[0].numel()

    def exchange(self, grad: Tensor) -> Tensor:
        """Send each other rank its rows of a gradient (N, n), and return the rows that this rank receives, (N - 1, n).

        One barrier waits until the slot is filled on all ranks. It also guarantees that each rank has summed the other
        slot, which is filled next.
        """
        (ranks, n), here = grad.shape, self._peers.rank
        slot, self._turn = self._slots[self._turn], 1 - self._turn
        for to in ((here + step) % ranks for step in range(1, ranks)):
            row = here - (here > to)  # a rank sends nothing to itself
            slot.of_rank[to].view(grad.dtype)[row * n : (row + 1) * n].copy_(grad[to], non_blocking=True)
        slot.barrier(GRADIENTS)
        return slot.of_rank[here].view(grad.dtype)[: (ranks - 1) * n].view(ranks - 1, n)


class Direct:
    """The directly gathered parameters of a model."""

    def __init__(self, *, by_copies: bool) -> None:
        """Initialize without parameters.

        Args:
            by_copies: whether to gather and send with copy engines, if possible.
        """
        self.parameters: list[Parameter] = []
        self.stream: torch.cuda.Stream | None = None  # the compute stream
        self.inboxes: dict[ProcessGroup, Inbox] = {}
        self._peers: dict[ProcessGroup, Peers | None] = {}
        self._by_copies = by_copies
        self._sent: deque[_Sent] = deque()

    def add(self, group: FSDPParamGroup, gather: Gather, modules: Collection[nn.Module]) -> None:
        """Gather the parameters of these modules directly, if they are split evenly in dim 0."""
        ranks = cast(FSDPMeshInfo, group.mesh_info).shard_mesh_size
        for each in group.fsdp_params if ranks > 1 else ():
            even = each.fsdp_placement.dim == 0 and each._orig_size[0] % ranks == 0
            if even and each._module_info.module in modules:
                self.parameters.append(Parameter(self, group, each, gather))

    def before_forward(self, module: nn.Module, inputs: tuple[object, ...]) -> None:
        """A forward pre-hook of the whole model that runs before those of FSDP."""
        if torch.cuda.is_available():
            self.stream = torch.cuda.current_stream()
        new = [each for each in self.parameters if each.extend()]
        if new and self._by_copies:
            self._share(new)
        self._meet()  # no rank may read a weight that another rank is still updating

    def before_backward(self) -> None:
        for parameter in self.parameters:
            parameter.watch()

    def sent(self, grad: Tensor, event: torch.Event | None) -> None:
        """Keep a gradient alive until its rows have been sent. At most two are in flight."""
        self._sent.append(_Sent(grad, event))
        while len(self._sent) > 2:
            self._wait()

    def after_backward(self) -> None:
        """Make the compute stream wait for all reductions."""
        self._wait_for_all()
        self._meet()  # no rank may update a weight that another rank is still reading

    def forget(self) -> None:
        """Free what an interrupted step had gathered or was sending."""
        self._wait_for_all()
        for parameter in self.parameters:
            parameter.forget()

    def _share(self, parameters: Sequence[Parameter]) -> None:
        """Move shards to memory that other ranks can read."""
        largest: dict[ProcessGroup, int] = {}
        for each in parameters:
            if each.group not in self._peers:
                self._peers[each.group] = Peers.of(each.group, each.device)
            peers = self._peers[each.group]
            if peers is not None and each.computes_as_kept:
                each.share(peers)
                if each.sums and each.shared is not None:
                    largest[each.group] = max(largest.get(each.group, 0), each.n_bytes)
        for group, n_bytes in largest.items():
            if (peers := self._peers[group]) is not None and group not in self.inboxes:
                inbox = Inbox.of(peers, n_bytes, parameters[0].device)
                if inbox is not None:
                    self.inboxes[group] = inbox
        copied = sum(each.shared is not None for each in parameters)
        if copied and runtime.is_rank0():
            log.info("copy engines gather %d of %d tensors of experts", copied, len(parameters))

    def _meet(self) -> None:
        """Make the compute stream wait for the compute streams of all ranks that share weights."""
        shared = {each.group: each.shared for each in self.parameters if each.shared is not None}
        for each in shared.values():
            runtime.meet()
            each.barrier(WEIGHTS)

    def _wait_for_all(self) -> None:
        while self._sent:
            self._wait()

    def _wait(self) -> None:
        done = self._sent.popleft().done
        if done is not None:
            torch.cuda.current_stream().wait_event(done)


class Parameter:
    """A directly gathered parameter."""

    def __init__(self, of: Direct, group: FSDPParamGroup, parameter: FSDPParam, gather: Gather) -> None:
        self._of, self._group, self._parameter, self._gather = of, group, parameter, gather
        self._whole: Tensor | None = None  # flat; its storage is freed and reallocated
        self._watched = False
        self.group: ProcessGroup = group._all_gather_process_group
        self.shared: Shared | None = None  # the memory of its shard, if other ranks read it there

    @property
    def device(self) -> torch.device:
        return self._parameter._sharded_local_tensor.device

    @property
    def computes_as_kept(self) -> bool:
        """Whether the shard is gathered without a cast."""
        return self._group.mp_policy.param_dtype in (None, self._parameter._sharded_local_tensor.dtype)

    @property
    def sums(self) -> bool:
        """Whether its gradients are reduced here rather than by FSDP."""
        mesh, trained = self._group.mesh_info.mesh, self._parameter.sharded_param.requires_grad
        return bool(trained and mesh.ndim == 1 and mesh.size() <= MOST_RANKS)

    @property
    def n_bytes(self) -> int:
        """Size of the unsharded parameter."""
        return self._parameter._sharded_local_tensor.nbytes * self.group.size()

    def extend(self) -> bool:
        """Install the all-gather extension on the sharded parameter.

        Returns:
            Whether the shard is new, as after leaving the meta device.
        """
        part = self._parameter._sharded_local_tensor
        new = not hasattr(part, "fsdp_pre_all_gather")
        if new:
            part.fsdp_pre_all_gather, part.fsdp_post_all_gather = self._before, self._after  # type: ignore[attr-defined]
            self.shared = None
        return new

    def share(self, peers: Peers) -> None:
        """Move the shard to memory that other ranks can read, if all of them have enough. A collective."""
        part = self._parameter._sharded_local_tensor
        if part.is_cuda:  # PyTorch's cache is not available to other allocators
            torch.cuda.empty_cache()
        self.shared = peers.allocate(part.numel(), part.dtype, part.device)
        if self.shared is None:
            return
        mine = self.shared.of_rank[peers.rank]
        part.data = mine.copy_(part.view(-1)).view(part.shape)
        self._parameter._sharded_param_data = mine

    def watch(self) -> None:
        """Hook the unsharded parameter's gradient from the next backward on. It exists after the first forward."""
        if not self._watched and hasattr(self._parameter, "_unsharded_param"):
            self._watched = True
            if self.sums:
                self._parameter._unsharded_param.register_post_accumulate_grad_hook(self._reduce)

    def forget(self) -> None:
        self._gather.wanted.clear()
        if self._whole is not None:
            self._whole.untyped_storage().resize_(0)

    def _before(
        self, mesh: DeviceMesh, size: torch.Size, stride: Sequence[int], module: nn.Module, policy: MixedPrecisionPolicy
    ) -> tuple[tuple[Tensor], None]:
        """Return what goes into FSDP's packed buffer; called before its all-gather."""
        parameter = self._parameter.sharded_param
        dtype = policy.param_dtype or parameter.dtype
        cuda = parameter.device.type == "cuda"
        if cuda:
            # The memory of `_whole` belongs to the compute stream, which may still be using it.
            torch.cuda.current_stream().wait_stream(self._stream())
        part = local_part(parameter.detach()).to(dtype).view(-1)
        with torch.cuda.stream(self._stream()) if cuda else nullcontext():
            if self._whole is None:
                self._whole = part.new_empty(part.numel() * mesh.size())
            elif self._whole.untyped_storage().size() == 0:
                self._whole.untyped_storage().resize_(self._whole.numel() * self._whole.itemsize)
        self._gather.wanted.append(Wanted(self._whole, part, self.shared))
        return (part[:1],), None

    def _stream(self) -> torch.cuda.Stream:
        assert self._of.stream is not None
        return self._of.stream

    def _after(
        self, packed: tuple[Tensor, ...], nothing: None, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor]] | None:
        """Return the unsharded parameter, and what FSDP frees with it; called after its all-gather."""
        assert self._whole is not None
        return (self._whole, (self._whole,)) if out is None else None

    def _reduce(self, whole: Tensor) -> None:
        """Reduce an unsharded gradient over ranks into this rank's shard."""
        if not self._group.reduce_grads or self._parameter.unsharded_accumulated_grad is not None:
            return  # FSDP accumulates unsharded gradients over microbatches, and reduces them
        assert whole.grad is not None
        grad = local_part(whole.grad).contiguous()
        whole.grad = None
        done = None
        if grad.device.type == "cuda":
            stream = self._group.comm_ctx.reduce_scatter_stream
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self.exchange(grad)
                done = stream.record_event()
        else:
            self.exchange(grad)
        self._of.sent(grad, done)

    def exchange(self, grad: Tensor) -> None:
        """Send the rows of an unsharded gradient to their ranks, and sum what arrives. Allocates everything first."""
        group, parameter = self._group._reduce_scatter_process_group, self._parameter.sharded_param
        rows, inbox = grad.view(group.size(), -1), self._of.inboxes.get(self.group)
        total = None if parameter.grad is None else local_part(parameter.grad)
        begins = total is None
        if total is None:
            total = grad.new_empty(self._parameter.sharded_size, dtype=torch.promote_types(grad.dtype, torch.float32))
        if inbox is not None and inbox.holds(grad):
            runtime.meet()
            sum_parts(total, rows[group.rank()], inbox.exchange(rows), group.rank(), begins=begins)
        else:
            received = torch.empty_like(rows)
            runtime.meet()
            dist.all_to_all_single(received, rows, group=group)
            sum_parts(total, None, received, 0, begins=begins)
        if begins:
            parameter.grad = self._parameter.to_sharded_dtensor(total)
