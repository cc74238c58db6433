"""What all ranks of a run agree on at the end of each step: whether to stop, and the time."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from llmfoundry import runtime, stopping
from llmfoundry.train.clock import Countdown
from llmfoundry.train.run import ASKED, TIME_LIMIT, Run
from llmfoundry.train.saving import Saver
from llmfoundry.train.watchdog import Watchdog

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class AgreeingRun(Run):
    """A run whose ranks stop together."""

    saver: Saver
    watchdog: Watchdog
    countdown: Countdown = field(default_factory=lambda: Countdown(None))
    agreed: float = 0.0  # when the ranks last agreed, by `perf_counter`
    stopping: bool = False  # all ranks have agreed to stop

    def on_signal(self, number: int) -> None:
        """Handle a signal: finish the step or evaluation batch, save and stop; a second signal ends at once."""
        log.warning(
            "%s: finishing this step, then saving to %s (send it again to quit at once)",
            stopping.name(number), self.config.save_folder,
        )  # fmt: skip
        self.asked = number

    def agree(self) -> float:
        """Agree with all ranks on whether to stop (`stopping`); returns the time by rank 0's clock.

        A signal takes effect at the next agreement. It is one reduction, and the only wait.
        """
        asked, seconds = float(self.asked), 0.0
        self.watchdog.phase("agreeing on whether to stop")
        if runtime.is_rank0():
            seconds = self.timeline.clock.own()
            if not asked and self.countdown.over(self.saver.checkpointer.longest_save):
                asked = float(TIME_LIMIT)
        asked, seconds = runtime.most_of_ranks([asked, seconds])
        self.agreed = time.perf_counter()
        if asked and not self.stopping:
            self.stopping = True
            self._say_why(int(asked))
        return seconds

    def _say_why(self, asked: int) -> None:
        if asked == TIME_LIMIT and self.countdown.limit is not None:
            self.why = self.countdown.limit.why
            log.warning("%s is near: stopping in time to save to %s", self.why, self.config.save_folder)
        elif asked < ASKED:
            self.why = stopping.name(asked)
        elif not self.why:
            self.why = "a callback on another rank"

    def stopped(self) -> bool:
        """Whether to leave an evaluation before its next batch; the same on every rank."""
        self.agree()
        self.watchdog.beat(f"an evaluation after step {self.state.step}")
        return self.stopping
