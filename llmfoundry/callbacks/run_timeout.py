"""`run_timeout`: two limits in seconds, for a process that hangs after its run has ended and for the run itself.

    callbacks:
      run_timeout: {timeout: 1800, max_seconds: 85000}

`timeout` is LLM Foundry's: after everything is saved, other callbacks and loggers' last uploads may take this long;
then the process exits with code 0. `max_seconds` is an addition: when it is reached, the run finishes its step, saves,
and stops with exit code 0; the same command continues it.
"""

from __future__ import annotations

import logging
import threading
import time

from pydantic import Field

from llmfoundry import launch
from llmfoundry.train.callback import Callback, CallbackConfig, Metrics, Run

log = logging.getLogger(__name__)


class RunTimeoutConfig(CallbackConfig, names=("run_timeout",)):
    """Seconds."""

    timeout: float = Field(1800.0, gt=0)  # seconds from the end of the run until all loggers must be closed
    max_seconds: float | None = Field(None, gt=0)  # maximum seconds of this process, from its first step

    def build(self) -> RunTimeout:
        return RunTimeout(self)


class RunTimeout(Callback):
    """Every rank watches its own clock; the first one to reach the limit stops all."""

    def __init__(self, config: RunTimeoutConfig) -> None:
        self.config = config
        self._begun = 0.0
        self._timer: threading.Timer | None = None

    def fit_start(self, trainer: Run) -> None:
        self._begun = time.monotonic()

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        limit = self.config.max_seconds
        if limit is not None and not trainer.asked and time.monotonic() - self._begun > limit:
            trainer.stop(f"run_timeout: {limit:.12g} seconds have passed; saving")

    def fit_end(self, trainer: Run) -> None:
        self._timer = threading.Timer(self.config.timeout, self._leave)
        self._timer.daemon = True
        self._timer.start()

    def close(self) -> None:
        if self._timer is not None:  # loggers close before callbacks do
            self._timer.cancel()

    def _leave(self) -> None:
        """End a process that should have ended; nothing of the run is lost."""
        log.error("run_timeout: the run ended %g seconds ago, and its process did not; leaving", self.config.timeout)
        launch.leave_at_once(0)
