"""Experts of an FSDP unit, gathered and summed without copies in between.

FSDP packs what a unit gathers: it casts this rank's parts into one buffer, copies that into the buffer of all ranks,
and copies each parameter out of it; whole gradients are copied, as float32, into a buffer that is reduced. For many
small parameters one packed collective is right. But stacked experts are most of a mixture's bytes, and each is large.
They are gathered one by one: the collective reads this rank's part in the compute dtype and writes the whole parameter.
Of gradients each rank sends every other one its rows in the dtype of backward, half the bytes of float32, and adds up
what it gets in float32, in the order of ranks. Where the GPUs of a node reach each other's memory, and weights are kept
in the compute dtype, both are copies by their copy engines, which take no SM from the products (peers.py).

All of it is by torch's hooks: an all-gather extension of the parameter's part, a custom all-gather, and a hook of the
whole parameter's gradient. FSDP still frees and restores the whole; its packed buffer has one value of each expert
tensor, which nobody reads.

Shapes: N ranks; a part is 1/N of a parameter, cut evenly in dim 0.
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
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter  # what set_custom_... take
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from llmfoundry import runtime
from llmfoundry.dtensor import local_part
from llmfoundry.kernels.accumulate import sum_parts
from llmfoundry.parallel.peers import Peers, Shared

log = logging.getLogger(__name__)

# torch 2.13 renamed it.
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

MOST_RANKS = 8  # that send each other rows of gradients: those of a node. A ring is better for more.
WEIGHTS, GRADIENTS = 0, 1  # channels of barriers: of the stream that computes, and of the one that sums


class Wanted(NamedTuple):
    """A parameter that is to be gathered."""

    whole: Tensor  # flat
    part: Tensor  # flat, this rank's
    shared: Shared | None  # what the part lies in, if other ranks read it there


class Gather(AllGather):
    """The all-gather of a unit: FSDP's packed one, and one for each parameter that is gathered directly."""

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
            if part.device.type == "cuda":  # it may be a cast, allocated for another stream
                part.record_stream(torch.cuda.current_stream())
        work: dist.Work | None = runtime.all_gather(output_tensor, input_tensor, group=group, async_op=async_op)
        return work


class Reduce(ReduceScatter):
    """FSDP's own reduce-scatter, after a meeting."""

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
    """A gradient whose rows are on their way."""

    grad: Tensor
    done: torch.Event | None  # None where nothing runs later


class Inbox:
    """Where the other ranks of a group write their rows of gradients: one slot is filled while the other is summed."""

    def __init__(self, peers: Peers, slots: Sequence[Shared]) -> None:
        self._peers, self._slots, self._turn = peers, slots, 0

    @classmethod
    def of(cls, peers: Peers, n_bytes: int, device: torch.device) -> Inbox | None:
        """That of this rank; None on every rank where memory is short on one. A collective.

        Args:
            n_bytes: of the largest gradient of a whole parameter.
        """
        size = n_bytes // peers.size * (peers.size - 1)
        slots = [peers.allocate(size, torch.uint8, device) for _ in range(2)]
        there = [slot for slot in slots if slot is not None]
        return cls(peers, there) if len(there) == len(slots) else None

    def holds(self, grad: Tensor) -> bool:
        return grad.nbytes // self._peers.size * (self._peers.size - 1) <= self._slots[0].of_rank[0].numel()

    def exchange(self, grad: Tensor) -> Tensor:
        """Send each other rank its rows of a gradient, (N, n) -> (N - 1, n), what the others send to this one.

        There is one barrier, after the slot is filled on all ranks. It also says that each rank has summed the other
        slot, which is filled next.
        """
        (ranks, n), here = grad.shape, self._peers.rank
        slot, self._turn = self._slots[self._turn], 1 - self._turn
        for to in ((here + step) % ranks for step in range(1, ranks)):
            row = here - (here > to)  # a rank sends itself nothing
            slot.of_rank[to].view(grad.dtype)[row * n : (row + 1) * n].copy_(grad[to], non_blocking=True)
        slot.barrier(GRADIENTS)
        return slot.of_rank[here].view(grad.dtype)[: (ranks - 1) * n].view(ranks - 1, n)


