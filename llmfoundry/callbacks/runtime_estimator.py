"""`runtime_estimator`: logs the remaining time as `time/remaining_estimate`. The keys are Composer's."""

from __future__ import annotations

import time
from typing import Literal

from pydantic import Field

from llmfoundry.train.callback import Callback, CallbackConfig, Metrics, Run

SECONDS = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400}


class RuntimeEstimatorConfig(CallbackConfig, names=("runtime_estimator",)):
    """The console shows the same estimate in any case."""

    skip_batches: int = Field(1, ge=0)  # steps before timing starts, because the first steps compile
    time_unit: Literal["seconds", "minutes", "hours", "days"] = "hours"  # unit of the metric

    def build(self) -> RuntimeEstimator:
        return RuntimeEstimator(self)


class RuntimeEstimator(Callback):
    """The mean time of a step so far, including evaluations and checkpoints, times the steps that remain."""

    def __init__(self, config: RuntimeEstimatorConfig) -> None:
        self.config = config
        self._skip = config.skip_batches
        self._begun: tuple[float, int] | None = None  # when timing started, and after which step

    def fit_start(self, trainer: Run) -> None:
        if self._skip == 0:
            self._begun = time.monotonic(), trainer.state.step

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        if not metrics["step"]:
            return
        now, step = time.monotonic(), trainer.state.step
        if self._begun is None:
            self._skip -= 1
            if self._skip <= 0:
                self._begun = now, step
            return
        begun, before = self._begun
        total = trainer.timeline.expected_steps(step)
        if total is None:
            return
        left = (now - begun) / (step - before) * (total - step)
        metrics["time/remaining_estimate"] = left / SECONDS[self.config.time_unit]
