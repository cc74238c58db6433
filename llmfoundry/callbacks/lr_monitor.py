"""`lr_monitor`: the learning rate of every parameter group, under Composer's names."""

from __future__ import annotations

from llmfoundry.train.callback import Callback, CallbackConfig, Metrics, Run


class LRMonitorConfig(CallbackConfig, names=("lr_monitor",)):
    """No settings."""

    def build(self) -> LRMonitor:
        return LRMonitor()


class LRMonitor(Callback):
    """Adds `lr-DecoupledAdamW/group0` and so on: 1 is the first group of `optimizer.param_groups`, 0 is the rest."""

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        name = type(trainer.optimizer).__name__
        for i, group in enumerate(trainer.optimizer.param_groups if "lr" in metrics else ()):
            metrics[f"lr-{name}/group{group.get('number', i)}"] = group["lr"]
