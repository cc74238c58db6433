"""What all ranks of a run agree on at the end of each step: whether to stop, and what time it is."""

from __future__ import annotations

import gc
import logging
import time
from dataclasses import dataclass, field

import torch.distributed as dist

from llmfoundry import runtime, stopping
from llmfoundry.train.clock import Countdown
from llmfoundry.train.duration import seconds_of
from llmfoundry.train.run import ASKED, TIME_LIMIT, Run
from llmfoundry.train.saving import Saver
from llmfoundry.train.watchdog import Watchdog

log = logging.getLogger(__name__)

_ALL_GARBAGE = 50  # steps from one look at all objects to the next; each step looks at those that are new


@dataclass(kw_only=True)
class AgreeingRun(Run):
    """A run whose ranks stop together."""

    saver: Saver
    watchdog: Watchdog
    countdown: Countdown = field(default_factory=lambda: Countdown(None))
    agreed: float = 0.0  # when the ranks last agreed, by `perf_counter`
    stopping: bool = False  # all ranks have agreed to stop
    warm: bool = False  # this process has taken a step
    froze: bool = False  # objects, for the garbage collector
    collects: bool = False  # garbage, in place of Python

    def on_signal(self, number: int) -> None:
        """A signal finishes the step or evaluation batch, saves and stops; a second one ends at once."""
        log.warning(
            "%s: finishing this step, then saving to %s (send it again to quit at once)",
            stopping.name(number), self.config.save_folder,
        )  # fmt: skip
        self.asked = number

    def agree(self) -> float:
        """Agree with all ranks on whether to stop, from now on in `stopping`; returns the time by rank 0's clock.

        A signal counts from when all ranks look next. It is one reduction: nothing else is waited for.
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

    def warmed_up(self) -> None:
        """The first step has compiled and connected; no later one takes that long."""
        seconds = seconds_of(self.config.step_timeout)
        if seconds is not None and not self.warm and dist.is_initialized():
            runtime.set_timeout(seconds)
        if not self.warm and not gc.get_freeze_count():  # else this process has seen to it before the run
            # Python's garbage collector need not look again through the 400,000 objects that are there by now and stay:
            # a full collection of them stops a rank, and all that wait for it, for a good part of a second.
            gc.collect()
            gc.freeze()
            self.froze = True
        self._collect()
        self.warm = True

    def _collect(self) -> None:
        """Collect garbage between two steps, on all ranks alike.

        By itself Python would do it anywhere, on each rank in another step, and all others would wait. Here a GPU has
        the update to do meanwhile.
        """
        if not self.warm and gc.isenabled():
            gc.disable()
            self.collects = True
        if self.collects:
            gc.collect(1 if self.state.step % _ALL_GARBAGE else 2)

    def leave_garbage(self) -> None:
        """Leave garbage to Python again."""
        if self.collects:
            gc.enable()
        if self.froze:
            gc.unfreeze()

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
        self._collect()
        self.watchdog.beat(f"an evaluation after step {self.state.step}")
        return self.stopping
