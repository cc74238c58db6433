"""`inmemory`: keeps every metric in this process, for programs that train and then look at the numbers.

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
    """On every rank.

    Attributes:
        data: of each metric, its steps and values.
        most_recent_values: of each metric, the newest value.
        tables: of each name, the steps and tables.
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
