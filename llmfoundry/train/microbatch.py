"""How many rows of a rank go through the model at once. With `auto`, fewer each time that memory runs out.

Fewer rows at once are more microbatches of the same step, and its gradient does not depend on them (step.py).
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Literal

import torch

from llmfoundry import runtime
from llmfoundry.config import ResourceError
from llmfoundry.train.out_of_memory import Held
from llmfoundry.train.step import StepResult

log = logging.getLogger(__name__)

# Steps of a process in which ranks watch each other. The optimizer's state is there from the second one on, so the
# third step meets no new demand, but for the experts' changing loads.
WATCHED_STEPS = 3


class Microbatches:
    """The size in use.

    Args:
        asked: what the YAML says.
        least: rows of the rank with the fewest.
        most: rows of the rank with the most.

    Attributes:
        can_retry: whether the model can go on after a step that was left in the middle.
    """

    def __init__(self, asked: int | Literal["auto"], least: int, most: int) -> None:
        self.rows = most if asked == "auto" else asked
        self._auto = asked == "auto"
        self._least, self._most = least, most
        self._watched = WATCHED_STEPS  # steps to come
        self.can_retry = True

    def run(
        self, attempt: Callable[[int, bool], StepResult], explain: Callable[[int, Held | None, str], str]
    ) -> StepResult:
        """Take a step, with fewer rows at once if they do not fit.

        Args:
            attempt: `train_step`, given the rows of a microbatch and whether ranks leave it together.
            explain: what to say where nothing can be tried again, given the rows, what was held if that was found
                when the ranks left, and the error.

        Raises:
            ResourceError: not even the smallest microbatch fits, or memory ran out where nothing can be tried again.
        """
        while True:
            together = self._auto and self.can_retry and (self._watched > 0 or runtime.world_size() == 1)
            try:
                result = attempt(self.rows, together)
            except runtime.OutOfMemory as error:
                why, there = str(error), error.held
            except torch.OutOfMemoryError as error:
                raise ResourceError(explain(self.rows, None, str(error))) from None
            else:
                self._watched -= 1
                return result
            if not self._take_fewer():
                assert isinstance(there, Held)
                raise ResourceError(explain(self.rows, there, why))

    def _take_fewer(self) -> bool:
        """Take fewer rows at once from now on; False if that cannot be."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        rows = smaller(self.rows, self._least, self._most)
        if rows in (0, self.rows):
            return False
        if runtime.is_rank0():
            log.warning("out of memory with %d rows at once: going on with %d (device_train_microbatch_size: auto)",
                        self.rows, rows)  # fmt: skip
        self.rows, self._watched = rows, WATCHED_STEPS
        return True


def smaller(rows: int, least: int, most: int) -> int:
    """The next smaller microbatch to try: the largest of which all are equal, or else half. 0: no such size.

    With 12 rows: 6, 4, 3, 2, 1. A last one that is smaller than the others would need a graph of its own.
    """
    n = -(-most // rows)
    even = (count for count in range(n + 1, 2 * n) if least == most and most % count == 0)
    return fitting(-(-most // next(even, 2 * n)), least, most)


def fitting(rows: int, least: int, most: int) -> int:
    """The largest microbatch up to `rows` of which every rank has equally many: they meet in each. 0: no such size."""
    return next((n for n in range(rows, 0, -1) if -(-least // n) == -(-most // n)), 0)
