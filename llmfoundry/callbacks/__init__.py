"""Monitors and loggers: one file each. Importing this package registers them; nobody imports them singly."""

from llmfoundry.callbacks import (
    console,
    expert_load,
    lr_monitor,
    memory_monitor,
    memory_snapshot,
    nan_monitor,
    profiler,
    report,
    sample_text,
    speed_monitor,
    tensorboard,
    wandb,
)

__all__ = [
    "console",
    "expert_load",
    "lr_monitor",
    "memory_monitor",
    "memory_snapshot",
    "nan_monitor",
    "profiler",
    "report",
    "sample_text",
    "speed_monitor",
    "tensorboard",
    "wandb",
]
