"""Rows of gradients in the memory of three ranks, and a rank that has none left to share."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from shared_memory import PeersOnCPU
from torch import Tensor

from llmfoundry.kernels.accumulate import sum_parts
from llmfoundry.parallel.direct import Inbox

pytestmark = pytest.mark.dist
RANKS, N = 3, 5
CPU = torch.device("cpu")


class Full(PeersOnCPU):
    """The second rank's memory is full."""

    def _own(self, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.rank == 1:
            raise RuntimeError("CUDA driver error: out of memory")
        return super()._own(n, dtype, device)


def job() -> None:
    group = dist.group.WORLD
    assert group is not None
    here = group.rank()
    assert Full(group).allocate(N, torch.uint8, CPU) is None
    assert Inbox.of(Full(group), RANKS * N * 2, CPU) is None

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


def test_rows_of_three_ranks_and_a_rank_without_memory() -> None:
    run_ranks([RANKS], job)
