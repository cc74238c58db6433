"""What may watch a run, and when it is called.

Monitors add to the metrics of a step; loggers read them; everything else (export, profiling) is a callback as well.
A callback is a config with a class: adding one touches one file in callbacks/ and the YAML.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmfoundry.config import Choice

if TYPE_CHECKING:
    from llmfoundry.train.trainer import Trainer

Metrics = dict[str, float | int | list[float]]


class Callback:
    """Hooks of a run, all optional. They run on every rank, in the order of the YAML, monitors before loggers;
    `fit_end` runs in the reverse order, as with-blocks end."""

    def fit_start(self, trainer: Trainer) -> None:
        """Everything is built and loaded; the first step comes next."""

    def step_end(self, trainer: Trainer, metrics: Metrics) -> None:
        """A step is complete; or, as step 0, the evaluation before the first one.

        Monitors add to `metrics`, loggers write them; this is the one call a step.
        """

    def fit_end(self, trainer: Trainer) -> None:
        """The last checkpoint is safe."""

    def close(self) -> None:
        """Let go of terminals and files: called last in any case, also after an error."""


class CallbackConfig(Choice, tag="name"):
    """Root of the family of monitors and other callbacks: the YAML's `callbacks`."""

    name: str

    def build(self) -> Callback:
        """The callback, before there is a trainer and before any data is prepared: what cannot work is refused here."""
        raise NotImplementedError


class LoggerConfig(Choice, tag="name"):
    """Root of the family of destinations for metrics: the YAML's `loggers`."""

    name: str

    def build(self) -> Callback:
        """The logger, as `CallbackConfig.build`."""
        raise NotImplementedError
