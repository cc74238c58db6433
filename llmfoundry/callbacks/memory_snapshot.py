"""`memory_snapshot`: who holds a GPU's memory, as a file for https://pytorch.org/memory_viz.

callbacks:
  memory_snapshot: {interval: 100ba}   # `save_folder/memory/step-100-rank-0.pickle`; without an interval, only
                                       # `out-of-memory-rank-R.pickle` when an allocation fails
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from pydantic import Field

from llmfoundry import runtime
from llmfoundry.train.callback import Callback, CallbackConfig, Metrics, Run
from llmfoundry.train.duration import Duration

log = logging.getLogger(__name__)


class MemorySnapshotConfig(CallbackConfig, names=("memory_snapshot", "oom_observer")):
    """Records every allocation with its stack; a few percent slower. Does nothing on a CPU."""

    interval: Duration | None = None  # None: only when memory runs out
    max_entries: int = Field(100_000, ge=1)  # allocations kept

    def build(self) -> MemorySnapshot:
        return MemorySnapshot(self)


class MemorySnapshot(Callback):
    """Writes to `save_folder/memory`, on every rank."""

    def __init__(self, config: MemorySnapshotConfig) -> None:
        self.config = config
        self._recording = False

    def fit_start(self, trainer: Run) -> None:
        if trainer.device.type != "cuda":
            return
        torch.cuda.memory._record_memory_history(max_entries=self.config.max_entries)
        self._recording = True
        path = self._path(trainer, "out-of-memory")

        def out_of_memory(device: int, asked: int, total: int, free: int) -> None:
            log.error("out of memory: %.2f GiB asked for, %.2f GiB free of %.2f; who held it: %s",
                      asked / 2**30, free / 2**30, total / 2**30, path)  # fmt: skip
            self._dump(path)

        torch._C._cuda_attach_out_of_memory_observer(out_of_memory)  # type: ignore[attr-defined]

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        due = self.config.interval is not None and trainer.timeline.due(self.config.interval, trainer.state.step)
        if self._recording and due:
            self._dump(self._path(trainer, f"step-{trainer.state.step}"))

    def close(self) -> None:
        if self._recording:
            torch.cuda.memory._record_memory_history(enabled=None)
            self._recording = False

    def _path(self, trainer: Run, name: str) -> Path:
        return Path(trainer.config.save_folder) / "memory" / f"{name}-rank-{runtime.rank()}.pickle"

    def _dump(self, path: Path) -> None:
        try:
            path.parent.mkdir(exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(path))
        except OSError as error:
            log.warning("%s cannot be written: %s; the run goes on", path, error.strerror)
