"""Feed a run's rows to the device; the next step's rows are read while the device works on the current step."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from llmfoundry.data.loader import Batch, Loader
from llmfoundry.parallel.mesh import Mesh


class _Ahead(NamedTuple):
    start_row: int
    batch: Batch


@dataclass
class Feed:
    """This rank's part of each global batch."""

    loader: Loader
    rows: int  # of the global batch
    mesh: Mesh
    device: torch.device
    _ahead: _Ahead | None = field(default=None, init=False)

    def take(self, start_row: int) -> Batch:
        """The rows of the step that starts at row `start_row`, from the rows read ahead if they match."""
        ahead, self._ahead = self._ahead, None
        return ahead.batch if ahead is not None and ahead.start_row == start_row else self._read(start_row)

    def read_ahead(self, start_row: int) -> float:
        """Read the rows of the next step while the device works on this one. Errors are raised by the next step.

        Returns:
            Seconds that it took if the device finished this step in the meantime, because then it may have waited; else
            0.
        """
        begun, done = time.perf_counter(), torch.cuda.Event() if self.device.type == "cuda" else None
        if done is not None:
            done.record()
        with suppress(Exception):
            self._ahead = _Ahead(start_row, self._read(start_row))
        return time.perf_counter() - begun if done is None or done.query() else 0.0

    def _read(self, start_row: int) -> Batch:
        return self.loader.batch(start_row, self.rows, self.mesh.data_rank, self.mesh.data_ranks).to(self.device)
