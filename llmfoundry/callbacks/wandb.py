"""`wandb`: metrics to Weights & Biases. `mode: offline` needs no account and writes into the save folder."""

from __future__ import annotations

import urllib.error
import urllib.request
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from llmfoundry import runtime
from llmfoundry.config import ConfigError, dump
from llmfoundry.train.callback import Callback, LoggerConfig, Metrics, Run

if TYPE_CHECKING:
    import wandb

OFFLINE = "or log without an account: WANDB_MODE=offline before the command"
SECONDS_TO_REACH = 10.0
RUN_ID = "wandb-run-id"  # a file in the save_folder


class WandbConfig(LoggerConfig, names=("wandb",)):
    """The words of Composer's WandBLogger."""

    project: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: list[str] = []
    mode: Literal["online", "offline", "disabled"] | None = None  # None: as $WANDB_MODE says

    def build(self) -> Wandb:
        runtime.on_rank0(self._log_in)
        return Wandb(self)

    def is_online(self) -> bool:
        """Whether an account is needed."""
        import wandb  # slow to import, and not everyone's

        return (self.mode or wandb.setup().settings.mode) not in ("offline", "dryrun", "disabled")

    def _log_in(self) -> None:
        """Find a login, or ask for one on a terminal, and reach the server; on rank 0.

        Raises:
            ConfigError: there is no login, or the server cannot be reached.
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
        try:
            urllib.request.urlopen(server, timeout=SECONDS_TO_REACH).close()
        except urllib.error.HTTPError:
            pass  # it answers
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ConfigError(
                f"loggers.wandb: {server} cannot be reached: {reason} (mend the connection, {OFFLINE})"
            ) from None


class Wandb(Callback):
    """Logs from rank 0. The save folder keeps the id of its W&B run, which a resumed run continues."""

    def __init__(self, config: WandbConfig) -> None:
        self.config = config
        self.run: wandb.Run | None = None

    def fit_start(self, trainer: Run) -> None:
        if not runtime.is_rank0():
            return
        import wandb

        self.run = wandb.init(
            project=self.config.project,
            entity=self.config.entity,
            group=self.config.group,
            tags=self.config.tags or None,
            mode=self.config.mode,
            name=trainer.config.run_name,
            id=_run_id(Path(trainer.config.save_folder) / RUN_ID),
            resume="allow" if self.config.is_online() else None,
            dir=trainer.config.save_folder,
            config=dump(trainer.config),
        )

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        if self.run is not None:
            self.run.log(metrics, step=trainer.state.step)

    def close(self) -> None:
        if self.run is not None:
            self.run.finish()


def _run_id(file: Path) -> str:
    """The id that the run was given at its first start; a new one is random, so that no two runs share it."""
    if not file.exists():
        file.write_text(uuid.uuid4().hex[:16])
    return file.read_text().strip()
