"""`kill_loss_spike`: warns of loss spikes that last, or ends the run, by LLM Foundry's rules."""

from __future__ import annotations

import logging
from collections import deque

from pydantic import Field

from llmfoundry.train.callback import Callback, CallbackConfig, Json, Metrics, Run

log = logging.getLogger(__name__)

LOSS = "loss/train/total"
LEAST_WINDOW, WINDOW_SHARE, MOST_LOSS = 100, 0.05, 10.0


class KillLossSpikeConfig(CallbackConfig, names=("kill_loss_spike",)):
    """A spike: more than `patience` losses in a row of at least `outlier_multiplier` times the window's mean."""

    log_only: bool = True  # true: only warn; false: end the run with an error
    patience: int = Field(4, ge=0)  # number of consecutive outliers that are tolerated
    outlier_multiplier: float = Field(2.0, gt=1)  # a loss of at least this many times the window's mean is an outlier
    window_size: int | None = Field(None, ge=1)  # steps; None: 5 % of the run, at least 100
    # The loss is too high if half of the window is above this. None: the highest loss of the first window, at most 10
    loss_cap: float | None = Field(None, gt=0)

    def build(self) -> KillLossSpike:
        return KillLossSpike(self)


class KillLossSpike(Callback):
    """Every rank has the loss of the global batch, so all of them end at the same step."""

    def __init__(self, config: KillLossSpikeConfig) -> None:
        self.config = config
        self.window: deque[float] = deque()
        self.cap = config.loss_cap
        self.outliers = 0  # consecutive ones

    def fit_start(self, trainer: Run) -> None:
        total = trainer.timeline.expected_steps(trainer.state.step)  # None for a run with a time limit
        share = round((total or 0) * WINDOW_SHARE)
        self.window = deque(self.window, maxlen=self.config.window_size or max(LEAST_WINDOW, share))

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        loss = metrics.get(LOSS)
        if not isinstance(loss, float):
            return
        if len(self.window) == self.window.maxlen:
            if self.cap is None:
                self.cap = min(max(self.window), MOST_LOSS)
            if found := self._spike(loss) or self._high(trainer.state.step, self.cap):
                self._tell(f"kill_loss_spike: step {trainer.state.step}: {found}")
        self.window.append(loss)

    def state_dict(self) -> dict[str, Json]:
        return {"window": list(self.window), "cap": self.cap, "outliers": self.outliers}

    def load_state_dict(self, state: dict[str, Json]) -> None:
        window, cap, outliers = state.get("window"), state.get("cap"), state.get("outliers")
        if isinstance(window, list) and isinstance(outliers, int):
            self.window = deque(float(loss) for loss in window if isinstance(loss, int | float))
            self.outliers = outliers
        if self.config.loss_cap is None and isinstance(cap, int | float):
            self.cap = cap

    def _spike(self, loss: float) -> str:
        """Return the message if this loss completes a spike that lasts."""
        mean = sum(self.window) / len(self.window)
        self.outliers = self.outliers + 1 if loss >= mean * self.config.outlier_multiplier else 0
        if self.outliers <= self.config.patience:
            return ""
        return (
            f"the loss was {self.config.outlier_multiplier:g} times the mean ({mean:.4g}) of {len(self.window)} steps, "
            f"or more, for {self.outliers} steps in a row; lower optimizer.lr"
        )

    def _high(self, step: int, cap: float) -> str:
        """Return the message if half of the window is above the cap, once two windows have passed."""
        size = len(self.window)
        n_high = sum(loss > cap for loss in self.window)
        if step < 2 * size or n_high < size / 2:
            return ""
        return f"{n_high} of the last {size} losses are above {cap:.4g}; lower optimizer.lr"

    def _tell(self, message: str) -> None:
        if not self.config.log_only:
            raise RuntimeError(message)
        log.warning("%s", message)
