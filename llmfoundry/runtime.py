"""The process: its rank, device, seeds, reductions and clock-free facts about the hardware.

One process is the same code as many: every reduction is the identity until `start` has made a process group.
"""

from __future__ import annotations

import atexit
import datetime
import hashlib
import os
import random
import resource
import sys
from collections.abc import Callable
from typing import NoReturn, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

T = TypeVar("T")

# Huge pages for large tensors in host memory: fresh 4 KiB pages cost as much as the arithmetic on them (a training step
# on a CPU takes 8 % longer). torch reads it at its first large allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# Segments of GPU memory that grow. With experts divided, buffers have another size in every step, and FSDP's gathered
# weights come and go between them: of fixed segments, 12 of 79 GiB were reserved and of no use. Read at the first
# allocation on a GPU.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the old name of the same
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

# Dense bf16 TFLOP/s without sparsity, from the vendors' datasheets; the first name found in the device's name counts.
_PEAK_BF16_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.4,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.2,
}


def rank() -> int:
    """This process's number in the world, 0 when alone."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Processes in the run, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_rank0() -> bool:
    """Whether this process speaks and writes for all."""
    return rank() == 0


def device() -> torch.device:
    """The accelerator of this process, or the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def start(timeout_seconds: float = 600.0, *, alone_too: bool = False) -> torch.device:
    """Choose the device and, under torchrun, join the process group (NCCL on GPUs, gloo on CPUs).

    Args:
        timeout_seconds: after which a collective that some rank has not joined fails on the others.
        alone_too: whether a process alone is a group of one, which FSDP needs.
    """
    place = device()
    if place.type == "cuda":
        torch.cuda.set_device(place)
        torch.backends.cuda.matmul.allow_tf32 = False
    if (world_size() > 1 or alone_too) and not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo",
            timeout=datetime.timedelta(seconds=timeout_seconds),
            device_id=place if place.type == "cuda" else None,
            store=None if world_size() > 1 else dist.HashStore(),
            rank=rank(),
            world_size=world_size(),
        )
    return place


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process; one of several does not tear its interpreter down first.

    Meshes that DTensor's caches remember keep gloo's threads past `stop`, and a thread that lets go of a tensor while
    the interpreter is torn down aborts the process: a rank in some thousands would fail after its work is done.

    Args:
        code: the exit code.
    """
    if "RANK" not in os.environ:  # alone
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce_sum(tensor: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Sum `tensor` over the ranks of `group` (all ranks when None), in place; the identity in one process."""
    if dist.is_initialized():
        dist.all_reduce(tensor, group=group)
    return tensor


def any_rank(flag: bool) -> bool:
    """Whether `flag` holds on any rank; every rank gets the same answer."""
    if not dist.is_initialized():
        return flag
    value = torch.tensor(int(flag))
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def on_rank0(ask: Callable[[], T]) -> T:
    """Run `ask` on rank 0; every rank gets its answer, or the exception that it raised, so that none waits for it."""
    outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
    if is_rank0():
        try:
            outcome[0] = ask(), None
        except Exception as failure:
            outcome[0] = None, failure
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    answer, error = outcome[0]
    if error is not None:
        raise error
    return cast(T, answer)


def seed_of(*parts: str | int) -> int:
    """A 63-bit seed from any parts, by SHA-256: the same on every machine and Python version."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") & (2**63 - 1)


def generator(place: torch.device | str, *parts: str | int) -> torch.Generator:
    """A generator on `place` seeded by `seed_of(parts)`."""
    return torch.Generator(place).manual_seed(seed_of(*parts))


def seed_all(seed: int) -> None:
    """Seed Python's, numpy's and torch's global generators, for third parties: our own code draws from `generator`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def peak_flops(place: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device by its datasheet; None for a CPU or a device not in the table."""
    if place.type != "cuda":
        return None
    name = torch.cuda.get_device_name(place)
    return next((tflops * 1e12 for key, tflops in _PEAK_BF16_TFLOPS.items() if key in name), None)


def peak_memory_bytes(place: torch.device) -> int:
    """Most bytes held at once so far: allocated on a GPU, resident in a CPU process."""
    if place.type == "cuda":
        return torch.cuda.max_memory_allocated(place)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
