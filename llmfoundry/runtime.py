"""This process: its rank, device, seeds and reductions, and its hardware's peak FLOP/s and memory.

The same code runs on one process and on many: before `start` creates a process group, every reduction is the identity.
"""

from __future__ import annotations

import datetime
import faulthandler
import hashlib
import logging
import os
import pickle
import random
import resource
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup, distributed_c10d
from torch.distributed.rendezvous import rendezvous

from llmfoundry.config import ConfigError
from llmfoundry.launch import is_rank0 as is_rank0
from llmfoundry.launch import leave as leave
from llmfoundry.launch import local_rank as local_rank
from llmfoundry.launch import local_world_size as local_world_size
from llmfoundry.launch import rank as rank
from llmfoundry.launch import world_size as world_size
from llmfoundry.tree import Tree

T = TypeVar("T")
log = logging.getLogger(__name__)
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13

# Gloo connects two ranks at their first message, instead of each to every other at the start: 4,096 ranks would have
# 4,095 sockets each, for every group over all of them.
os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")

# Huge pages for large tensors in host memory: with pages of 4 KiB, a training step on a CPU takes 8 % longer. torch
# reads this at its first large allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
# Segments of GPU memory that can grow. With expert parallelism, the sizes of buffers change in every step, and FSDP's
# gathered weights are allocated and freed between them: with fixed segments, 12 of 79 GiB were reserved but unusable.
# torch reads this at its first allocation on a GPU.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the variable's old name
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

# Dense bf16 TFLOP/s from the vendors' datasheets; the first name that the device's name contains counts.
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

_SAID_AFTER = 15.0  # seconds that a process waits for another one's fetch before it logs that


class _Planted(NamedTuple):
    """The main thread's tree."""

    over: ProcessGroup
    tree: Tree


# The state of this process; only functions of this module change it.
_timeout = 600.0  # seconds, of `start` or `set_timeout`
STDERR = 2  # file descriptor; sys.stderr may be replaced or closed
_store: dist.Store | None = None  # the store through which ranks found each other
_planted: _Planted | None = None
_trees = 0  # made so far
_meeting = False  # whether `together` runs
_at_the_source = True  # whether to ask the hub; see `first_of_node`
_mapped = 0  # bytes of GPU memory that bypass torch's allocator


def cache_root(cache_dir: str | None = None) -> Path:
    """Return the folder of tokenizers, token shards and tile choices.

    It is `cache_dir`, else $LLMFOUNDRY_CACHE, else `~/.cache/llmfoundry`; for a user without a home directory, a folder
    in the system's temporary folder.
    """
    root = os.path.expanduser(cache_dir or os.environ.get("LLMFOUNDRY_CACHE") or "~/.cache/llmfoundry")
    if root.startswith("~"):
        root = os.path.join(tempfile.gettempdir(), f"llmfoundry-{os.getuid()}")
    return Path(root).absolute()


def device() -> torch.device:
    """Return the accelerator of this process, or the CPU."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def start(timeout_seconds: float = 600.0, *, group_of_one: bool = False) -> torch.device:
    """Choose the device and, under torchrun, join the process group (NCCL on GPUs, gloo on CPUs).

    Args:
        timeout_seconds: seconds after which a collective fails that some rank has not joined.
        group_of_one: create a process group for a single process too, which FSDP needs.
    """
    global _timeout, _store
    _timeout = timeout_seconds
    place, timeout = device(), datetime.timedelta(seconds=timeout_seconds)
    if place.type == "cuda":
        torch.cuda.set_device(place)
        torch.backends.cuda.matmul.allow_tf32 = False
    if (world_size() > 1 or group_of_one) and not dist.is_initialized():
        _store = _store_of_attempt(timeout) if world_size() > 1 else None
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo",
            timeout=timeout,
            device_id=place if place.type == "cuda" else None,
            store=dist.HashStore() if _store is None else _store,
            rank=rank(),
            world_size=world_size(),
        )
    return place


def store_for_a_thread() -> dist.Store | None:
    """Return the ranks' store over a separate connection, which other threads cannot block; None for one process."""
    if _store is None or not dist.is_initialized():
        return None
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.PrefixStore(f"watch/{_attempt()}", dist.TCPStore(*place, is_master=False, wait_for_workers=False))


def timeout() -> float:
    """Seconds after which a collective of the main thread fails if some rank has not joined it."""
    return _timeout


@contextmanager
def waits_for_ranks(seconds: float) -> Iterator[None]:
    """What asks the ranks' common store in here waits so long for another rank.

    C++ that waits for a rank in another way, with the interpreter's lock held, ends the process at the timeout of
    collectives: no thread of Python could.

    Raises:
        dist.DistStoreError: a rank did not come.
    """
    store = distributed_c10d._get_default_store()
    before = store.timeout  # type: ignore[attr-defined]  # torch's stub lacks it
    store.set_timeout(datetime.timedelta(seconds=seconds))
    faulthandler.dump_traceback_later(_timeout, exit=True, file=STDERR)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()  # the watchdog's own comes again when it next looks
        store.set_timeout(before)


