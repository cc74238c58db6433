"""This rank's part of a tensor that may be sharded. The local part of a plain tensor is the tensor itself.

A sharded parameter is a `DTensor`. Code that handles both kinds calls these functions and does not test the type.
"""

from __future__ import annotations

from typing import NamedTuple, overload

import torch
from torch import Tensor
from torch.distributed.checkpoint.planner_helpers import _create_chunk_from_dtensor
from torch.distributed.tensor import DTensor


class LocalShard(NamedTuple):
    """The part of a tensor that this rank holds, and its position in the whole tensor."""

    local: Tensor  # the storage itself, detached
    shape: torch.Size  # of the whole tensor
    offsets: tuple[int, ...]  # of `local` in the whole, one per dim


@overload
def local_part(tensor: Tensor) -> Tensor: ...
@overload
def local_part(tensor: Tensor | None) -> Tensor | None: ...
def local_part(tensor: Tensor | None) -> Tensor | None:
    """The part of a tensor that this rank holds; gradients flow through. None (a missing parameter) stays None."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_shard(tensor: Tensor) -> LocalShard:
    """The part of a tensor that this rank holds, with its position in the whole tensor."""
    if not isinstance(tensor, DTensor):
        return LocalShard(tensor.detach(), tensor.shape, (0,) * tensor.dim())
    # Only this line depends on how FSDP over expert parallelism strides its shards. torch's function for it is private;
    # the parity tests would show a change.
    return LocalShard(tensor.to_local().detach(), tensor.shape, tuple(_create_chunk_from_dtensor(tensor).offsets))


def cut_like(tensor: Tensor, local: Tensor) -> Tensor:
    """Wrap `local` as this rank's part of a tensor that is sharded like `tensor`; an unsharded last dim may differ."""
    if not isinstance(tensor, DTensor):
        return local
    alike = local.shape == tensor.to_local().shape
    shape = tensor.shape if alike else torch.Size((*tensor.shape[:-1], local.shape[-1]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, tensor.device_mesh, tensor.placements, run_check=False, shape=shape, stride=stride)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, on the CPU and detached. If it is sharded, this is a collective that every rank must call."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()
