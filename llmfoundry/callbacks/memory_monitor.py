"""`memory_monitor`: the memory that PyTorch holds on this GPU. It logs nothing on a CPU, as in Composer."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from llmfoundry import runtime
from llmfoundry.train.callback import Callback, CallbackConfig, Metrics, Run

KEYS = {
    "allocated_bytes.all.current": "current_allocated_mem",
    "active_bytes.all.current": "current_active_mem",
    "inactive_split_bytes.all.current": "current_inactive_mem",
    "reserved_bytes.all.current": "current_reserved_mem",
    "allocated_bytes.all.peak": "peak_allocated_mem",
    "active_bytes.all.peak": "peak_active_mem",
    "inactive_split_bytes.all.peak": "peak_inactive_mem",
    "reserved_bytes.all.peak": "peak_reserved_mem",
    "num_alloc_retries": "alloc_retries",
}


class MemoryMonitorConfig(CallbackConfig, names=("memory_monitor",)):
    """Memory of rank 0 and, at an interval, of all ranks."""

    # Names in torch.cuda.memory_stats, and the names to log them under; None: the default set
    memory_keys: dict[str, str] | None = None
    # Steps between logs of ..._avg, _min and _max over the ranks
    dist_aggregate_batch_interval: int | None = Field(None, ge=1)

    def build(self) -> MemoryMonitor:
        return MemoryMonitor(self)


class MemoryMonitor(Callback):
    """Adds `memory/...` in GB (1e9 bytes), and the number of allocation retries."""

    def __init__(self, config: MemoryMonitorConfig) -> None:
        self.config = config

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        if trainer.device.type != "cuda":
            return
        found = report(runtime.memory_stats(trainer.device), self.config.memory_keys or KEYS)
        every = self.config.dist_aggregate_batch_interval
        if every is not None and trainer.state.step % every == 0:
            found |= over_ranks(found)
        metrics |= {f"memory/{name}": value for name, value in found.items()}


def report(stats: Mapping[str, float], keys: dict[str, str]) -> dict[str, float]:
    """Return the available statistics under the names of metrics; those in bytes are converted to GB."""
    return {
        name: stats[key] / 1e9 if "bytes" in key else stats[key] for key, name in keys.items() if key in stats
    }  # fmt: skip


def over_ranks(values: dict[str, float]) -> dict[str, float]:
    """Return `NAME_avg`, `NAME_min` and `NAME_max` over all ranks, which call this together."""
    found: dict[str, float] = {}
    for name, column in zip(values, runtime.of_ranks(list(values.values())).T, strict=True):
        found |= {
            f"{name}_avg": float(column.mean()), f"{name}_min": float(column.min()), f"{name}_max": float(column.max()),
        }  # fmt: skip
    return found