def set_timeout(seconds: float) -> None:
    """Change the time after which a collective of the main thread fails that some rank has not joined."""
    global _timeout
    _timeout = seconds
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)
    if (ranks := tree()) is not None:
        ranks.set_timeout(seconds)


def tree() -> Tree | None:
    """Return the tree of all ranks for messages between their main threads; None for a single process."""
    global _planted
    if not dist.is_initialized() or world_size() == 1 or dist.get_backend() == "fake":
        return None
    world = dist.group.WORLD
    assert world is not None
    if _planted is None or _planted.over is not world:
        _planted = _Planted(world, plant(_timeout))
    return _planted.tree


def plant(timeout: float) -> Tree:
    """Create another tree of all ranks, which call this together: each thread that sends messages needs its own.

    Args:
        timeout: seconds to wait for a message.
    """
    global _trees
    _trees += 1
    store = dist.PrefixStore(f"tree-{_trees}", distributed_c10d._get_default_store())
    return Tree(store, dist.get_rank(), dist.get_world_size(), timeout)


def _store_of_attempt(timeout: datetime.timedelta) -> dist.Store:
    """Return the store where ranks find each other, a separate one for each attempt of `torchrun --max-restarts`.

    torchrun's own store outlives the ranks (pytorch/pytorch#135712): a second attempt would find the addresses of the
    first, where nothing listens any more. torchrun's restart count is the same for all ranks of a single node only: of
    several nodes, only the one that failed counts. There, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 gives each attempt a
    store of its own.
    """
    store, _, _ = next(rendezvous("env://", rank(), world_size(), timeout=timeout))
    return dist.PrefixStore(f"attempt-{_attempt()}", store)


def _attempt() -> str:
    one_node = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_node else "all"


def stop() -> None:
    """Leave the process group."""
    global _planted
    _planted = None
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for every rank."""
    any_rank(False)


ELSEWHERE = "on another rank"  # the text of an `OutOfMemory` where this rank's memory was enough


class OutOfMemory(RuntimeError):
    """Some rank ran out of memory in `together`; raised on all ranks."""

    held: object = None  # what this rank held, for the report


class _Elsewhere(RuntimeError):
    """Another rank has run out of memory and will not join the collective that this one is about to start."""


def meet() -> None:
    """Called before each collective of a forward or backward. Inside `together`, all ranks leave here if one has to.

    It costs a reduction on the host, but only inside `together`.
    """
    if _meeting and any_rank(False):
        raise _Elsewhere


def together(run: Callable[[], T]) -> T:
    """Run a forward and backward that all ranks leave together if one runs out of memory.

    Every collective in it must be preceded by `meet` on every rank, so that none waits for a rank that has left.

    Raises:
        OutOfMemory: on every rank, after the memory held by `run` is free.
    """
    global _meeting
    _meeting, why, told = world_size() > 1, "", False
    try:
        result = run()
    except torch.OutOfMemoryError as error:
        why = str(error)
    except _Elsewhere:
        why, told = ELSEWHERE, True
    finally:
        _meeting = False
    # Outside the handlers, because the traceback would keep every tensor of the frames alive.
    if not told and any_rank(bool(why)):
        why = why or ELSEWHERE
    if why:
        raise OutOfMemory(why)
    return result


def all_reduce_sum(tensor: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Sum `tensor` over the ranks of `group` (None: all ranks), in place; a single process leaves it unchanged."""
    if dist.is_initialized():
        meet()
        dist.all_reduce(tensor, group=group)
    return tensor


def of_ranks(values: Sequence[float]) -> Tensor:
    """Gather values from every rank: (ranks, n) float64; all ranks call this together."""
    rows = torch.zeros(world_size(), len(values), dtype=torch.float64)
    rows[rank()] = torch.tensor(values, dtype=torch.float64)
    ranks = tree()
    return rows if ranks is None else ranks.reduce(rows, dist.ReduceOp.SUM)


def any_rank(flag: bool) -> bool:
    """Return whether `flag` is set on any rank; every rank gets the same answer."""
    return bool(most_of_ranks([flag])[0])


def most_of_ranks(values: Sequence[float]) -> list[float]:
    """Return the maximum of each value over all ranks, in one reduction; every rank gets the same."""
    ranks = tree()
    if ranks is None:
        return list(values)
    return ranks.reduce(torch.tensor(values, dtype=torch.float64), dist.ReduceOp.MAX).tolist()


def of_each_rank(value: T) -> list[T]:
    """Gather an object from every rank, in order of rank; all get the same."""
    ranks = tree()
    return [value] if ranks is None else ranks.all_gather(value)


def on_rank0(ask: Callable[[], T], ranks: Tree | None = None) -> T:
    """Run `ask` on rank 0. Every rank returns its result or raises its exception, so that none waits for it.

    Args:
        ranks: the tree to use; None: the main thread's.
    """
    outcome: tuple[T | None, Exception | None] = (None, None)
    if is_rank0():
        try:
            outcome = ask(), None
        except Exception as failure:
            outcome = None, failure
    ranks = ranks or tree()
    if ranks is not None and outcome[1] is not None:
        outcome = None, _for_others(outcome[1])
    answer, error = outcome if ranks is None else ranks.broadcast(outcome)
    if error is not None:
        raise error
    return cast(T, answer)


