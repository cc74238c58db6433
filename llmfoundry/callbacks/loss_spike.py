"""`loss_spike`: reacts to a jump of the loss: logs it, skips the batch, or rolls back and steps past the data.

    callbacks:
      loss_spike: {action: roll_back, threshold: 6, patience: 2}

A loss is a spike if it exceeds the median of the last steps by more than `threshold` times their spread. The spread is
1.48 times the median absolute deviation, which is the standard deviation for a normal distribution. Outliers change
neither, so a spike does not hide the next one. `skip` and `roll_back` write the rows to `skipped.jsonl`.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from typing import Literal

from pydantic import Field

from llmfoundry.config import RunError
from llmfoundry.train.callback import Callback, CallbackConfig, Json, Metrics, Run

log = logging.getLogger(__name__)

LOSS = "loss/train/total"
NORMAL = 1.4826  # standard deviations in a median absolute deviation
LEAST_SPREAD = 0.01  # of the median: losses that barely vary do not cause spikes


class LossSpikeConfig(CallbackConfig, names=("loss_spike",)):
    """Losses are compared with those of the last steps, which every rank has, so all ranks act at the same step."""

    # log: log a warning. skip: skip the update of a step with such a loss. roll_back: return to the last checkpoint,
    # and continue after the rows that were read since
    action: Literal["log", "skip", "roll_back"] = "log"
    # Number of steps to compare with; spikes are only detected once half of them are recorded
    window_size: int = Field(128, ge=4)
    threshold: float = Field(6.0, gt=0)  # a spike is this many spreads above the median
    patience: int = Field(1, ge=1)  # for log and roll_back: number of consecutive spikes before acting
    max_rollbacks: int = Field(3, ge=1)  # maximum rollbacks per run; the next one ends the run with an error

    def build(self) -> LossSpike:
        return LossSpike(self)


class LossSpike(Callback):
    """Keeps the losses of the last steps."""

    def __init__(self, config: LossSpikeConfig) -> None:
        self.config = config
        self.window: deque[float] = deque(maxlen=config.window_size)
        self.in_a_row = 0
        self.rollbacks = 0

    def fit_start(self, trainer: Run) -> None:
        self._arm(trainer)

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        loss = metrics.get(LOSS)
        if not isinstance(loss, float) or not math.isfinite(loss):
            return
        limit = self.limit
        self.in_a_row = self.in_a_row + 1 if loss > limit else 0
        self.window.append(loss)
        found = f"loss_spike: the loss is {loss:.4g}, and {limit:.4g} is the limit by the last {len(self.window)} steps"
        if self.config.action == "roll_back":
            trainer.doubtful = 0 < self.in_a_row < self.config.patience
        if self.in_a_row >= self.config.patience and self.config.action == "roll_back":
            self._go_back(trainer, found)
        elif self.in_a_row >= (self.config.patience if self.config.action == "log" else 1):
            log.warning("step %d: %s", trainer.state.step, found)
        self._arm(trainer)

    @property
    def limit(self) -> float:
        """The highest loss that is not a spike."""
        if len(self.window) < self.config.window_size // 2:
            return math.inf
        middle = statistics.median(self.window)
        spread = NORMAL * statistics.median(abs(loss - middle) for loss in self.window)
        return middle + self.config.threshold * max(spread, LEAST_SPREAD * abs(middle))

    def state_dict(self) -> dict[str, Json]:
        return {"window": list(self.window), "in_a_row": self.in_a_row, "rollbacks": self.rollbacks}

    def load_state_dict(self, state: dict[str, Json]) -> None:
        window, in_a_row, rollbacks = state.get("window"), state.get("in_a_row"), state.get("rollbacks")
        if isinstance(window, list) and isinstance(in_a_row, int) and isinstance(rollbacks, int):
            losses = [float(loss) for loss in window if isinstance(loss, int | float)]
            self.window = deque(losses, maxlen=self.config.window_size)
            self.in_a_row = in_a_row
            self.rollbacks = max(self.rollbacks, rollbacks)  # a rollback must not reset this

    def _arm(self, trainer: Run) -> None:
        if self.config.action == "skip":
            trainer.loss_limit = self.limit

    def _go_back(self, trainer: Run, why: str) -> None:
        self.rollbacks += 1
        if self.rollbacks > self.config.max_rollbacks:
            raise RunError(
                f"step {trainer.state.step}: {why}, after {self.config.max_rollbacks} times back (max_rollbacks): "
                "other rows do not help; lower optimizer.lr, or clip gradients"
            )
        trainer.roll_back(why)
