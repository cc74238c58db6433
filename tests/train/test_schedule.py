import math

import pytest

from llmfoundry.config import Config, ConfigError, check
from llmfoundry.train.duration import Duration, Timeline
from llmfoundry.train.schedule import Schedule, SchedulerConfig

TIMELINE = Timeline(rows_per_step=8, tokens_per_row=100, rows_per_epoch=1000, total_steps=100)


class Block(Config):
    scheduler: SchedulerConfig


def build(**settings: object) -> Schedule:
    return check(Block, {"scheduler": settings}).scheduler.build(TIMELINE)


def curve(**settings: object) -> list[float]:
    schedule = build(**settings)
    return [schedule.multiplier(step) for step in range(101)]


@pytest.mark.parametrize(
    "settings",
    [{"name": "constant_with_warmup"}, {"name": "linear_decay_with_warmup"}, {"name": "cosine_with_warmup"},
     {"name": "inv_sqrt_with_warmup", "t_scale": "10ba"}, {"name": "wsd", "t_decay": "20ba"}],
    ids=lambda settings: settings["name"],
)  # fmt: skip
def test_every_schedule_warms_up_from_zero_to_its_peak(settings: dict[str, str]) -> None:
    values = curve(t_warmup="0.1dur", **settings)
    assert values[:11] == pytest.approx([step / 10 for step in range(11)])
    assert max(values) == 1.0
    assert curve(**settings)[0] == 1.0  # and without a warm-up starts there


@pytest.mark.parametrize("name", ["linear_decay_with_warmup", "cosine_with_warmup", "constant_with_warmup"])
def test_a_warm_up_as_long_as_the_run_still_rises_to_the_peak(name: str) -> None:
    assert curve(name=name, t_warmup="1dur")[:100] == pytest.approx([step / 100 for step in range(100)])


def test_cosine_ends_at_alpha_f_and_stays_there() -> None:
    schedule = build(name="cosine_with_warmup", t_warmup="20ba", t_max="80ba", alpha_f=0.1)
    assert schedule.multiplier(50) == pytest.approx(0.55)
    assert schedule.multiplier(35) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert schedule.multiplier(80) == schedule.multiplier(500) == pytest.approx(0.1)


def test_linear_goes_straight_from_alpha_i_to_alpha_f() -> None:
    values = curve(name="linear_decay_with_warmup", t_warmup="50ba", alpha_i=0.5, alpha_f=0.1)
    assert [values[25], values[50], values[75], values[100]] == pytest.approx([0.25, 0.5, 0.3, 0.1])


def test_constant_keeps_alpha() -> None:
    assert set(curve(name="constant_with_warmup", alpha=0.3)) == {0.3}


def test_inverse_square_root_decays_by_its_scale_and_cools_down() -> None:
    values = curve(name="inv_sqrt_with_warmup", t_warmup="10ba", t_scale="20ba", t_cooldown="40ba", alpha_f_decay=0.1)
    assert values[30] == pytest.approx(0.1 + 0.9 / math.sqrt(2))
    assert values[60] == pytest.approx(0.1 + 0.9 / math.sqrt(70 / 20))
    assert values[80] == pytest.approx(values[60] / 2)
    assert values[100] == pytest.approx(0.0)


@pytest.mark.parametrize("decay, middle", [("linear", 0.55), ("1-sqrt", 1 - 0.9 * math.sqrt(0.5))])
def test_wsd_is_flat_and_then_decays(decay: str, middle: float) -> None:
    values = curve(name="wsd", t_warmup="10ba", t_decay="0.2dur", alpha_f=0.1, decay=decay)
    assert set(values[10:81]) == {1.0}
    assert values[90] == pytest.approx(middle)
    assert values[100] == pytest.approx(0.1)


def test_a_warmup_longer_than_the_run_is_an_error() -> None:
    with pytest.raises(ValueError, match="t_warmup=200ba is 200 steps, more than the 100 of t_max=1dur"):
        build(name="cosine_with_warmup", t_warmup="200ba")
    with pytest.raises(ValueError, match="t_decay"):
        build(name="wsd", t_warmup="50ba", t_decay="60ba")


def test_an_unknown_schedule_names_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cosine_with_warmup'"):
        build(name="cosine_warmup")
    with pytest.raises(ConfigError, match="scheduler.t_warmup: .*is not a valid duration"):
        build(name="cosine_with_warmup", t_warmup=100)


@pytest.mark.parametrize(
    ("settings", "first_five"),
    [
        ({"name": "constant_with_warmup", "t_warmup": "3ba"}, [0, 0, 1 / 3, 2 / 3, 1]),
        ({"name": "linear_decay_with_warmup", "t_max": "4ba"}, [1, 1, 0.75, 0.5, 0.25]),
        ({"name": "cosine_with_warmup", "t_warmup": "1ba", "t_max": "3ba"}, [0, 0, 1, 0.5, 0]),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_composers_curve_is_one_step_late(settings: dict[str, str], first_five: list[float]) -> None:
    assert curve(**settings, composer_step=True)[:5] == pytest.approx(first_five)
    assert curve(**settings)[:4] == pytest.approx(first_five[1:])


@pytest.mark.parametrize(
    ("warmup", "third"),
    [("0.018dur", 1.0), ("0.029dur", 1 / 2), ("1000tok", 1 / 1.25), ("12sp", 1 / 1.5), ("3ba", 1 / 3)],
)
def test_composer_rounds_a_part_of_a_run_down_and_does_not_round_tokens(warmup: str, third: float) -> None:
    schedule = build(name="constant_with_warmup", t_warmup=warmup, composer_step=True)
    assert schedule.multiplier(2) == pytest.approx(third)


@pytest.mark.parametrize(("length", "fifth"), [("10000tok", 4 / 6.25), ("100sp", 4 / 6.25), ("13ba", 4 / 6)])
def test_composer_rounds_a_part_of_tokens_to_tokens(length: str, fifth: float) -> None:
    timeline = Timeline.of(Duration.parse(length), rows_per_step=8, tokens_per_row=100, rows_per_epoch=1000)
    assert timeline.total_steps == 13
    settings = {"name": "constant_with_warmup", "t_warmup": "0.5dur", "composer_step": True}
    assert check(Block, {"scheduler": settings}).scheduler.build(timeline).multiplier(5) == pytest.approx(fifth)
