"""Rows of gradients in the memory of three ranks, a rank whose memory cannot be shared, and one that does not come."""

from __future__ import annotations

import logging
import os
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from shared_memory import PeersOnCPU
from torch import Tensor

from llmfoundry import runtime
from llmfoundry.kernels.accumulate import sum_parts
from llmfoundry.parallel import peers
from llmfoundry.parallel.direct import Inbox
from llmfoundry.parallel.peers import Shared

pytestmark = pytest.mark.dist
RANKS, N = 3, 5
CPU = torch.device("cpu")


class Full(PeersOnCPU):
    """The second rank's memory is full."""

    def _own(self, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.rank == 1:
            raise RuntimeError("CUDA driver error: out of memory")
        return super()._own(n, dtype, device)


class Unmapped(PeersOnCPU):
    """The second rank fails at once where ranks meet to map each other's memory."""

    def _shared(self, mine: Tensor) -> Shared:
        if self.rank == 1:
            raise RuntimeError("CUDA driver error: invalid device context\nC++ CapturedTraceback: ...")
        return super()._shared(mine)


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def job(folder: Path) -> None:
    group = dist.group.WORLD
    assert group is not None
    here = group.rank()
    assert Full(group).allocate(N, torch.uint8, CPU) is None
    assert Inbox.of(Full(group), RANKS * N * 2, CPU) is None
    rows_of_gradients(group)
    fails_on_one(group)
    sockets(group, folder)

    shared = PeersOnCPU(group).allocate(1, torch.uint8, CPU)
    assert shared is not None
    runtime.set_timeout(0.5)
    if here != 1:  # a peer that died
        begun = time.monotonic()
        with pytest.raises(RuntimeError, match=r"[Tt]imed out|closed by peer"):
            shared.barrier(0)
        assert time.monotonic() - begun < 5.0
    runtime.set_timeout(60.0)
    runtime.barrier()


def rows_of_gradients(group: dist.ProcessGroup) -> None:
    here = group.rank()
    inbox = Inbox.of(PeersOnCPU(group), RANKS * N * 2, CPU)
    assert inbox is not None
    assert not inbox.holds(torch.empty(RANKS, N)), "float32 values take twice as much"
    for number in range(5):  # each slot is filled more than once, the last time by a smaller gradient
        n = N if number < 4 else 2
        grads = [torch.randn(RANKS, n, generator=torch.Generator().manual_seed(8 * number + rank)).bfloat16()
                 for rank in range(RANKS)]  # fmt: skip
        total = torch.empty(n)
        sum_parts(total, grads[here][here], inbox.exchange(grads[here]), here, begins=True)
        assert torch.equal(total, grads[0][here].float() + grads[1][here] + grads[2][here])


def fails_on_one(group: dist.ProcessGroup) -> None:
    """The others stop waiting, all agree, and one of them says it once; they do not wait again."""
    said = Lines()
    logging.getLogger(peers.__name__).addHandler(said)
    unmapped, begun = Unmapped(group), time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peers, "MEETING", 0.5)
        assert unmapped.allocate(N, torch.uint8, CPU) is None
    assert 0.4 < time.monotonic() - begun < 10.0 or group.rank() == 1
    begun = time.monotonic()
    assert unmapped.allocate(N, torch.uint8, CPU) is None
    assert Inbox.of(PeersOnCPU(group), RANKS, CPU) is None
    assert time.monotonic() - begun < 2.0, "ranks do not meet again, for they count differently"
    why = "rank 1: CUDA driver error: invalid device context"
    line = f"GPUs of this node cannot share memory, so NCCL moves what it was for ({why})"
    assert said.lines[:1] == ([line] if group.rank() == 0 else [])
    assert len(said.lines) == (2 if group.rank() == 0 else 0), "one line of each group"
    peers.Peers.broken = ""
    PeersOnCPU.meetings = 9


def sockets(group: dist.ProcessGroup, folder: Path) -> None:
    """Torch's rendezvous would wait without a timeout, or write behind the name's end."""
    own = Path(f"{folder}/symm_mem-{os.getpid()}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as left:
            left.bind(str(own))
            assert not PeersOnCPU(group).can_meet(), "it is in use"
        assert own.exists() and PeersOnCPU(group).can_meet() and not own.exists(), "left by a killed process"
        if group.rank() == 1:
            patch.setenv("TMPDIR", "/tmp")
        assert not PeersOnCPU(group).can_meet(), "each rank has another folder"
        patch.setenv("TMPDIR", str(folder / ("deep" * 30)))
        assert not PeersOnCPU(group).can_meet(), "its name is too long"
        patch.setenv("TMPDIR", str(folder / "none"))
        assert not PeersOnCPU(group).can_meet(), "it is not there"


def test_rows_of_three_ranks_and_a_rank_that_cannot_share_its_memory_or_does_not_come(tmp_path: Path) -> None:
    run_ranks([RANKS], job, tmp_path)
