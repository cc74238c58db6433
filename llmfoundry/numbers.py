"""Numbers on their way from the device to the host, which goes on meanwhile."""

from __future__ import annotations

import torch
from torch import Tensor


class Numbers:
    """Begins to copy numbers when it is made; what is launched after that need not end before they are read.

    Args:
        found: (n,), the results of what was launched so far.
    """

    def __init__(self, found: Tensor) -> None:
        self._there = found
        self._arrived: torch.cuda.Event | None = None
        if found.is_cuda:
            self._there = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            self._there.copy_(found, non_blocking=True)
            self._arrived = torch.cuda.current_stream(found.device).record_event()

    def read(self) -> Tensor:
        """The numbers, on the host, which waits for them here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._there
