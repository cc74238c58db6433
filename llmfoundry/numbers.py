"""Copy numbers from the device to the host without making the host wait at once."""

from __future__ import annotations

import torch
from torch import Tensor


class Numbers:
    """Starts a copy of numbers when it is made. Reading them does not wait for work that is launched later.

    Args:
        found: (n,), results of the work launched so far.
    """

    def __init__(self, found: Tensor) -> None:
        self._there = found
        self._arrived: torch.cuda.Event | None = None
        if found.is_cuda:
            self._there = torch.empty(found.shape, dtype=found.dtype, pin_memory=True)
            self._there.copy_(found, non_blocking=True)
            self._arrived = torch.cuda.current_stream(found.device).record_event()

    def read(self) -> list[float]:
        """The numbers, whole ones as int; the host waits for them here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._there.tolist()
