"""Learning-rate schedules: the factor on the learning rate as a pure function of the completed steps.

Nothing is stored, so a resumed run needs the step and no more. Names, keys and formulas are Composer's and LLM
Foundry's: with a warm-up, the very first step has factor 0. Composer sets the factor before it counts the step, so its
second step has the first one's factor again and every later one lags by a step; `composer_step: true` does the same,
and takes parts of a run and tokens as Composer takes them.
`wsd` (warmup-stable-decay) is new. Where `max_duration` is a time by the clock, milliseconds take the place of steps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import Field

from llmfoundry.config import Choice, ConfigError
from llmfoundry.train.duration import Duration, Timeline

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """A linear warm-up from 0 to `peak` over `warmup` steps, then `shape`."""

    warmup: float
    shape: Callable[[float], float]
    peak: float = 1.0  # also if nothing follows the warm-up
    lag: int = 0  # steps by which the curve is late

    def multiplier(self, step: int) -> float:
        """The factor on the learning rate of the step that follows `step` completed steps."""
        step = max(0, step - self.lag)
        if step < self.warmup:
            return step / self.warmup * self.peak
        return self.shape(step)


class SchedulerConfig(Choice, tag="name"):
    """Base of the schedules: `scheduler: {name: cosine_with_warmup, t_warmup: 100ba, alpha_f: 0.1}`."""

    name: str  # shape of the schedule
    t_warmup: Duration = Duration.parse("0ba")  # length of the linear warm-up from 0
    t_max: Duration = Duration.parse("1dur")  # end of the schedule
    composer_step: bool = False  # apply each value one step late, and round dur, tok and sp, as Composer does

    def build(self, timeline: Timeline) -> Schedule:
        """Build the schedule of a run.

        Raises:
            ConfigError: the parts (`t_warmup`, a decay or cool-down) are longer than `t_max`, or mix steps with wall-
                clock times.
        """
        if self.composer_step and timeline.limit is not None:
            raise ConfigError("scheduler.composer_step: lags by a step, and max_duration is a time; leave it out")
        curve = self._curve(timeline)
        return replace(curve, lag=1) if self.composer_step else curve

    def _curve(self, timeline: Timeline) -> Schedule:
        raise NotImplementedError

    def _warmup_and_end(self, timeline: Timeline) -> tuple[float, float]:
        warmup, end = self._counted("t_warmup", self.t_warmup, timeline), self._counted("t_max", self.t_max, timeline)
        if warmup > end:
            raise ConfigError(
                f"scheduler.t_warmup={self.t_warmup} is {warmup:.12g} {_unit(timeline)}, more than the {end:.12g} of "
                f"t_max={self.t_max}; shorten the warm-up or train for longer"
            )
        return warmup, end

    def _counted(self, key: str, duration: Duration, timeline: Timeline) -> float:
        try:
            return timeline.counted_by_composer(duration) if self.composer_step else timeline.counted(duration)
        except ConfigError as error:
            raise ConfigError(f"scheduler.{key}: {error}") from None

    def _tail_start(self, key: str, tail: Duration, timeline: Timeline, warmup: float, end: float) -> float:
        steps = self._counted(key, tail, timeline)
        if warmup + steps > end:
            raise ConfigError(
                f"scheduler.{key}={tail} is {steps:.12g} {_unit(timeline)}; "
                f"with {warmup:.12g} of warm-up more than the {end:.12g} of t_max"
            )
        return end - steps


def warn_of_no_rate(schedule: Schedule, timeline: Timeline, warmup: Duration) -> None:
    """Warn if every step has learning rate 0: the first step of a warm-up has, and may be the only one."""
    first = range(min(timeline.total_steps, 3))
    if timeline.limit is None and not any(schedule.multiplier(step) for step in first):
        log.warning("scheduler: the learning rate is 0 in every step of this run, so it trains nothing; the first step "
                    "of a warm-up has 0 (t_warmup=%s): raise max_duration, or write scheduler.t_warmup=0ba",
                    warmup)  # fmt: skip


class ConstantConfig(SchedulerConfig, names=("constant_with_warmup",)):
    """Warm-up to `alpha`, then constant."""

    alpha: float = Field(1.0, ge=0)  # factor on the optimizer's lr after warm-up

    def _curve(self, timeline: Timeline) -> Schedule:
        warmup, _ = self._warmup_and_end(timeline)
        return Schedule(warmup, lambda step: self.alpha, self.alpha)


class LinearConfig(SchedulerConfig, names=("linear_decay_with_warmup",)):
    """Warm-up to `alpha_i`, then linear to `alpha_f` at `t_max`."""

    alpha_i: float = Field(1.0, ge=0)  # factor on the optimizer's lr after warm-up
    alpha_f: float = Field(0.0, ge=0)  # factor on the optimizer's lr at the end

    def _curve(self, timeline: Timeline) -> Schedule:
        warmup, end = self._warmup_and_end(timeline)

        def shape(step: float) -> float:
            return self.alpha_i + (self.alpha_f - self.alpha_i) * _part(step, warmup, end)

        return Schedule(warmup, shape, self.alpha_i)


class CosineConfig(SchedulerConfig, names=("cosine_with_warmup",)):
    """Warm-up to 1, then half a cosine down to `alpha_f` at `t_max`.

    Source: Loshchilov & Hutter 2016, SGDR, arXiv:1608.03983.
    """

    alpha_f: float = Field(0.0, ge=0)  # factor on the optimizer's lr at the end

    def _curve(self, timeline: Timeline) -> Schedule:
        warmup, end = self._warmup_and_end(timeline)

        def shape(step: float) -> float:
            return self.alpha_f + (1 - self.alpha_f) * (1 + math.cos(math.pi * _part(step, warmup, end))) / 2

        return Schedule(warmup, shape)


class InverseSquareRootConfig(SchedulerConfig, names=("inv_sqrt_with_warmup",)):
    """Warm-up to 1, then `alpha_f_decay + (1 - alpha_f_decay) / sqrt((t - t_warmup + t_scale) / t_scale)`.

    The last `t_cooldown` before `t_max` is a straight line from there to `alpha_f_cooldown`.
    """

    t_scale: Duration  # time after warm-up in which the factor falls to 1 / sqrt(2)
    t_cooldown: Duration = Duration.parse("0ba")  # length of the linear decay at the end
    alpha_f_decay: float = Field(0.0, ge=0)  # limit of the factor on the optimizer's lr
    alpha_f_cooldown: float = Field(0.0, ge=0)  # factor on the optimizer's lr at the end

    def _curve(self, timeline: Timeline) -> Schedule:
        warmup, end = self._warmup_and_end(timeline)
        scale = self._counted("t_scale", self.t_scale, timeline)
        if scale < 1:
            raise ConfigError(f"scheduler.t_scale={self.t_scale} is less than one step; write at least 1ba")
        start = self._tail_start("t_cooldown", self.t_cooldown, timeline, warmup, end)

        def decay(step: float) -> float:
            return self.alpha_f_decay + (1 - self.alpha_f_decay) / math.sqrt((step - warmup + scale) / scale)

        def shape(step: float) -> float:
            if step < start or start == end:
                return decay(step)
            top = decay(start)
            return top + (self.alpha_f_cooldown - top) * _part(step, start, end)

        return Schedule(warmup, shape)


class WarmupStableDecayConfig(SchedulerConfig, names=("wsd",)):
    """Warm-up to 1, constant, then down to `alpha_f` over the last `t_decay` before `t_max`.

    `decay` is the shape of the decay: linear, or one minus the square root of the elapsed part
    (Haegele et al. 2024, arXiv:2405.18392, who find it the better of the two).
    """

    t_decay: Duration  # length of the decay at the end
    alpha_f: float = Field(0.0, ge=0)  # factor on the optimizer's lr at the end
    decay: Literal["linear", "1-sqrt"] = "linear"  # shape of the decay

    def _curve(self, timeline: Timeline) -> Schedule:
        warmup, end = self._warmup_and_end(timeline)
        start = self._tail_start("t_decay", self.t_decay, timeline, warmup, end)

        def shape(step: float) -> float:
            if step <= start:
                return 1.0
            gone = _part(step, start, end)
            down = gone if self.decay == "linear" else math.sqrt(gone)
            return 1.0 + (self.alpha_f - 1.0) * down

        return Schedule(warmup, shape)


def _unit(timeline: Timeline) -> str:
    return "steps" if timeline.limit is None else "ms"


def _part(step: float, start: float, end: float) -> float:
    """The elapsed part between `start` (0) and `end` (1); 1 after the end."""
    return min(1.0, max(0, step - start) / (end - start)) if end > start else 1.0
