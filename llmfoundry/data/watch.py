"""Checks that run beside a run: what one of them finds is an error of the next that asks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from llmfoundry.config import ConfigError


class Watch:
    """Does checks one after the other in a thread of its own, which ends with the process.

    Args:
        name: of the thread.
        checks: each raises ConfigError.
    """

    def __init__(self, name: str, checks: Sequence[Callable[[], None]]) -> None:
        self._checks = checks
        self._found: ConfigError | None = None
        self._thread = threading.Thread(target=self._run, name=f"watch {name}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what was found so far."""
        if self._found is not None:
            raise self._found

    def wait(self) -> None:
        """Wait until all is checked."""
        self._thread.join()

    def _run(self) -> None:
        for check in self._checks:
            try:
                check()
            except ConfigError as error:
                self._found = error
                return
