"""The interface of callbacks, and when each hook is called.

Monitors add to the metrics of a step, loggers write them, and everything else (export, profiling) is a callback as
well. A callback is a config with a class: adding one touches one file in callbacks/ and the YAML.
"""

from __future__ import annotations

from llmfoundry.checkpoint.reading import Json
from llmfoundry.train.config import CallbackConfig, LoggerConfig
from llmfoundry.train.duration import Interval
from llmfoundry.train.run import Metrics, Run, Table

__all__ = ["AtIntervals", "Callback", "CallbackConfig", "Json", "LoggerConfig", "Metrics", "Run", "Table"]


class Callback:
    """Hooks of a run, all optional.

    They run on every rank, in the order of the YAML, monitors before loggers; `fit_end` runs in the reverse order, as
    with-blocks end.
    """

    def fit_start(self, trainer: Run) -> None:
        """Called when everything is built and loaded, before the first step."""

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        """Called after each step and, as step 0, after the evaluation before the first step.

        Monitors add to `metrics`, and loggers write them; this is called once per step.
        """

    def table(self, trainer: Run, table: Table) -> None:
        """Called when a callback has made a table in this step; loggers write it."""

    def state_dict(self) -> dict[str, Json]:
        """The state that a checkpoint keeps of this callback; the same on every rank."""
        return {}

    def load_state_dict(self, state: dict[str, Json]) -> None:
        """Restore what `state_dict` returned, before `fit_start`; not called if there is no such state."""

    def fit_end(self, trainer: Run) -> None:
        """Called when the last checkpoint is saved."""

    def close(self) -> None:
        """Release terminals and files; always called last, also after an error."""


class AtIntervals(Callback):
    """A callback that acts at an interval, and after the last step, whichever step that is."""

    def __init__(self, interval: Interval) -> None:
        self._interval = interval
        self._last = -1  # the step of the newest time

    def act(self, trainer: Run) -> None:
        """The action; every rank calls this."""
        raise NotImplementedError

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        step = trainer.state.step
        if trainer.timeline.due(self._interval, step) or (step and step == trainer.timeline.total_steps):
            self._act(trainer)

    def fit_end(self, trainer: Run) -> None:
        if self._last != trainer.state.step:  # another callback ended the run
            self._act(trainer)

    def _act(self, trainer: Run) -> None:
        self._last = trainer.state.step
        self.act(trainer)
