"""`speed_monitor`: throughput over a window of steps, and the model FLOPs utilization (MFU).

Every run of the command line has one; the YAML sets its window.
"""

from __future__ import annotations

from collections import deque
from typing import Literal

from pydantic import Field

from llmfoundry import runtime
from llmfoundry.callbacks.runtime_estimator import SECONDS
from llmfoundry.train.callback import Callback, CallbackConfig, Metrics, Run


class SpeedMonitorConfig(CallbackConfig, names=("speed_monitor",)):
    """Averages over the last `window_size` steps, without evaluation and checkpoints."""

    window_size: int = Field(10, ge=1)  # number of steps to average over
    gpu_flops_available: float | None = Field(None, gt=0)  # peak FLOP/s of one device; None: from the built-in table
    time_unit: Literal["seconds", "minutes", "hours", "days"] = "hours"  # unit of time/train

    def build(self) -> SpeedMonitor:
        return SpeedMonitor(self)


class SpeedMonitor(Callback):
    """Adds `throughput/...`: steps, rows, tokens and model FLOPs per second, in total and per device."""

    def __init__(self, config: SpeedMonitorConfig) -> None:
        self.config = config
        self.seconds: deque[float] = deque(maxlen=config.window_size)
        self.flops_per_token = 0.0

    def fit_start(self, trainer: Run) -> None:
        # Only once: with adapters, counting builds the model on the meta device (0.1 s for Qwen3-30B).
        self.flops_per_token = trainer.config.model.flops_per_token(trainer.loader.max_seq_len)

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        seconds = metrics.get("time/step_seconds")
        if not isinstance(seconds, float):
            return  # no step was taken
        self.seconds.append(seconds)
        steps = len(self.seconds) / sum(self.seconds)
        tokens = steps * trainer.config.global_train_batch_size * trainer.loader.max_seq_len
        flops = tokens * self.flops_per_token
        devices = runtime.world_size()
        metrics |= {
            "time/train": trainer.train_seconds / SECONDS[self.config.time_unit],
            "throughput/batches_per_sec": steps,
            "throughput/samples_per_sec": steps * trainer.config.global_train_batch_size,
            "throughput/tokens_per_sec": tokens,
            "throughput/device/batches_per_sec": steps / devices,
            "throughput/device/samples_per_sec": steps * trainer.config.global_train_batch_size / devices,
            "throughput/device/tokens_per_sec": tokens / devices,
            "throughput/flops_per_sec": flops,
            "throughput/device/flops_per_sec": flops / devices,
        }
        peak = self.config.gpu_flops_available or runtime.peak_flops(trainer.device)
        if peak is not None:
            metrics["throughput/device/mfu"] = flops / devices / peak
