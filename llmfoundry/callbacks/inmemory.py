"""`inmemory`: keeps every metric in this process, for programs that train and then read the numbers.

trainer = build(config)
trainer.fit()
trainer.named["loggers.inmemory"].data["loss/train/ce"]    # [(1, 5.77), (2, 5.61), ...]
"""

from __future__ import annotations

from llmfoundry.train.callback import Callback, LoggerConfig, Metrics, Run, Table


class InMemoryConfig(LoggerConfig, names=("inmemory", "in_memory_logger")):
    """No settings."""

    def build(self) -> InMemory:
        return InMemory()


class InMemory(Callback):
    """Records metrics on every rank.

    Attributes:
        data: for each metric, its (step, value) pairs.
        most_recent_values: for each metric, its newest value.
        tables: for each name, (step, table) pairs.
    """

    def __init__(self) -> None:
        self.data: dict[str, list[tuple[int, float | list[float]]]] = {}
        self.most_recent_values: Metrics = {}
        self.tables: dict[str, list[tuple[int, Table]]] = {}

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        for key, value in metrics.items():
            self.data.setdefault(key, []).append((trainer.state.step, value))
        self.most_recent_values |= metrics

    def table(self, trainer: Run, table: Table) -> None:
        self.tables.setdefault(table.name, []).append((trainer.state.step, table))
