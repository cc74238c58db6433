"""`tensorboard`: writes metrics as event files, in `log_dir` or `save_folder/tensorboard`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pydantic import Field
from torch.utils.tensorboard import SummaryWriter

from llmfoundry import runtime
from llmfoundry.config import ConfigError, LocalPath
from llmfoundry.train.callback import Callback, LoggerConfig, Metrics, Run, Table
from llmfoundry.train.config import RankZeroOnly

log = logging.getLogger(__name__)


class TensorboardConfig(LoggerConfig, names=("tensorboard",)):
    """Where the event files go."""

    log_dir: LocalPath | None = None  # None: the folder tensorboard in save_folder
    flush_interval: int = Field(100, ge=1)  # steps between writes to disk
    rank_zero_only: RankZeroOnly = True  # only true is supported: metrics cover all ranks, and rank 0 logs them

    def build(self) -> Tensorboard:
        runtime.on_rank0(self._make_folder)
        return Tensorboard(self)

    def _make_folder(self) -> None:
        """Make a folder outside of the save folder at the start, to find out whether that is possible."""
        try:
            if self.log_dir is not None:
                Path(self.log_dir).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"loggers.tensorboard.log_dir: {self.log_dir}: {error.strerror}") from None


class Tensorboard(Callback):
    """Writes every number of a step on rank 0; lists (loads of experts) are only in metrics.jsonl."""

    def __init__(self, config: TensorboardConfig) -> None:
        self.config = config
        self.writer: SummaryWriter | None = None
        self._failing = False

    def fit_start(self, trainer: Run) -> None:
        # Steps beyond the checkpoint that a killed run had written are hidden from view.
        self._guarded(lambda: self._open(trainer, trainer.state.step + 1))

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        self._guarded(lambda: self._write(trainer, metrics))

    def _open(self, trainer: Run, purge_step: int | None) -> None:
        if runtime.is_rank0():
            folder = self.config.log_dir or str(trainer.config.folder / "tensorboard")
            self.writer = SummaryWriter(folder, purge_step=purge_step)

    def _write(self, trainer: Run, metrics: Metrics) -> None:
        flush = trainer.state.step % self.config.flush_interval == 0
        if self.writer is None and flush:
            self._open(trainer, None)
        if self.writer is None:
            return
        for key, value in metrics.items():
            if key != "step" and not isinstance(value, list):
                self.writer.add_scalar(key, value, trainer.state.step)
        if flush:
            self.writer.flush()
            self._failing = False

    def _guarded(self, write: Callable[[], None]) -> None:
        """Survive a full disk: it ends the writer's thread, so a new writer is needed."""
        try:
            write()
        except OSError as error:
            if not self._failing:
                log.warning("loggers.tensorboard: cannot be written: %s; trying again every %d steps",
                            error.strerror, self.config.flush_interval)  # fmt: skip
            self._failing, writer, self.writer = True, self.writer, None
            with suppress(OSError):
                if writer is not None:
                    writer.close()

    def table(self, trainer: Run, table: Table) -> None:
        self._guarded(lambda: self._write_table(trainer, table))

    def _write_table(self, trainer: Run, table: Table) -> None:
        if self.writer is not None:
            head = ["| " + " | ".join(table.columns) + " |", "|---" * len(table.columns) + "|"]
            body = ["| " + " | ".join(cell.replace("\n", " ") for cell in row) + " |" for row in table.rows]
            self.writer.add_text(table.name, "\n".join(head + body), trainer.state.step)

    def close(self) -> None:
        if self.writer is not None:
            self._guarded(self.writer.close)
