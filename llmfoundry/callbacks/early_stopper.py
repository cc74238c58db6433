"""`early_stopper`: ends the run when a metric has stopped improving. The keys are Composer's.

    callbacks:
      early_stopper: {monitor: LanguageCrossEntropy, dataloader_label: eval, patience: 500ba}

The run then ends as if `max_duration` had been reached; starting it again does not continue training.
"""

from __future__ import annotations

import math
from typing import Literal

from llmfoundry.config import ConfigError
from llmfoundry.train.callback import Callback, CallbackConfig, Json, Metrics, Run
from llmfoundry.train.config import RunConfig
from llmfoundry.train.duration import Duration, Interval
from llmfoundry.train.run import EVALUATED

# Composer's default for LanguageCrossEntropy is "greater", which would stop a run that learns.
_LOWER_IS_BETTER = ("loss", "error", "perplexity", "entropy", "bits_per_byte", "/ce")
_PERPLEXITY, _ENTROPY = "LanguagePerplexity", "LanguageCrossEntropy"


class EarlyStopperConfig(CallbackConfig, names=("early_stopper",)):
    """The metric to watch, and for how long it may fail to improve."""

    monitor: str  # LanguageCrossEntropy, LanguagePerplexity, bits_per_byte, or a full key of metrics.jsonl
    dataloader_label: str  # eval, train, or the label of one of eval_loaders
    # Which values are better. None: lower for losses, errors, entropies, perplexities and bits, otherwise greater
    comp: Literal["less", "lt", "greater", "gt"] | None = None
    min_delta: float = 0.0  # smallest change that counts as an improvement
    patience: Interval = Duration.parse("1ep")  # stop if the metric has not improved for longer than this

    def build(self) -> EarlyStopper:
        return EarlyStopper(self)

    def check_run(self, run: RunConfig) -> None:
        labels = ["train", *(["eval"] if run.eval_loader is not None else [])]
        labels += [each.label for each in run.eval_loaders if each.label]
        label = self.dataloader_label.removeprefix("eval/")
        if label not in labels:
            raise ConfigError(
                f"callbacks.early_stopper.dataloader_label: {self.dataloader_label!r} is not in this run; "
                f"known: {', '.join(labels)}"
            )
        if label != "train" and not run.due_evaluations:
            raise ConfigError("callbacks.early_stopper: nothing is evaluated; set eval_interval")

    @property
    def key(self) -> str:
        """The metric's name in metrics.jsonl."""
        if "/" in self.monitor:
            return self.monitor
        metric = _ENTROPY if self.monitor == _PERPLEXITY else self.monitor
        if self.dataloader_label == "train":
            return "loss/train/ce" if metric == _ENTROPY else f"loss/train/{metric}"
        label = self.dataloader_label.removeprefix("eval/")
        return f"{EVALUATED}{metric}" if label == "eval" else f"{EVALUATED}{label}/{metric}"

    @property
    def lower_is_better(self) -> bool:
        if self.comp is not None:
            return self.comp in ("less", "lt")
        return any(word in self.monitor.lower() for word in _LOWER_IS_BETTER)


class EarlyStopper(Callback):
    """Compares each new value with the best one. Metrics are the same on every rank, so all end at the same step."""

    def __init__(self, config: EarlyStopperConfig) -> None:
        self.config = config
        self.best: float | None = None
        self.best_step = 0
        self.best_seconds = 0.0  # on the run's clock

    def fit_start(self, trainer: Run) -> None:
        self._look(trainer)  # the run was restarted after it had stopped

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        value = metrics.get(self.config.key)
        per_epoch = self.config.dataloader_label == "train" and self.config.patience.unit == "ep"
        if per_epoch and not trainer.timeline.due(Duration.parse("1ep"), trainer.state.step):
            return
        if isinstance(value, list) or value is None:
            if self.best is None and metrics["step"] and self._is_due(metrics):
                known = ", ".join(sorted(key for key, each in metrics.items() if not isinstance(each, list)))
                raise ConfigError(f"callbacks.early_stopper.monitor: no metric {self.config.key}; known: {known}")
            return
        if self.config.monitor == _PERPLEXITY:
            value = math.exp(value)
        if self.best is None or self._improves(value, self.best):
            self.best, self.best_step = value, trainer.state.step
            self.best_seconds = trainer.timeline.clock.seconds
        self._look(trainer)

    def state_dict(self) -> dict[str, Json]:
        if self.best is None:
            return {}
        return {"best": self.best, "best_step": self.best_step, "best_seconds": self.best_seconds}

    def load_state_dict(self, state: dict[str, Json]) -> None:
        best, step, seconds = state.get("best"), state.get("best_step"), state.get("best_seconds")
        if isinstance(best, int | float) and isinstance(step, int):
            self.best, self.best_step = best, step
            self.best_seconds = float(seconds) if isinstance(seconds, int | float) else 0.0

    def _is_late(self, trainer: Run) -> bool:
        """Return whether the best value is older than `patience`."""
        seconds = trainer.timeline.seconds(self.config.patience)
        if seconds is not None:
            return trainer.timeline.clock.seconds - self.best_seconds > seconds
        return trainer.state.step - self.best_step > trainer.timeline.steps(self.config.patience)

    def _is_due(self, metrics: Metrics) -> bool:
        """Return whether these metrics should contain the watched one."""
        return self.config.dataloader_label == "train" or any(key.startswith(EVALUATED) for key in metrics)

    def _improves(self, value: float, best: float) -> bool:
        gain = best - value if self.config.lower_is_better else value - best
        return gain > abs(self.config.min_delta)

    def _look(self, trainer: Run) -> None:
        if self.best is None or not self._is_late(trainer):
            return
        trainer.finish(
            f"early_stopper: {self.config.monitor} has been {self.best:.6g} at best, at step {self.best_step}, "
            f"and has not improved for more than {self.config.patience}"
        )
