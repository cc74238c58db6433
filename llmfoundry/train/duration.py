"""Lengths of training as strings: `10ba` (steps), `1ep`, `5e6tok`, `100sp` (rows), `0.1dur` (of the run).

A `Duration` is what the YAML says. A `Timeline` knows what one step holds and turns every duration into
steps, once, when the loader is known; from then on the run counts steps and nothing else. The arithmetic is
in fractions, so that `0.1dur` of 30 steps is 3 steps and not 4.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, Literal, cast, get_args

from pydantic import BeforeValidator, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from llmfoundry.config import ConfigError

Unit = Literal["ba", "ep", "tok", "sp", "dur"]

_TIME_STRING = re.compile(rf"(\d+(?:\.\d+)?(?:e\+?\d{{1,2}})?)({'|'.join(get_args(Unit))})")
MOST = Fraction(10**18)  # of any unit: what a run counts with is an int64
_WHOLE_UNITS = ("ba", "tok", "sp")


@dataclass(frozen=True)
class Duration:
    """A length of training: a number of one unit. As a field of a config it is its string."""

    value: Fraction
    unit: Unit
    text: str = field(default="", compare=False)  # as the user wrote it

    @classmethod
    def parse(cls, text: object) -> Duration:
        """Read a time string.

        Raises:
            ValueError: `text` is none. A plain number is none either: it does not say of what.
        """
        if isinstance(text, Duration):
            return text
        match = _TIME_STRING.fullmatch(text.strip()) if isinstance(text, str) else None
        if match is None:
            shown = text if isinstance(text, str) else repr(text)
            raise ValueError(f'"{shown}" is not a valid duration; write e.g. 10ba, 1ep, 5e6tok, 0.1dur')
        value, unit = Fraction(match[1]), cast(Unit, match[2])
        if value > MOST:
            raise ValueError(f'"{text}" is not a valid duration; the most is {float(MOST):.0e}{unit}')
        if unit in _WHOLE_UNITS and value.denominator != 1:
            raise ValueError(f'"{text}" is not a valid duration; {unit} counts in whole numbers')
        return cls(value, unit, match[0])

    def __str__(self) -> str:
        return self.text or f"{float(self.value):.12g}{self.unit}"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls.parse, serialization=core_schema.plain_serializer_function_ser_schema(str)
        )


def _of_epochs(value: object) -> object:
    is_number = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return Duration.parse(f"{value}ep") if is_number else value


Interval = Annotated[Duration, BeforeValidator(_of_epochs)]  # where Composer takes a number too: it counts epochs


@dataclass(frozen=True)
class Timeline:
    """What one step holds, and how many steps the run has: what turns durations into steps.

    Attributes:
        rows_per_step: rows of the global batch.
        tokens_per_row: sequence length in tokens; rows are packed full.
        rows_per_epoch: rows of the training data.
        total_steps: steps of the whole run; what `dur` is a part of.
    """

    rows_per_step: int
    tokens_per_row: int
    rows_per_epoch: int
    total_steps: int

    @classmethod
    def of(cls, max_duration: Duration, *, rows_per_step: int, tokens_per_row: int, rows_per_epoch: int) -> Timeline:
        """The timeline of a run that lasts `max_duration`.

        Raises:
            ConfigError: `max_duration` is given in `dur` (a part of itself), or is no step at all.
        """
        if max_duration.unit == "dur":
            raise ConfigError(f'max_duration: "{max_duration}" is a part of itself; write e.g. 10ba, 1ep')
        open_ended = cls(rows_per_step, tokens_per_row, rows_per_epoch, total_steps=0)
        total = open_ended.steps(max_duration)
        if total < 1:
            raise ConfigError(f'max_duration: "{max_duration}" is no step; write at least 1ba')
        return cls(rows_per_step, tokens_per_row, rows_per_epoch, total)

    def steps(self, duration: Duration) -> int:
        """Steps that `duration` takes: up to the first step that completes it.

        Epochs round down instead (but to no less than one step), so that `1ep` never shows a row twice.
        """
        exact = self._exact(duration)
        if duration.unit == "ep" and exact >= 1:
            return math.floor(exact)
        return math.ceil(exact)

    def due(self, interval: Duration, step: int) -> bool:
        """Whether what is done every `interval` is due when `step` steps are complete; never if it is 0.

        It is due at the step that completes each multiple of the interval, so an interval that is not a
        whole number of steps neither drifts nor skips, and one shorter than a step is due at every step.
        """
        exact = self._exact(interval)
        return step > 0 and exact > 0 and step // exact > (step - 1) // exact

    def share_of_evaluation(self, rows: int, interval: Duration) -> float:
        """The share of the run's time that evaluating `rows` rows every `interval` takes, 0 to 1.

        A row's forward pass costs a third of its training. An `interval` of 0 never evaluates.
        """
        steps = min(self._exact(interval), Fraction(self.total_steps))
        if steps <= 0:
            return 0.0
        trained = max(steps, Fraction(1)) * self.rows_per_step
        return float(rows / (rows + 3 * trained))

    def _exact(self, duration: Duration) -> Fraction:
        steps_in_one = {
            "ba": Fraction(1),
            "sp": Fraction(1, self.rows_per_step),
            "tok": Fraction(1, self.rows_per_step * self.tokens_per_row),
            "ep": Fraction(self.rows_per_epoch, self.rows_per_step),
            "dur": Fraction(self.total_steps),
        }
        return duration.value * steps_in_one[duration.unit]
