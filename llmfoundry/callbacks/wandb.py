"""`wandb`: logs metrics to Weights & Biases. `mode: offline` needs no account and writes into the save folder."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import field_validator

from llmfoundry import runtime
from llmfoundry.callbacks.reach import why_unreachable
from llmfoundry.config import ConfigError
from llmfoundry.train.callback import Callback, LoggerConfig, Metrics, Run, Table
from llmfoundry.train.config import RankZeroOnly

if TYPE_CHECKING:
    import wandb

OFFLINE = "or log without an account: WANDB_MODE=offline before the command"
RUN_ID = "wandb-run-id"  # name of a file in the save_folder


class WandbConfig(LoggerConfig, names=("wandb",)):
    """The keys of Composer's WandBLogger."""

    project: str | None = None  # None: W&B's own default
    entity: str | None = None  # user or team; None: W&B's own default
    run_name: str | None = None  # name in W&B (LLM Foundry's `name`); None: the run's name
    group: str | None = None  # W&B group of the run
    tags: list[str] = []  # tags of the W&B run
    init_kwargs: dict[str, object] = {}  # other arguments of wandb.init, e.g. {notes: ..., job_type: ...}
    log_artifacts: bool = False  # not supported: checkpoints are not uploaded
    rank_zero_only: RankZeroOnly = True  # only true is supported: metrics cover all ranks, and rank 0 logs them
    mode: Literal["online", "offline", "disabled"] | None = None  # None: from $WANDB_MODE

    @field_validator("log_artifacts")
    @classmethod
    def _uploads_nothing(cls, value: bool) -> bool:
        if value:
            raise ValueError("checkpoints are not uploaded here; write false, and copy save_folder/checkpoints")
        return value

    def build(self) -> Wandb:
        runtime.on_rank0(self._log_in)
        return Wandb(self)

    def is_online(self) -> bool:
        """Return whether an account is needed."""
        import wandb  # slow to import, and optional

        return (self.mode or wandb.setup().settings.mode) not in ("offline", "dryrun", "disabled")

    def _log_in(self) -> None:
        """Find a login, or ask for one on a terminal, and check that the server responds; on rank 0.

        Raises:
            ConfigError: if there is no login, or the server cannot be reached.
        """
        import wandb

        if not self.is_online():
            return
        try:
            wandb.login(verify=False)
        except (wandb.Error, ValueError) as error:
            raise ConfigError(
                f"loggers.wandb: {' '.join(str(error).split())} (run `wandb login` once, {OFFLINE})"
            ) from None
        server = wandb.setup().settings.base_url
        if reason := why_unreachable(server):
            raise ConfigError(f"loggers.wandb: {server} cannot be reached: {reason} (check the connection, {OFFLINE})")


class Wandb(Callback):
    """Logs from rank 0. The save folder keeps the id of its W&B run, which a resumed run continues."""

    def __init__(self, config: WandbConfig) -> None:
        self.config = config
        self.run: wandb.Run | None = None

    def fit_start(self, trainer: Run) -> None:
        if not runtime.is_rank0():
            return
        import wandb

        own: dict[str, object] = {
            "project": self.config.project,
            "entity": self.config.entity,
            "group": self.config.group,
            "tags": self.config.tags,
            "mode": self.config.mode,
            "name": self.config.run_name,
        }
        settings: dict[str, object] = {
            "name": trainer.config.run_name,
            "id": _run_id(trainer.config.folder / RUN_ID),
            "resume": "allow" if self.config.is_online() else None,
            "dir": str(trainer.config.folder),
            "config": trainer.config.disclosed(),
        }
        given = {key: value for key, value in own.items() if value}
        self.run = wandb.init(**settings | self.config.init_kwargs | given)  # type: ignore[arg-type]

    def table(self, trainer: Run, table: Table) -> None:
        if self.run is not None:
            import wandb

            # Before the metrics of the same step, whose logging completes it.
            self.run.log(
                {table.name: wandb.Table(columns=list(table.columns), data=table.rows)},
                step=trainer.state.step,
                commit=False,
            )

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        if self.run is not None:
            self.run.log(metrics, step=trainer.state.step)

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()


def _run_id(file: Path) -> str:
    """Return the id that the run got at its first start. New ids are random, so that no two runs share one."""
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:16])
    return file.read_text().strip()