class Direct:
    """The parameters of a model that are gathered directly."""

    def __init__(self, *, by_copies: bool) -> None:
        """Args: by_copies: whether copy engines may gather and send, where they can."""
        self.parameters: list[Parameter] = []
        self.stream: torch.cuda.Stream | None = None  # that computes
        self.inboxes: dict[ProcessGroup, Inbox] = {}
        self._peers: dict[ProcessGroup, Peers | None] = {}
        self._by_copies = by_copies
        self._sent: deque[_Sent] = deque()

    def add(self, group: FSDPParamGroup, gather: Gather, modules: Collection[nn.Module]) -> None:
        """Gather the parameters of these modules directly, those that are cut evenly in dim 0."""
        ranks = cast(FSDPMeshInfo, group.mesh_info).shard_mesh_size
        for each in group.fsdp_params if ranks > 1 else ():
            even = each.fsdp_placement.dim == 0 and each._orig_size[0] % ranks == 0
            if even and each._module_info.module in modules:
                self.parameters.append(Parameter(self, group, each, gather))

    def before_forward(self, module: nn.Module, inputs: tuple[object, ...]) -> None:
        """A hook of the whole model, before those of FSDP."""
        if torch.cuda.is_available():
            self.stream = torch.cuda.current_stream()
        new = [each for each in self.parameters if each.extend()]
        if new and self._by_copies:
            self._share(new)
        self._meet()  # no rank reads a weight that another still updates

    def before_backward(self) -> None:
        for parameter in self.parameters:
            parameter.watch()

    def sent(self, grad: Tensor, event: torch.Event | None) -> None:
        """Keep a gradient until its rows have left. Those of two parameters are on their way at once."""
        self._sent.append(_Sent(grad, event))
        while len(self._sent) > 2:
            self._wait()

    def after_backward(self) -> None:
        """Let the stream that computes wait for all sums."""
        self._wait_for_all()
        self._meet()  # no rank updates a weight that another still reads

    def forget(self) -> None:
        """Free what a step that was left in the middle had gathered or was sending."""
        self._wait_for_all()
        for parameter in self.parameters:
            parameter.forget()

    def _share(self, parameters: Sequence[Parameter]) -> None:
        """Put parts where other ranks read them."""
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
        """Let the stream that computes wait for those of all ranks that read each other's weights."""
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
    """One that is gathered directly."""

    def __init__(self, of: Direct, group: FSDPParamGroup, parameter: FSDPParam, gather: Gather) -> None:
        self._of, self._group, self._parameter, self._gather = of, group, parameter, gather
        self._whole: Tensor | None = None  # flat; its storage comes and goes
        self._watched = False
        self.group: ProcessGroup = group._all_gather_process_group
        self.shared: Shared | None = None  # what its part lies in, where other ranks read it there

    @property
    def device(self) -> torch.device:
        return self._parameter._sharded_local_tensor.device

    @property
    def computes_as_kept(self) -> bool:
        """Whether the part is gathered as it is."""
        return self._group.mp_policy.param_dtype in (None, self._parameter._sharded_local_tensor.dtype)

    @property
    def sums(self) -> bool:
        """Whether its gradients are summed here, and not by FSDP."""
        mesh, trained = self._group.mesh_info.mesh, self._parameter.sharded_param.requires_grad
        return bool(trained and mesh.ndim == 1 and mesh.size() <= MOST_RANKS)

    @property
    def n_bytes(self) -> int:
        """Of the whole."""
        return self._parameter._sharded_local_tensor.nbytes * self.group.size()

    def extend(self) -> bool:
        """Make FSDP ask here for what it gathers.

        Returns:
            Whether the part is new: a model that leaves the meta device has new ones.
        """
        part = self._parameter._sharded_local_tensor
        new = not hasattr(part, "fsdp_pre_all_gather")
        if new:
            part.fsdp_pre_all_gather, part.fsdp_post_all_gather = self._before, self._after  # type: ignore[attr-defined]
            self.shared = None
        return new

    def share(self, peers: Peers) -> None:
        """Move the part into memory that other ranks read, if there is enough on all of them. A collective."""
        part = self._parameter._sharded_local_tensor
        if part.is_cuda:  # what is cached there is not free for memory of another allocator
            torch.cuda.empty_cache()
        self.shared = peers.allocate(part.numel(), part.dtype, part.device)
        if self.shared is None:
            return
        mine = self.shared.of_rank[peers.rank]
        part.data = mine.copy_(part.view(-1)).view(part.shape)
        self._parameter._sharded_param_data = mine

    def watch(self) -> None:
        """Take the whole parameter's gradients from the next backward on; there is one after the first forward."""
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
        """Before FSDP's all-gather: what goes into its packed buffer."""
        parameter = self._parameter.sharded_param
        dtype = policy.param_dtype or parameter.dtype
        cuda = parameter.device.type == "cuda"
        if cuda:
            # The memory of the whole belongs to the stream that computes, which may still use what it was before.
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
        """After it: the whole parameter, and what FSDP frees with it."""
        assert self._whole is not None
        return (self._whole, (self._whole,)) if out is None else None

    def _reduce(self, whole: Tensor) -> None:
        """Sum a whole gradient over ranks into this rank's part of it."""
        if not self._group.reduce_grads or self._parameter.unsharded_accumulated_grad is not None:
            return  # FSDP keeps whole sums of microbatches, and reduces them
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
        """Send the rows of a whole gradient to their ranks, and add up what arrives. All is allocated before."""
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
