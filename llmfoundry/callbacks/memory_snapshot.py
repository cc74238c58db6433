"""`memory_snapshot`: records what holds a GPU's memory, as a file for https://pytorch.org/memory_viz.

    callbacks:
      memory_snapshot: {interval: 100ba}   # `save_folder/memory/step-100-rank-0.pickle`; without an interval, only
                                           # `out-of-memory-rank-R.pickle` when an allocation fails

On demand: after `touch save_folder/memory/request`, every rank writes one at the end of its step.

Composer's keys set other file names: {folder: "{run_name}/torch_traces", filename:
"rank{rank}.{batch}.memory_snapshot"}.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
from pydantic import Field, field_validator

from llmfoundry.config import PathPattern
from llmfoundry.train.callback import Callback, CallbackConfig, Metrics, Run
from llmfoundry.train.duration import Interval

log = logging.getLogger(__name__)
REQUEST = "request"


class MemorySnapshotConfig(CallbackConfig, names=("memory_snapshot", "oom_observer")):
    """Records every allocation with its stack, which costs a few percent of speed. Does nothing on a CPU."""

    interval: Interval | None = None  # interval between snapshots; None: only when memory runs out, or on demand
    skip_batches: int = Field(0, ge=0)  # steps before the first snapshot
    folder: PathPattern | None = None  # None: save_folder/memory
    filename: PathPattern | None = None  # may contain {rank}, {batch} and other placeholders
    remote_file_name: str | None = None  # not supported: snapshots are not uploaded
    overwrite: bool = False  # accepted, without effect: each step has its own file
    max_entries: int = Field(100_000, ge=1)  # maximum number of recorded allocations

    @field_validator("remote_file_name")
    @classmethod
    def _stays_here(cls, value: str | None) -> str | None:
        if value:
            raise ValueError("files are not uploaded here; leave it out")
        return value

    def build(self) -> MemorySnapshot:
        return MemorySnapshot(self)


class MemorySnapshot(Callback):
    """Writes snapshots to `save_folder/memory`, on every rank."""

    def __init__(self, config: MemorySnapshotConfig) -> None:
        self.config = config
        self._recording = False
        self._request, self._asked, self._looked = Path(), 0.0, 0.0  # the file, its mtime, the last check

    def fit_start(self, trainer: Run) -> None:
        if trainer.device.type != "cuda":
            log.warning("memory_snapshot: no GPU is used, so nothing is recorded")
            return
        torch.cuda.memory._record_memory_history(max_entries=self.config.max_entries)
        self._recording = True
        path = self.path(trainer, "out-of-memory")
        self._request = path.with_name(REQUEST)
        try:
            self._request.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            log.warning("%s cannot be made: %s; training continues", self._request.parent, error.strerror)
        self._asked = self._time_of_request()

        def out_of_memory(device: int, asked: int, total: int, free: int) -> None:
            log.error("out of memory: %.2f GiB asked for, %.2f GiB free of %.2f; who held it: %s",
                      asked / 2**30, free / 2**30, total / 2**30, path)  # fmt: skip
            self._dump(path)

        torch._C._cuda_attach_out_of_memory_observer(out_of_memory)  # type: ignore[attr-defined]

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        step = trainer.state.step
        due = self.config.interval is not None and trainer.timeline.due(self.config.interval, step)
        if self._recording and (self._is_asked() or (due and step > self.config.skip_batches)):
            self._dump(self.path(trainer, f"step-{step}", self.config.filename))

    def _is_asked(self) -> bool:
        """Return whether a snapshot was requested by a file; checked once a second."""
        if time.monotonic() - self._looked < 1.0:
            return False
        self._looked = time.monotonic()
        before, self._asked = self._asked, self._time_of_request()
        return self._asked > before

    def _time_of_request(self) -> float:
        try:
            return self._request.stat().st_mtime
        except OSError:
            return 0.0

    def close(self) -> None:
        if self._recording:
            torch.cuda.memory._record_memory_history(enabled=None)
            self._recording = False

    def path(self, trainer: Run, name: str, pattern: str | None = None) -> Path:
        """Return the path of a snapshot."""
        folder = self.config.folder or str(trainer.config.folder / "memory")
        return Path(trainer.filled(folder)) / trainer.filled(pattern or f"{name}-rank-{{rank}}.pickle")

    def _dump(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            half = path.with_name(f"{path.name}.half")
            torch.cuda.memory._dump_snapshot(str(half))
            half.replace(path)
        except OSError as error:
            log.warning("%s cannot be written: %s; training continues", path, error.strerror)