def _for_others(error: Exception) -> Exception:
    """Return an exception that can be sent to other processes: many libraries' exceptions cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def asks_hub() -> bool:
    """Return whether to ask the hub; if not, another process of this node has put the files into the cache."""
    return _at_the_source


def first_of_node(what: str, act: Callable[[], T]) -> T:
    """Run `act` on every rank, first on one rank of each node; the others find in the cache what that one fetched.

    The hub refuses a thousand ranks that ask for the same tokenizer. The others wait for as long as it takes.

    Args:
        what: what is fetched, for messages; the same on every rank.

    Raises:
        ConfigError: if the first rank failed.
    """
    global _at_the_source
    if _store is None or not dist.is_initialized():
        return act()
    key, waited = f"first/{socket.gethostname()}/{os.environ.get('GROUP_RANK', '')}/{what}", 0
    if local_rank() == 0:
        said = "failed"
        try:
            answer, said = act(), "done"
            return answer
        finally:
            _store.set(key, said)
    while True:
        try:
            _store.wait([key], datetime.timedelta(seconds=_SAID_AFTER))
            break
        except RuntimeError:  # not there yet, or the store is gone with its host
            waited += int(_SAID_AFTER)
            if not _store.check([key]) and local_rank() == 1:
                log.warning("waiting for another process of this node, which fetches %s, for %d seconds", what, waited)
    if _store.get(key) != b"done":
        raise ConfigError(f"{what}: could not be loaded by rank {rank() - local_rank()}, which says why")
    _at_the_source = False
    try:
        return act()
    finally:
        _at_the_source = True


def agreed(act: Callable[[], T], ranks: Tree | None = None) -> T:
    """Run `act` on every rank. If it fails on any, all raise the exception of the first, so that none continues alone.

    Args:
        ranks: as in `on_rank0`.
    """
    answer: T | None = None
    error: Exception | None = None
    try:
        answer = act()
    except Exception as failure:
        error = failure
    ranks = ranks or tree()
    if ranks is not None:
        # Usually nothing fails: then only one number is exchanged instead of each rank's message.
        failed = ranks.reduce(torch.tensor([float(error is not None)]), dist.ReduceOp.MAX)
        if bool(failed):
            told = _for_others(error) if error is not None else None
            error = ranks.broadcast(next((each for each in ranks.gather(told) if each is not None), None))
    if error is not None:
        raise error
    return cast(T, answer)


def all_or_none(act: Callable[[], T]) -> T:
    """Run `act`, which contains collectives, on every rank. If it fails on any, all ranks leave it and raise.

    Every collective in it must be preceded by `meet` on every rank. For an `act` without collectives, use `agreed`.
    """
    global _meeting
    answer: T | None = None
    error: Exception | None = None
    told, before, _meeting = False, _meeting, world_size() > 1
    try:
        answer = act()
    except _Elsewhere:
        told = True
    except Exception as failure:
        error = failure
    finally:
        _meeting = before
    if told or any_rank(error is not None):
        errors = of_each_rank(_for_others(error) if error is not None else None)
        raise error or next(each for each in errors if each is not None)
    return cast(T, answer)


def seed_of(*parts: str | int) -> int:
    """Return a seed of 63 bits from any parts, by SHA-256: the same on every machine and Python version."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "little") & (2**63 - 1)


def generator(place: torch.device | str, *parts: str | int) -> torch.Generator:
    """Return a generator on `place` seeded by `seed_of(parts)`."""
    return torch.Generator(place).manual_seed(seed_of(*parts))


def seed_all(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch for third-party code; our own draws from `generator`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def peak_flops(place: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device by its datasheet; None for a CPU or a device that is not in the table."""
    if place.type != "cuda":
        return None
    name = torch.cuda.get_device_name(place)
    return next((tflops * 1e12 for key, tflops in _PEAK_BF16_TFLOPS.items() if key in name), None)


def count_memory(n_bytes: int) -> None:
    """Record permanent allocations of GPU memory that bypass torch's allocator."""
    global _mapped
    _mapped += n_bytes


def shares_memory() -> bool:
    """Whether GPUs of this node read each other's memory, and wait for each other without a collective."""
    return _mapped > 0


def memory_stats(place: torch.device) -> dict[str, int]:
    """`torch.cuda.memory_stats`, with memory recorded by `count_memory` added to allocated, active and reserved."""
    stats = dict(torch.cuda.memory_stats(place))
    for kind in ("allocated", "active", "reserved"):
        for key in (f"{kind}_bytes.all.current", f"{kind}_bytes.all.peak"):
            stats[key] = stats.get(key, 0) + _mapped
    return stats


def peak_memory_bytes(place: torch.device) -> int:
    """Peak memory so far, in bytes: allocated on a GPU, or resident in a CPU process."""
    if place.type == "cuda":
        return memory_stats(place)["allocated_bytes.all.peak"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
