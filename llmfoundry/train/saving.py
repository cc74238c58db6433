"""Handle failed saves: the run continues with the previous checkpoint, and stops after too many failures."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from llmfoundry import runtime
from llmfoundry.checkpoint.checkpointer import Checkpointer, CheckpointState
from llmfoundry.checkpoint.manifest import SaveError
from llmfoundry.train.run import Metrics

log = logging.getLogger(__name__)

STALL = "time/save_stall_seconds"  # metric of the step after a save


class Saver:
    """Saves through a checkpointer and counts failures. All ranks call it together and count alike.

    Args:
        failures_allowed: consecutive failures that are allowed; one more is an error.
    """

    def __init__(self, checkpointer: Checkpointer, failures_allowed: int) -> None:
        self.checkpointer = checkpointer
        self._allowed = failures_allowed
        self._failures = 0  # in a row
        self._stalled: float | None = None  # seconds of the last `save`, until `stall` has returned them

    def save(self, state: CheckpointState, sync: Callable[[], None]) -> None:
        """Save a checkpoint; after a failure, a warning is logged and the next call tries again.

        A save that continues in a thread is counted by the next call, in which all ranks learn its result.

        Args:
            sync: called on rank 0 before the save, which fails if it raises OSError.

        Raises:
            SaveError: if too many consecutive saves have failed.
        """
        start = time.perf_counter()
        for part in (self._finish, lambda: self._begin(state, sync)):
            try:
                if part():
                    self._failures = 0
            except (SaveError, OSError) as error:
                self._count(error)
        self._stalled = time.perf_counter() - start

    def stall(self) -> Metrics:
        """Seconds by which the last save delayed the next step; empty if already reported.

        Call it after that step, whose update may have waited for the copies.
        """
        stalled, self._stalled = self._stalled, None
        stage = self.checkpointer.stage
        waited, stage.waited = stage.waited, 0.0
        return {} if stalled is None else {STALL: stalled + waited}

    def settle(self) -> None:
        """Wait for a save in flight; if it fails, a warning is logged."""
        try:
            self._finish()
        except SaveError as error:
            log.warning("%s", error)

    def save_last(self, state: CheckpointState, sync: Callable[[], None]) -> None:
        """Save the final checkpoint, and wait until it is on disk.

        Raises:
            SaveError: if it fails twice.
        """
        self.settle()
        for tries_left in (1, 0):
            try:
                self._begin(state, sync)
                self._finish()
                return
            except (SaveError, OSError) as error:
                message = f"the last checkpoint, of step {state.step}, could not be saved: {error}; {self._newest()}"
                if not tries_left:
                    raise SaveError(message) from error
                log.warning("%s; trying once more", message)

    def finish(self) -> None:
        """Wait for uploads when the run ends; raise SaveError."""
        self._finish()

    def _finish(self) -> Path | str | None:
        """Wait for the save in flight; None if nothing is being saved."""
        return self.checkpointer.wait()

    def _begin(self, state: CheckpointState, sync: Callable[[], None]) -> bool:
        """Save, or start a save in a thread; return whether it is complete."""
        runtime.on_rank0(sync)
        self.checkpointer.save(state)
        return not self.checkpointer.asynchronous

    def _count(self, error: Exception) -> None:
        self._failures += 1
        if self._failures > self._allowed:
            raise SaveError(
                f"{self._failures} saves in a row have failed (save_failures_allowed={self._allowed}), the last: "
                f"{error}; {self._newest()}"
            ) from error
        log.warning(
            "saving failed (%d in a row, %d allowed): %s; training continues and saves again after save_interval; %s",
            self._failures, self._allowed, error, self._newest(),
        )  # fmt: skip

    def _newest(self) -> str:
        newest = self.checkpointer.newest_saved
        if newest is None:
            return "no checkpoint has been saved yet"
        gone = isinstance(newest, Path) and not newest.exists()
        return f"the newest checkpoint {'was' if gone else 'is'} {newest}{', which is gone' if gone else ''}"
