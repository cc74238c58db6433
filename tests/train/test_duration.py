from fractions import Fraction

import pytest

from llmfoundry.config import Config, ConfigError, check, dump
from llmfoundry.train.clock import Clock
from llmfoundry.train.duration import Duration, Timeline

TIMELINE = Timeline(rows_per_step=8, tokens_per_row=100, rows_per_epoch=1001, total_steps=30)


class Block(Config):
    save_interval: Duration = Duration.parse("1dur")


@pytest.mark.parametrize(
    "text, value, unit",
    [("10ba", 10, "ba"), ("1ep", 1, "ep"), ("5e6tok", 5_000_000, "tok"), ("100sp", 100, "sp"),
     ("0.1dur", Fraction(1, 10), "dur"), ("2.5e+9tok", 2_500_000_000, "tok"), ("0ba", 0, "ba"),
     ("2h", 2, "h"), ("1.5h", Fraction(3, 2), "h"), ("30min", 30, "min"), ("90s", 90, "s")],
)  # fmt: skip
def test_time_strings_are_read_exactly(text: str, value: Fraction, unit: str) -> None:
    assert Duration.parse(text) == Duration(Fraction(value), unit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["10", 10, 1.0, "ba", "10 steps", "-1ba", "1.5ba", "1e-3dur", "1e999ba", None, "10BA", "2 h", "-1h"]
)
def test_what_is_no_time_string_is_refused_with_its_path(text: object) -> None:
    with pytest.raises(ConfigError, match="^save_interval: .* is not a valid duration") as caught:
        check(Block, {"save_interval": text})
    assert "\n" not in str(caught.value)


def test_a_config_keeps_the_time_string_as_the_user_wrote_it() -> None:
    block = check(Block, {"save_interval": "5e6tok"})
    assert dump(block) == {"save_interval": "5e6tok"}
    assert check(Block, dump(block)) == block
    assert dump(Block()) == {"save_interval": "1dur"}
    assert str(Duration(Fraction(1, 4), "dur")) == "0.25dur"


@pytest.mark.parametrize(
    "text, steps",
    [("7ba", 7), ("8sp", 1), ("9sp", 2), ("800tok", 1), ("801tok", 2), ("1ep", 125), ("2ep", 250),
     ("0.1dur", 3), ("0.01dur", 1), ("1dur", 30), ("0ba", 0)],
)  # fmt: skip
def test_durations_resolve_to_steps(text: str, steps: int) -> None:
    assert TIMELINE.steps(Duration.parse(text)) == steps


def test_an_epoch_never_shows_a_row_twice() -> None:
    for rows_per_epoch in range(8, 60):
        timeline = Timeline.of(Duration.parse("1ep"), rows_per_step=8, tokens_per_row=1, rows_per_epoch=rows_per_epoch)
        assert timeline.total_steps * 8 <= rows_per_epoch


def test_an_epoch_smaller_than_a_batch_is_one_step() -> None:
    assert Timeline.of(Duration.parse("1ep"), rows_per_step=8, tokens_per_row=1, rows_per_epoch=3).total_steps == 1


@pytest.mark.parametrize("text", ["1dur", "0ba"])
def test_a_run_cannot_last_a_part_of_itself_or_nothing(text: str) -> None:
    with pytest.raises(ValueError, match="^max_duration: "):
        Timeline.of(Duration.parse(text), rows_per_step=8, tokens_per_row=1, rows_per_epoch=100)


def test_an_interval_is_due_at_its_multiples() -> None:
    every = Duration.parse("4ba")
    assert [step for step in range(13) if TIMELINE.due(every, step)] == [4, 8, 12]


def test_an_interval_that_is_no_whole_number_of_steps_does_not_drift() -> None:
    every = Duration.parse("2000tok")  # 2.5 steps
    due = [step for step in range(1001) if TIMELINE.due(every, step)]
    assert due[:4] == [3, 5, 8, 10]
    assert len(due) == 400


def test_an_interval_below_one_step_is_due_at_every_step_and_zero_never() -> None:
    assert all(TIMELINE.due(Duration.parse("1tok"), step) for step in range(1, 20))
    assert not any(TIMELINE.due(Duration.parse("0ba"), step) for step in range(20))


def by_the_clock(limit: str) -> Timeline:
    return Timeline.of(Duration.parse(limit), rows_per_step=8, tokens_per_row=100, rows_per_epoch=1001)


def test_times_by_the_clock_are_due_at_the_first_step_after_them() -> None:
    timeline, every = by_the_clock("1h"), Duration.parse("30s")
    due = []
    for step, seconds in enumerate((12.0, 29.9, 30.1, 45.0, 95.0, 119.0, 121.0), 1):
        timeline.clock.tick(seconds)
        if timeline.due(every, step):
            due.append(seconds)
    assert due == [30.1, 95.0, 121.0]
    assert not timeline.due(Duration.parse("0s"), 8) and not timeline.is_over
    timeline.clock.tick(3600.0)
    assert timeline.is_over and timeline.due(Duration.parse("0.5dur"), 9), "a share of the run is a time, too"


def test_a_run_by_the_clock_has_no_steps_but_an_estimate() -> None:
    timeline = by_the_clock("100s")
    assert timeline.expected_steps(0) is None and timeline.counted(Duration.parse("0.1dur")) == 10_000
    timeline.clock.tick(20.0)
    assert timeline.expected_steps(10) == 50 and timeline.position(10) == 20_000
    with pytest.raises(ConfigError, match='"0.5dur" of max_duration=100s is a time, and steps are needed here'):
        timeline.steps(Duration.parse("0.5dur"))
    with pytest.raises(
        ConfigError, match='"10ba" is not a wall-clock time, but max_duration is; write e.g. 10min or 0.1dur'
    ):
        timeline.counted(Duration.parse("10ba"))
    with pytest.raises(ConfigError, match='"2h" is a time, and max_duration is not'):
        TIMELINE.counted(Duration.parse("2h"))
    with pytest.raises(ConfigError, match="^max_duration: .* is less than one step"):
        by_the_clock("0s")


def test_the_clock_goes_on_where_a_checkpoint_had_it() -> None:
    clock = Clock()
    clock.set(10.0, 12.0)
    assert clock.own() == 12.0, "it does not run before the first step"
    clock.start()
    assert 12.0 <= clock.own() < 13.0
    clock.tick(11.0)
    assert (clock.before, clock.seconds) == (12.0, 12.0), "time never goes back"
