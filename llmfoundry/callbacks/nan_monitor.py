"""`nan_monitor`: stops the run at the first loss that is not finite."""

from __future__ import annotations

import math

from llmfoundry.train.callback import Callback, CallbackConfig, Metrics, Run

LOSS = "loss/train/total"


class NaNMonitorConfig(CallbackConfig, names=("nan_monitor",)):
    """No settings."""

    def build(self) -> NaNMonitor:
        return NaNMonitor()


class NaNMonitor(Callback):
    """Every rank has the loss of the global batch, so all of them stop at the same step."""

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        loss = metrics.get(LOSS)
        if isinstance(loss, float) and not math.isfinite(loss):
            raise RuntimeError(f"nan_monitor: the loss of step {trainer.state.step} is {loss}")
