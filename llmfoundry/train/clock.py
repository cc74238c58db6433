"""The time that a run has trained and has left, the same on every rank because only rank 0's clock counts.

No rank acts on its own clock. Rank 0 adds its time to the one small reduction by which ranks agree, at the end of each
step, on whether to stop. Decisions about time are based on that.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from typing import NamedTuple

from llmfoundry import launch

log = logging.getLogger(__name__)

SLURM_END = "SLURM_JOB_END_TIME"  # seconds since 1970, set by Slurm 22.05 and later
# Until a save has been measured: this share of the time that is left, and at most this many seconds.
UNKNOWN_SHARE, UNKNOWN_MOST = 0.05, 300.0
SLOWER = 1.5  # how much longer than the longest save so far the last one may take


class Clock:
    """Seconds from the first step, including evaluations and saves; a resumed run continues from the saved value.

    Attributes:
        seconds: at the end of the last step, as all ranks have agreed.
        before: the same for the step before.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.before = 0.0
        self._origin: float | None = None  # of the monotonic clock

    def start(self) -> None:
        """Start the clock."""
        self._origin = time.monotonic() - self.seconds

    def own(self) -> float:
        """The time by this process's clock."""
        return self.seconds if self._origin is None else time.monotonic() - self._origin

    def tick(self, agreed: float) -> None:
        """Take over the time that the ranks agreed on; called once per step."""
        self.before, self.seconds = self.seconds, max(self.seconds, agreed)

    def set(self, before: float, seconds: float) -> None:
        """Continue from a checkpoint."""
        self.before, self.seconds, self._origin = before, seconds, None


class Limit(NamedTuple):
    """The time by which this process must have ended."""

    at: float  # of the monotonic clock
    why: str


def find_limit(seconds: float | None, environment: Mapping[str, str] = os.environ) -> Limit | None:
    """Determine when this process must have ended.

    Args:
        seconds: `time_limit`, from the start of the process; None: Slurm's limit; 0: no limit.
        environment: contains Slurm's end of the job.
    """
    limits = []
    if seconds == 0:
        return None
    if seconds is not None:
        limits.append(Limit(launch.BEGUN + seconds, f"time_limit={seconds:.12g}s"))
    said = environment.get(SLURM_END, "")
    if said.isdecimal() and (left := int(said) - time.time()) > 0:  # one that has passed is of another job
        limits.append(Limit(time.monotonic() + left, "the end of the Slurm job"))
    return min(limits, default=None)


class Countdown:
    """Decides when to stop so that a last save fits before the limit. Only rank 0's answer counts."""

    def __init__(self, limit: Limit | None) -> None:
        self.limit = limit
        self._longest_step = 0.0
        self._last = time.monotonic()
        self._unknown = 0.0
        if limit is not None:
            left = limit.at - self._last
            self._unknown = min(UNKNOWN_MOST, UNKNOWN_SHARE * max(0.0, left))
            log.info("%s is in %.0f seconds; the run will stop in time to save", limit.why, left)

    def step_begins(self) -> None:
        """Start timing the next step or evaluation batch; called after a save, which is timed separately."""
        self._last = time.monotonic()

    def over(self, longest_save: float) -> bool:
        """Whether another step or evaluation batch, and then a save, would not fit; called at the end of each.

        Args:
            longest_save: seconds that the slowest save took until it was on disk; 0 before the first.
        """
        now = time.monotonic()
        self._longest_step, self._last = max(self._longest_step, now - self._last), now
        margin = SLOWER * longest_save if longest_save else self._unknown
        return self.limit is not None and now + self._longest_step + margin >= self.limit.at
