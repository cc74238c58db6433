"""`profiler`: where a step's time goes, as a table by part and as a trace for chrome://tracing or Perfetto.

    callbacks:
      profiler: {start: 10, steps: 3}    # `save_folder/profile.md` and `profile.json`, and the trace
                                         # `save_folder/profile/steps-10-12-rank-0.json.gz`

The parts of the table add up to the step. On a GPU they are the time of kernels. If kernels of two streams overlap, the
time counts for the one that computes, so `communication` is what is exposed, and `idle` is the time without a kernel.
On a CPU they are the self time of operators, and `idle` is the time between them, in Python.

callbacks/profile_parts.py attributes operators and kernels to parts.
"""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack

from pydantic import Field
from torch.profiler import ProfilerActivity, profile

from llmfoundry import runtime
from llmfoundry.atomic import atomic_write
from llmfoundry.callbacks.profile_parts import lines_of, scopes, table
from llmfoundry.train.callback import Callback, CallbackConfig, Metrics, Run

log = logging.getLogger(__name__)


class ProfilerConfig(CallbackConfig, names=("profiler",)):
    """Profiles `steps` steps from step `start` on."""

    start: int = Field(10, ge=2)  # first profiled step; earlier steps compile and tune
    steps: int = Field(3, ge=1)  # number of profiled steps
    all_ranks: bool = False  # profile all ranks; false: only rank 0
    shapes: bool = False  # record the shapes of operators' inputs in the trace
    memory: bool = False  # record allocations in the trace

    def build(self) -> Profiler:
        return Profiler(self)


class Profiler(Callback):
    """Writes its files after the last profiled step."""

    def __init__(self, config: ProfilerConfig) -> None:
        self.config = config
        self._running: profile | None = None
        self._scopes = ExitStack()  # open while steps are recorded

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        if runtime.rank() != 0 and not self.config.all_ranks:
            return
        first, step = self.config.start, trainer.state.step
        if step == first - 1:
            activities = [ProfilerActivity.CPU]
            if trainer.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._running = profile(
                activities=activities, record_shapes=self.config.shapes, profile_memory=self.config.memory
            )
            self._scopes.enter_context(scopes(trainer.model))
            self._running.start()
        elif step == first + self.config.steps - 1 and self._running is not None:
            self._finish(trainer)

    def close(self) -> None:
        if self._running is not None:  # the run ended before the last step to profile
            self._running.stop()
            self._scopes.close()
            self._running = None
            log.warning("profiler: the run ended before step %d; nothing is written",
                        self.config.start + self.config.steps - 1)  # fmt: skip

    def _finish(self, trainer: Run) -> None:
        assert self._running is not None
        found, self._running = self._running, None
        found.stop()
        self._scopes.close()
        last, rank = self.config.start + self.config.steps - 1, runtime.rank()
        folder = trainer.config.folder
        trace = folder / "profile" / f"steps-{self.config.start}-{last}-rank-{rank}.json.gz"
        lines = lines_of(list(found.events() or []))
        text = table(lines)
        half = trace.with_name(f"half-{trace.name}")  # the name's ending selects compression
        try:
            trace.parent.mkdir(exist_ok=True)
            found.export_chrome_trace(str(half))
            half.replace(trace)
            name = f"profile-rank-{rank}" if rank else "profile"
            heading = f"Steps {self.config.start} to {last}, per step:\n\n"
            atomic_write(folder / f"{name}.md", [f"{heading}{text}".encode()])
            data: dict[str, object] = {
                "steps": [self.config.start, last],
                "rank": rank,
                "step_ms": sum(line.milliseconds for line in lines),
            }
            data["parts"] = [line._asdict() for line in lines]
            atomic_write(folder / f"{name}.json", [f"{json.dumps(data, indent=1)}\n".encode()])
        except OSError as error:
            half.unlink(missing_ok=True)
            log.warning("profiler: %s cannot be written: %s; training continues", folder, error.strerror)
        log.info("steps %d to %d of rank %d, per step (trace: %s):\n%s", self.config.start, last, rank, trace, text)
