"""Lengths of training as strings: `10ba` (steps), `1ep`, `5e6tok`, `100sp` (rows), `0.1dur` (of the run), `2h`.

A `Duration` is what the YAML says. A `Timeline` knows the size of a step and converts every duration into steps, once,
when the loader is known; from then on the run only counts steps. It computes with fractions, so that `0.1dur` of 30
steps is 3 steps and not 4.

Wall-clock time (`2h`, `30min`, `90s`) cannot be converted into steps. If `max_duration` is such a time, the run counts
milliseconds instead of steps; an interval is due at the first step after its time by the `Clock`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, Literal, cast, get_args

from pydantic import AfterValidator, BeforeValidator, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from llmfoundry.config import ConfigError
from llmfoundry.train.clock import Clock

Unit = Literal["ba", "ep", "tok", "sp", "dur", "h", "min", "s"]

_TIME_STRING = re.compile(rf"(\d+(?:\.\d+)?(?:e\+?\d{{1,2}})?)({'|'.join(get_args(Unit))})")
MOST = Fraction(10**18)  # largest number of any unit, because a run counts with int64
_WHOLE_UNITS = ("ba", "tok", "sp")
_SECONDS = {"h": 3600, "min": 60, "s": 1}


@dataclass(frozen=True)
class Duration:
    """A length of training: a number of one unit. In a config it is written as its string."""

    value: Fraction
    unit: Unit
    text: str = field(default="", compare=False)  # as the user wrote it

    @classmethod
    def parse(cls, text: object) -> Duration:
        """Parse a time string.

        Raises:
            ValueError: `text` is not a duration. Neither is a plain number, which has no unit.
        """
        if isinstance(text, Duration):
            return text
        match = _TIME_STRING.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            shown = f'"{text}"' if isinstance(text, str) else "an empty value" if text is None else repr(text)
            raise ValueError(f"{shown} is not a valid duration; write e.g. 10ba, 1ep, 5e6tok, 0.1dur, 2h")
        value, unit = Fraction(match[1]), cast(Unit, match[2])
        if value > MOST:
            raise ValueError(f'"{text}" is not a valid duration; the most is {float(MOST):.0e}{unit}')
        if unit in _WHOLE_UNITS and value.denominator != 1:
            raise ValueError(f'"{text}" is not a valid duration; {unit} counts in whole numbers')
        return cls(value, unit, match[0])

    @property
    def seconds(self) -> Fraction | None:
        """Seconds of a wall-clock time; None for other units."""
        return self.value * _SECONDS[self.unit] if self.unit in _SECONDS else None

    def __str__(self) -> str:
        return self.text or f"{float(self.value):.12g}{self.unit}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )


def _of_clock(value: Duration) -> Duration:
    if value.seconds is None:
        raise ValueError(f'"{value}" is not a wall-clock time; write e.g. 4h, 30min, 90s')
    return value


ClockTime = Annotated[Duration, AfterValidator(_of_clock)]


def seconds_of(value: Duration | None) -> float | None:
    """Seconds of a `ClockTime`; None for None."""
    return None if value is None or value.seconds is None else float(value.seconds)


def _of_epochs(value: object) -> object:
    is_number = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return Duration.parse(f"{value}ep") if is_number else value


Interval = Annotated[Duration, BeforeValidator(_of_epochs)]  # where Composer takes a number too: it counts epochs


@dataclass(frozen=True)
class Timeline:
    """Converts durations into steps.

    Attributes:
        rows_per_step: rows of the global batch.
        tokens_per_row: sequence length in tokens; rows are packed full.
        rows_per_epoch: rows of the training data.
        total_steps: steps of the whole run, which `dur` refers to. `MOST` while a wall-clock run continues.
        limit: seconds of a wall-clock run; None for a run of a number of steps.
        clock: the time that the ranks agree on.
        max_duration: what `total_steps` was rounded up from; None: nothing was rounded.
    """

    rows_per_step: int
    tokens_per_row: int
    rows_per_epoch: int
    total_steps: int
    limit: Fraction | None = None
    clock: Clock = field(default_factory=Clock, compare=False)
    max_duration: Duration | None = None

    @classmethod
    def of(cls, max_duration: Duration, *, rows_per_step: int, tokens_per_row: int, rows_per_epoch: int) -> Timeline:
        """The timeline of a run of length `max_duration`.

        Raises:
            ConfigError: `max_duration` is given in `dur` (a share of itself), or is less than one step.
        """
        if max_duration.unit == "dur":
            raise ConfigError(f'max_duration: "{max_duration}" is a part of itself; write e.g. 10ba, 1ep, 2h')
        limit = max_duration.seconds
        if limit:
            return cls(rows_per_step, tokens_per_row, rows_per_epoch, int(MOST), limit)
        open_ended = cls(rows_per_step, tokens_per_row, rows_per_epoch, total_steps=0)
        total = open_ended.steps(max_duration) if limit is None else 0
        if total < 1:
            raise ConfigError(f'max_duration: "{max_duration}" is less than one step; write at least 1ba')
        return cls(rows_per_step, tokens_per_row, rows_per_epoch, total, max_duration=max_duration)

    def steps(self, duration: Duration) -> int:
        """The number of steps that `duration` takes: up to the first step that completes it.

        Epochs are rounded down instead (but to at least one step), so that `1ep` never shows a row twice.

        Raises:
            ConfigError: the duration is a wall-clock time.
        """
        if self.seconds(duration) is not None:
            whole = f" of max_duration={float(self.limit or 0):.12g}s" if duration.unit == "dur" else ""
            raise ConfigError(f'"{duration}"{whole} is a time, and steps are needed here; write e.g. 10ba')
        exact = self._exact(duration)
        if duration.unit == "ep" and exact >= 1:
            return math.floor(exact)
        return math.ceil(exact)

    def counted(self, duration: Duration) -> int:
        """A duration in the unit of the run's length: steps, or milliseconds of a wall-clock run.

        Raises:
            ConfigError: the duration is given in the other one.
        """
        seconds = self.seconds(duration)
        if (seconds is None) == (self.limit is None):
            return self.steps(duration) if seconds is None else math.ceil(seconds * 1000)
        if duration.value == 0:
            return 0
        if self.limit is None:
            raise ConfigError(f'"{duration}" is a time, and max_duration is not; write e.g. 100ba or 0.1dur')
        raise ConfigError(f'"{duration}" is not a wall-clock time, but max_duration is; write e.g. 10min or 0.1dur')

    def counted_by_composer(self, duration: Duration) -> float:
        """The same as Composer has it, which rounds no tokens and rows to steps.

        It rounds a part of a run down: to tokens or rows if `max_duration` is given in them, else to steps.

        Raises:
            ConfigError: as `counted`.
        """
        steps = self.counted(duration)
        if self.limit is not None or duration.unit not in ("dur", "tok", "sp"):
            return steps
        if duration.unit == "dur":
            whole = self.max_duration
            if whole is None or whole.unit not in ("tok", "sp"):
                return math.floor(self._exact(duration))
            duration = Duration(Fraction(math.floor(duration.value * whole.value)), whole.unit)
        return float(self._exact(duration))

    def position(self, step: int) -> int:
        """The position of the run after `step` steps, in the unit of `counted`."""
        return step if self.limit is None else math.floor(self.clock.seconds * 1000)

    def position_before(self, step: int) -> int:
        """The position of the run when the last of `step` steps started."""
        return step - 1 if self.limit is None else math.floor(self.clock.before * 1000)

    def expected_steps(self, step: int) -> int | None:
        """Steps of the whole run. For a wall-clock run, an estimate after `step` steps; None before the first."""
        if self.limit is None or self.total_steps < MOST:
            return self.total_steps
        seconds = self.clock.seconds
        return max(step, round(step * float(self.limit) / seconds)) if step and seconds else None

    @property
    def is_over(self) -> bool:
        """Whether the time of a wall-clock run has passed."""
        return self.limit is not None and self.clock.seconds >= self.limit

    def due(self, interval: Duration, step: int) -> bool:
        """Whether something with this interval is due after `step` steps; never if the interval is 0.

        It is due at the step that completes each multiple of the interval. An interval that is not a whole number of
        steps therefore neither drifts nor skips, and one shorter than a step is due at every step. For a wall-clock
        interval, it is the first step that starts after that time.
        """
        seconds = self.seconds(interval)
        if seconds is not None:
            every = float(seconds)
            return step > 0 and every > 0 and self.clock.seconds // every > self.clock.before // every
        exact = self._exact(interval)
        return step > 0 and exact > 0 and step // exact > (step - 1) // exact

    def share_of_evaluation(self, rows: int, interval: Duration) -> float | None:
        """The share of the run's time, 0 to 1, that evaluating `rows` rows every `interval` takes.

        A row's forward pass costs a third of its training. An `interval` of 0 never evaluates. None: unknown, because
        the interval is a wall-clock time.
        """
        if self.seconds(interval) is not None:
            return None
        steps = min(self._exact(interval), Fraction(self.total_steps))
        if steps <= 0:
            return 0.0
        trained = max(steps, Fraction(1)) * self.rows_per_step
        return float(rows / (rows + 3 * trained))

    def seconds(self, duration: Duration) -> Fraction | None:
        """Seconds of a wall-clock duration; None for others."""
        if duration.unit == "dur" and self.limit is not None:
            return duration.value * self.limit
        return duration.seconds

    def _exact(self, duration: Duration) -> Fraction:
        steps_in_one = {
            "ba": Fraction(1),
            "sp": Fraction(1, self.rows_per_step),
            "tok": Fraction(1, self.rows_per_step * self.tokens_per_row),
            "ep": Fraction(self.rows_per_epoch, self.rows_per_step),
            "dur": Fraction(self.total_steps),
        }
        return duration.value * steps_in_one[duration.unit]
