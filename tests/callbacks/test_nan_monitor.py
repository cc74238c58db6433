from dataclasses import dataclass, field

import pytest

from llmfoundry.callbacks.nan_monitor import LOSS, NaNMonitor
from llmfoundry.config import check
from llmfoundry.train.callback import CallbackConfig
from llmfoundry.train.run import TrainState


@dataclass
class Steps:
    """What the monitor reads of a run."""

    state: TrainState = field(default_factory=lambda: TrainState(step=7))


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(loss: float) -> None:
    monitor = check(CallbackConfig, {"name": "nan_monitor"}).build()
    assert isinstance(monitor, NaNMonitor)
    monitor.step_end(Steps(), {LOSS: 2.5})  # type: ignore[arg-type]
    monitor.step_end(Steps(), {"metrics/eval": loss})  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="step 7"):
        monitor.step_end(Steps(), {LOSS: loss})  # type: ignore[arg-type]
