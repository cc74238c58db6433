"""`kill_loss_spike` on losses that are made, and in a real run that diverges."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from llmfoundry.callbacks.kill_loss_spike import LOSS, KillLossSpike
from llmfoundry.cli.train import train_main
from llmfoundry.config import check
from llmfoundry.train.callback import CallbackConfig
from llmfoundry.train.duration import Timeline
from llmfoundry.train.run import TrainState
from tests.callbacks.conftest import lines


@dataclass
class Steps:
    """What the callback reads of a run."""

    timeline: Timeline = field(default_factory=lambda: Timeline(1, 1, 1, total_steps=4000))
    state: TrainState = field(default_factory=TrainState)


def fed(losses: list[float], **settings: object) -> KillLossSpike:
    """A callback that has seen these losses."""
    callback = check(CallbackConfig, {"name": "kill_loss_spike", "log_only": False} | settings).build()
    assert isinstance(callback, KillLossSpike)
    run = Steps()
    callback.fit_start(run)  # type: ignore[arg-type]
    for loss in losses:
        run.state.step += 1
        callback.step_end(run, {LOSS: loss})  # type: ignore[arg-type]
    return callback


def test_a_spike_is_more_outliers_in_a_row_than_patience() -> None:
    settings = {"window_size": 10, "patience": 2, "loss_cap": 100}
    fed([1.0] * 10 + [3.0, 3.0] + [1.0] + [3.0, 3.0], **settings)
    with pytest.raises(RuntimeError, match="step 13: the loss was 2 times the mean"):
        fed([1.0] * 10 + [3.0] * 3, **settings)


def test_a_loss_above_the_cap_is_told_after_two_windows() -> None:
    fed([1.0] * 10 + [1.5] * 9, window_size=10, loss_cap=1.2)
    with pytest.raises(RuntimeError, match="step 20: .*above 1.2"):
        fed([1.0] * 10 + [1.5] * 10, window_size=10, loss_cap=1.2)


def test_the_window_and_the_cap_come_from_the_run() -> None:
    callback = fed([4.0, *[2.0] * 200])
    assert callback.window.maxlen == 200, "5 % of 4000 steps"
    assert callback.cap == 4.0


def test_what_a_checkpoint_keeps_continues() -> None:
    settings = {"window_size": 10, "patience": 2, "loss_cap": 100.0}
    before = fed([1.0] * 10 + [3.0] * 2, **settings)
    after = check(CallbackConfig, {"name": "kill_loss_spike", "log_only": False} | settings).build()
    assert isinstance(after, KillLossSpike)
    after.load_state_dict(before.state_dict())
    run = Steps(state=TrainState(step=13))
    after.fit_start(run)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="step 13"):
        after.step_end(run, {LOSS: 3.0})  # type: ignore[arg-type]


@pytest.mark.parametrize("log_only", [True, False])
def test_a_run_that_diverges_warns_or_ends(
    tiny: Path, tmp_path: Path, log_only: bool, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    spike = f"callbacks.kill_loss_spike={{log_only: {str(log_only).lower()}, window_size: 1, loss_cap: 0.1}}"
    assert train_main([str(tiny), spike]) == (0 if log_only else 1)
    assert "above 0.1; lower optimizer.lr" in (caplog.text if log_only else capsys.readouterr().err)
    assert len(lines(tmp_path / "run")) == (4 if log_only else 1), "two windows of one step"
