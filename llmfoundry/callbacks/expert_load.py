"""`expert_load`: warns when experts starve. The loads themselves are in every step's metrics (`moe/load`)."""

from __future__ import annotations

import logging

from pydantic import Field

from llmfoundry.train.callback import Callback, CallbackConfig, Metrics, Run

log = logging.getLogger(__name__)


class ExpertLoadConfig(CallbackConfig, names=("expert_load",)):
    """Experts starve when the least busy one of some layer stays below `starving_below` of an equal share."""

    starving_below: float = Field(0.1, gt=0, lt=1)  # warn if an expert's load is below this share of an even load
    patience: int = Field(100, ge=1)  # number of consecutive steps before a warning

    def build(self) -> ExpertLoad:
        return ExpertLoad(self)


class ExpertLoad(Callback):
    """Warns each time experts have starved for another `patience` steps."""

    def __init__(self, config: ExpertLoadConfig) -> None:
        self.config = config
        self.steps = 0  # consecutive steps with a starving expert

    def step_end(self, trainer: Run, metrics: Metrics) -> None:
        least = metrics.get("moe/min_load")
        if not isinstance(least, float):
            return
        self.steps = self.steps + 1 if least < self.config.starving_below else 0
        if self.steps and self.steps % self.config.patience == 0:
            log.warning(
                "step %d: for %d steps some expert has had under %g of an equal share; raise moe_loss_weight",
                trainer.state.step, self.steps, self.config.starving_below,
            )  # fmt: skip
