"""`tensorboard`: writes metrics as event files, in `log_dir` or `save_folder/tensorboard`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from torch.utils.tensorboard import SummaryWriter

from llmfoundry import runtime
from llmfoundry.config import ConfigError, LocalPath
from llmfoundry.train.callback import Callback, LoggerConfig, Metrics, Run, Table
from llmfoundry.train.config import RankZeroOnly


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

    def fit_start(self, trainer: Run) -> None:
        if runtime.is_rank0():
            folder = self.config.log_dir or str(trainer.config.folder / "tensorboard")
            # Hides steps past the checkpoint that a killed run had written.
            self.writer = SummaryWriter(folder, purge_step=trainer.state.step + 1)

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        if self.writer is not None:
            for key, value in metrics.items():
                if key != "step" and not isinstance(value, list):
                    self.writer.add_scalar(key, value, trainer.state.step)
            if trainer.state.step % self.config.flush_interval == 0:
                self.writer.flush()

    def table(self, trainer: Run, table: Table) -> None:
        if self.writer is not None:
            head = ["| " + " | ".join(table.columns) + " |", "|---" * len(table.columns) + "|"]
            body = ["| " + " | ".join(cell.replace("\n", " ") for cell in row) + " |" for row in table.rows]
            self.writer.add_text(table.name, "\n".join(head + body), trainer.state.step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
