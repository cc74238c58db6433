"""Runs by the clock: how long they last, what they do at intervals, and that they stop before a limit."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from llmfoundry import launch
from llmfoundry.cli.train import train_main
from llmfoundry.config import ConfigError, check
from llmfoundry.train.clock import Countdown, Limit, find_limit
from llmfoundry.train.duration import Duration, Timeline
from llmfoundry.train.schedule import SchedulerConfig
from tests.callbacks.conftest import lines, tiny  # noqa: F401


def summary(folder: Path) -> dict[str, object]:
    return json.loads((folder / "summary.json").read_text())


def clock_of(folder: Path) -> list[float]:
    return json.loads((folder / "checkpoints" / "latest" / "trainer.json").read_text())["clock"]


class Ticks:
    """A clock that goes on by a fixed time whenever it is read, whatever else the machine does."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now, self.time = seconds, 1000.0, time.time

    def monotonic(self) -> float:
        self.now += self.seconds
        return self.now


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Ticks:
    """The clock of runs; their process begins with the test. tests/faults/test_clock_of_ranks.py has the real one."""
    found = Ticks(0.02)
    monkeypatch.setattr("llmfoundry.train.clock.time", found)
    monkeypatch.setattr(launch, "BEGUN", found.now)
    return found


def test_a_run_lasts_as_long_as_the_clock_says_over_all_its_processes(
    tiny: Path, tmp_path: Path, ticks: Ticks, caplog: pytest.LogCaptureFixture  # noqa: F811
) -> None:  # fmt: skip
    caplog.set_level("INFO")
    run = tmp_path / "run"
    cosine = "scheduler={name: cosine_with_warmup, t_warmup: 0.2s}"
    command = [str(tiny), cosine, "autoresume=true", "eval_interval=1h", "save_interval=0.5s"]
    assert train_main([*command, "max_duration=1.5s"]) == 0
    first = len(lines(run))
    assert clock_of(run)[1] >= 1.5 and clock_of(run)[0] < 1.5, "it ended with the first step after that"
    assert summary(run)["ended"] == "max_duration=1.5s has passed" and summary(run)["stopped"] is False
    assert "validation/nats_per_token" in summary(run), "the last step is evaluated"
    names = [path.name for path in (run / "checkpoints").iterdir() if not path.is_symlink()]
    assert 1 <= len(names) <= 4, "one each half second, and the last"
    rates = [line["lr"] for line in lines(run)]
    assert rates[0] == 0.0 and 0.01 >= max(rates) > 2 * rates[-1]

    assert train_main([*command, "max_duration=1.5s"]) == 0
    assert f"already complete at step {first}" in caplog.text
    assert train_main([*command, "max_duration=2.5s"]) == 0
    assert len(lines(run)) > first and clock_of(run)[1] >= 2.5
    assert "continuing from" in caplog.text


def test_a_time_limit_stops_in_time_to_save_and_the_same_command_continues(
    tiny: Path, tmp_path: Path, ticks: Ticks  # noqa: F811
) -> None:  # fmt: skip
    run = tmp_path / "run"
    command = [str(tiny), "autoresume=true", "max_duration=100000ba", "eval_interval=0ba", "save_interval=0.5s"]
    assert train_main([*command, "time_limit=5.25s"]) == 0
    assert 1.0 < ticks.now - launch.BEGUN < 5.25
    stopped = summary(run)
    assert stopped["ended"] == "time_limit=5.25s"
    assert stopped["stopped"] is True
    step = stopped["steps"]
    assert isinstance(step, int) and (run / "checkpoints" / f"step-{step}" / "MANIFEST.json").exists()
    assert train_main([*command, f"max_duration={step + 1}ba"]) == 0
    assert [line["step"] for line in lines(run)] == list(range(1, step + 2))


def test_the_end_of_a_slurm_job_is_a_limit() -> None:
    soon = {"SLURM_JOB_END_TIME": str(int(time.time()) + 600)}
    limit = find_limit(None, soon)
    assert limit is not None and 590 < limit.at - time.monotonic() < 610 and "Slurm" in limit.why
    assert find_limit(None, {}) is None and find_limit(0.0, soon) is None
    assert find_limit(None, {"SLURM_JOB_END_TIME": str(int(time.time()) - 5)}) is None, "of another job"
    sooner = find_limit(time.monotonic() - launch.BEGUN + 10, soon)
    assert sooner is not None and sooner.why.startswith("time_limit=")


def test_the_longest_step_and_save_so_far_have_to_fit_before_the_limit() -> None:
    countdown = Countdown(Limit(time.monotonic() + 100.0, "a limit"))
    assert not countdown.over(0.0) and not countdown.over(60.0)
    assert countdown.over(67.0), "one and a half times as long does not fit"
    assert not Countdown(None).over(1e9)
    unknown = Countdown(Limit(time.monotonic() + 100.0, "a limit"))
    unknown.limit = Limit(time.monotonic() + 4.9, "a limit")
    assert unknown.over(0.0), "before the first save, a twentieth of the time"


@pytest.mark.parametrize(
    ("settings", "limit", "mistake"),
    [
        ({"name": "cosine_with_warmup", "t_warmup": "10min"}, "100ba", 'scheduler.t_warmup: "10min" is a time'),
        (
            {"name": "cosine_with_warmup", "t_warmup": "10ba"},
            "2h",
            'scheduler.t_warmup: "10ba" is not a wall-clock time',
        ),
        ({"name": "wsd", "t_decay": "5e6tok"}, "2h", 'scheduler.t_decay: "5e6tok" is not a wall-clock time'),
        ({"name": "constant_with_warmup", "composer_step": True}, "2h", "scheduler.composer_step: lags by a step"),
        ({"name": "cosine_with_warmup", "t_warmup": "3h"}, "2h", "is 10800000 ms, more than the 7200000"),
    ],
)
def test_a_schedule_counts_in_what_the_run_does(settings: dict[str, object], limit: str, mistake: str) -> None:
    timeline = Timeline.of(Duration.parse(limit), rows_per_step=8, tokens_per_row=100, rows_per_epoch=1001)
    with pytest.raises(ConfigError, match="^scheduler") as caught:
        check(SchedulerConfig, settings).build(timeline)
    assert mistake in str(caught.value)


def test_a_time_limit_is_a_time(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    assert train_main([str(tiny), "time_limit=100ba"]) == 2
    assert 'time_limit: "100ba" is not a wall-clock time; write e.g. 4h, 30min, 90s' in capsys.readouterr().err
