"""`system_metrics_monitor`: utilization of GPUs, CPU, memory, disk and network, under Composer's names.

For every GPU: `gpu_percentage` (share of time in which a kernel ran), `memory_percentage` (share of time in which its
memory was read or written), `gpu_temperature_C`, `gpu_power_usage_W`. The lowest and highest values over the ranks are
logged with their ranks or, with `log_all_data`, the values of every rank. They need the package nvidia-ml-py. For the
node of rank 0: `cpu_percentage`, `cpu_memory_...`, `disk_memory_...` and `network_...`, in bytes.
"""

from __future__ import annotations

import importlib.util
import logging
import os

import torch
from pydantic import Field

from llmfoundry import runtime
from llmfoundry.config import ConfigError
from llmfoundry.train.callback import Callback, CallbackConfig, Metrics, Run

log = logging.getLogger(__name__)

OF_GPU = ("gpu_percentage", "memory_percentage", "gpu_temperature_C", "gpu_power_usage_W")


class SystemMetricsMonitorConfig(CallbackConfig, names=("system_metrics_monitor",)):
    """What is logged of the GPUs, and how often."""

    log_all_data: bool = False  # log every rank; false: only the lowest and the highest value
    interval: int = Field(1, ge=1)  # steps between logs

    def build(self) -> SystemMetricsMonitor:
        if importlib.util.find_spec("psutil") is None:
            raise ConfigError("callbacks.system_metrics_monitor: needs psutil (pip install psutil)")
        return SystemMetricsMonitor(self)


class SystemMetricsMonitor(Callback):
    """Gathers four numbers of each rank if there are GPUs; without GPUs, nothing is sent."""

    def __init__(self, config: SystemMetricsMonitorConfig) -> None:
        self.config = config
        self._reads_gpu = False

    def fit_start(self, trainer: Run) -> None:
        has_reader = importlib.util.find_spec("pynvml") is not None
        # The same on every rank, because the ranks take part in a collective.
        self._reads_gpu = trainer.device.type == "cuda" and not runtime.any_rank(not has_reader)
        if trainer.device.type == "cuda" and not self._reads_gpu:
            log.warning("system_metrics_monitor: nothing is read of GPUs (pip install nvidia-ml-py)")

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        if trainer.state.step % self.config.interval:
            return
        metrics |= of_system()
        if self._reads_gpu:
            metrics |= of_ranks(runtime.of_ranks(of_gpu(trainer.device)).tolist(), self.config.log_all_data)


def of_system() -> dict[str, float]:
    """Metrics of CPU, memory, disk and network of this node."""
    import psutil  # optional dependency

    found: dict[str, float] = {"cpu_percentage": psutil.cpu_percent()}
    network = psutil.net_io_counters()  # None on a node without a network
    parts = {"cpu_memory": psutil.virtual_memory(), "disk_memory": psutil.disk_usage(os.sep), "network": network}
    for name, values in parts.items():
        if values is not None:
            found |= {f"{name}_{key}": value for key, value in values._asdict().items()}
    return found


def of_gpu(device: torch.device) -> list[float]:
    """Return the metrics `OF_GPU` of this GPU."""
    return [
        torch.cuda.utilization(device),
        torch.cuda.memory_usage(device),
        torch.cuda.temperature(device),
        torch.cuda.power_draw(device) / 1000,  # in mW
    ]


def of_ranks(rows: list[list[float]], every: bool) -> dict[str, float]:
    """Return the metrics `OF_GPU` under Composer's names: of every rank, or the lowest and the highest."""
    found: dict[str, float] = {}
    for name, values in zip(OF_GPU, zip(*rows, strict=True), strict=True):
        if every:
            found |= {f"{name}_rank_{rank}": value for rank, value in enumerate(values)}
            continue
        least, most = min(values), max(values)
        found[f"min_{name}_rank_{values.index(least)}"] = least
        found[f"max_{name}_rank_{values.index(most)}"] = most
    return found
