"""`memory_monitor`: bytes that PyTorch holds on this GPU. Nothing on a CPU, as in Composer."""

from __future__ import annotations

import torch

from llmfoundry.train.callback import Callback, CallbackConfig, Metrics, Run


class MemoryMonitorConfig(CallbackConfig, names=("memory_monitor",)):
    """Of rank 0."""

    def build(self) -> MemoryMonitor:
        return MemoryMonitor()


class MemoryMonitor(Callback):
    """Adds `memory/...` in GB (1e9 bytes), and how often the allocator had to start over."""

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        if trainer.device.type != "cuda":
            return
        stats = torch.cuda.memory_stats(trainer.device)
        metrics |= {
            "memory/current_allocated_mem": stats["allocated_bytes.all.current"] / 1e9,
            "memory/peak_allocated_mem": stats["allocated_bytes.all.peak"] / 1e9,
            "memory/peak_reserved_mem": stats["reserved_bytes.all.peak"] / 1e9,
            "memory/alloc_retries": stats["num_alloc_retries"],
        }
